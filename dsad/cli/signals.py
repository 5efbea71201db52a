"""What Ctrl-C and SIGTERM do to a command: KeyboardInterrupt, where it is sure to be seen."""

import _thread
import os
import signal
import sys
import threading
from types import CodeType, FrameType
from typing import Any

#: Seconds after which an interrupt that came at a bad moment is tried again.
_AGAIN = 0.05
_IMPORTS = "<frozen importlib._bootstrap>"


class Signals:
    """From ``catch`` until ``ended``; ``code`` is 128 plus the number of the last signal.

    Until there is a ``command`` a signal ends the process at once, as nothing is lost then. Within
    that function it raises KeyboardInterrupt, but neither within an import, where libraries turn it
    into errors of their own, nor for good within a destructor, where Python would only print it.
    When the function is left its outcome stands.
    """

    def __init__(self, name: str) -> None:
        self.name, self.code = name, 128 + signal.SIGINT
        self.command: CodeType | None = None

    def catch(self) -> None:
        """Take the signals, but those that the parent process wants ignored."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._act)
        sys.unraisablehook = self._unraisable

    def ended(self) -> None:
        """From now on a signal only cuts short how the interpreter ends."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    def _act(self, number: int, frame: FrameType | None) -> None:
        self.code = 128 + number
        if not self.command:
            os.write(2, f"\n{self.name}: stopped\n".encode())
            os._exit(self.code)
        within = False
        while frame:
            if frame.f_code.co_filename == _IMPORTS:
                return _again(number)
            within |= frame.f_code is self.command
            frame = frame.f_back
        if within:
            raise KeyboardInterrupt

    def _unraisable(self, told: Any) -> None:
        if issubclass(told.exc_type, KeyboardInterrupt):
            _again(self.code - 128)
        else:
            sys.__unraisablehook__(told)


def _again(number: int) -> None:
    timer = threading.Timer(_AGAIN, _thread.interrupt_main, (number,))
    timer.daemon = True
    timer.start()
