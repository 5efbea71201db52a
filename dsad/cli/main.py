"""Entry of the ``dsad`` command: one module per sub-command, imported when it is called."""

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from dsad.core.errors import DsadError

COMMANDS = {
    "demo": "see it work: pretrain, localize, report, in a few minutes on a CPU",
    "check-data": "check a data set and print every fault at once",
    "prepare": "write a data set as ArrayRecord files, to read it faster",
    "plan": "memory, speed and cost of a config on accelerators, before you pay",
    "config": "list every key of a config with its value, type and meaning",
    "pretrain": "train an encoder on normal images",
    "fit": "fit a detector to good pictures: a model with thresholds",
    "predict": "score pictures with a fitted model: decisions, regions, overlays",
    "evaluate": "measure how well a backbone localizes defects",
    "export": "write an encoder under published names, for timm and torchvision",
    "report": "write report.html from one or more evaluations",
    "bench": "measure speed and memory, side by side with installed peers",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0, 1 for faults found, 2 for unusable input, 3 for storage that failed during a run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from dsad import __version__

        print(f"dsad {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        from dsad.core.config import suggestion

        hint = suggestion(argv[0], COMMANDS)
        print(f"dsad: unknown command {argv[0]!r}.{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    # XLA's start-up notes mean nothing to users and hide the messages that do.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Libraries announce fallbacks of their own here; what matters to users is said by dsad.
    logging.getLogger("absl").setLevel(logging.ERROR)
    module = importlib.import_module(f"dsad.cli.{argv[0].replace('-', '_')}")
    try:
        return module.main(argv[1:])
    except DsadError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"dsad {argv[0]}: stopped", file=sys.stderr)
        return 3


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "usage: dsad COMMAND [--flags]\n\n" + "\n".join(lines) + "\n\ndsad COMMAND --help"


def entry() -> None:
    """Console script."""
    try:
        code = main()
        sys.stdout.flush()
    except Exception as error:
        code = _output_full(error)
        if not code:
            _end_with_others(1, traceback.format_exc())
            raise
    _end_with_others(code)
    sys.exit(code)


def _output_full(error: Exception) -> int:
    """The exit code where the output goes to a full disk, said on stderr; else 0."""
    from dsad.core import paths

    if not isinstance(error, OSError) or not paths.is_full(error):
        return 0
    where = error.filename or "standard output"
    print(
        f"error: {where}: the disk or quota is full: {paths.cause(error)}. Free space there, or "
        "send the output elsewhere.",
        file=sys.stderr,
    )
    # What could not be written is still in its buffer; at the exit it would fail once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 3


def _end_with_others(code: int, text: str = "") -> None:
    """Where this is one of several processes and failed, end it without waiting for them."""
    if code and "jax" in sys.modules:
        from dsad.core import distributed

        if distributed.started():
            print(text, end="", file=sys.stderr)
            distributed.leave(code)
