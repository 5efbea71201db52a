"""Entry of the ``dsad`` command: one module per sub-command, imported when it is called."""

import importlib
import os
import sys
from collections.abc import Sequence

from dsad.cli.signals import Signals
from dsad.core.errors import DsadError, StoppedError

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
    "compare": "measure backbones, detectors, data sets and seeds in one table",
    "export": "write an encoder under published names, for timm and torchvision",
    "submit": "pack what the server for MVTec AD 2's private images takes",
    "report": "write report.html from one or more evaluations",
    "bench": "measure speed and memory, side by side with installed peers",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0, 1 for faults found, 2 for unusable input, 3 for storage that failed during a run, 130 for
    Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except DsadError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        again = "the same command again goes on, begins anew, or says how"
        print(f"{' '.join(['dsad', *argv[:1]])}: stopped; {again}", file=sys.stderr)
        return StoppedError.code
    except OSError as error:
        return _unexpected(error)
    except UnicodeEncodeError as error:  # of what the system gave as bytes
        name = error.object[max(0, error.start - 60) : error.end + 20].rpartition("\t")[2]
        print(f"error: {name!a}: not UTF-8, as names have to be. Rename that.", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
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
    import logging

    # XLA's start-up notes mean nothing to users and hide the messages that do.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Libraries announce fallbacks of their own here; what matters to users is said by dsad.
    logging.getLogger("absl").setLevel(logging.ERROR)
    module = importlib.import_module(f"dsad.cli.{argv[0].replace('-', '_')}")
    _signals.command = _run.__code__
    return module.main(argv[1:])


def _unexpected(error: OSError) -> int:
    """Say what a disk, file or pipe answered where nobody knew better; returns the exit code."""
    from dsad.core import paths

    if isinstance(error, BrokenPipeError) and not error.filename:
        return 1  # whoever read the output has seen enough of it
    where = f"{error.filename}" if error.filename else "standard output"
    if paths.is_full(error):
        told = f"{where}: the disk or quota is full: {paths.cause(error)}. Free space there, or "
        print(f"error: {told}send the output elsewhere.", file=sys.stderr)
        return 3
    told = f"{where}: {error.strerror}" if error.filename else paths.cause(error)
    print(f"error: {told}. Mend that, then give the same command again.", file=sys.stderr)
    return 2


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "usage: dsad COMMAND [--flags]\n\n" + "\n".join(lines) + "\n\ndsad COMMAND --help"


#: Of this process, once ``entry`` has them; ``main`` alone leaves signals to its caller.
_signals = Signals("dsad")


def entry() -> None:
    """Console script."""
    _signals.catch()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        # Names of files need not be text, and terminals need not know our signs.
        getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:
        import traceback

        _end_with_others(1, traceback.format_exc())
        raise
    if stopped := code == StoppedError.code:
        code = _signals.code
    _signals.ended()
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _unexpected(error)
        # What could not be written is still in its buffer; at the exit it would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _end_with_others(code)
    if stopped:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> None:
    """End after an interrupt: the interpreter's own end crashes where it cut a compilation off."""
    import atexit

    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)


def _end_with_others(code: int, text: str = "") -> None:
    """Where this is one of several processes and failed, end it without waiting for them."""
    if code and "jax" in sys.modules:
        from dsad.core import distributed

        if distributed.started():
            print(text, end="", file=sys.stderr)
            distributed.leave(code)
