"""Serves ``dsad`` commands in one process: JSON lines in, [exit code, output, errors] out.

What a command imports and compiles serves those that come after it.
"""

import contextlib
import io
import json
import os
import sys
import traceback


def served(folder, argv):
    from dsad.cli import main

    os.chdir(folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main.main(argv)
        except SystemExit as stop:
            code = stop.code or 0
        except Exception:
            code = 1
            traceback.print_exc()
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(served(*json.loads(line))), flush=True)
