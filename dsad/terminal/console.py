"""What people see while they wait."""

import contextlib
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.table import Table
from rich.text import Text

from dsad.core import distributed, types

#: Seconds between the lines that stand in for a bar when the output is not a terminal.
_QUIET_EVERY = 15.0
#: Cells of a bar.
_BAR = 8


class _Screen(Console):
    """Wraps text between words where a terminal would break it within one.

    Indented lines stay whole, so that commands can be pasted, and so do paths.
    """

    def print(self, *objects: Any, **how: Any) -> None:
        if self.is_terminal:
            objects = tuple(wrapped(x, self.width) if isinstance(x, str) else x for x in objects)
        super().print(*objects, **how)


def wrapped(text: str, width: int) -> str:
    """Lines of words at most so wide; indented ones and long words stay whole."""
    return "\n".join(
        line if line.startswith(" ") else textwrap.fill(
            line, width, break_long_words=False, break_on_hyphens=False
        )
        for line in text.split("\n")
    )  # fmt: skip


def console(width: int = 80) -> Console:
    """Standard output; tables are ``width`` wide at most when it is not a terminal.

    Of several processes only the first one talks. Text is shown as it is: names of categories,
    runs and files may hold what would be markup or an emoji's code.
    """
    return _Screen(
        width=None if sys.stdout.isatty() else width, highlight=False, soft_wrap=True,
        quiet=not distributed.is_main(), markup=False, emoji=False,
    )  # fmt: skip


def headed(title: str, text: str) -> Text:
    """Text behind a bold title."""
    return Text.assemble((title, "bold"), " ", text)


def table(*columns: str, whole: bool = False, **looks: Any) -> Table:
    """An empty table: a column of labels, with ``whole`` never wrapped, the others numbers."""
    made = Table(**looks)
    for number, column in enumerate(columns):
        justify = "right" if number else "left"
        made.add_column(column, justify=justify, no_wrap=whole and not number, overflow="fold")
    return made


@contextlib.contextmanager
def every(seconds: float, tell: Callable[[float], Any]) -> Iterator[None]:
    """Call ``tell`` again and again, with the seconds so far, from a thread, within the block."""
    start, stop = time.monotonic(), threading.Event()

    def run() -> None:
        while not stop.wait(seconds):
            tell(time.monotonic() - start)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _Task:
    """How far a task is, and how long the rest takes at its pace since the first part was done.

    What is done before that, such as compiling, says nothing of the pace.
    """

    def __init__(self, title: str) -> None:
        self.title, self.note = title, ""
        self.done = self.total = 0
        self._start, self._paced = time.monotonic(), (0, 0.0)
        self._first: int | None = None

    def update(self, done: int, total: int, note: str) -> None:
        if self._first is None:
            self._first = done
        if done > self._first and not self._paced[0]:
            self._paced = done, time.monotonic()
        self.done, self.total, self.note = done, total, note

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def left(self) -> float | None:
        """Seconds, None where nobody knows."""
        first, since = self._paced
        if not first or self.done <= first:
            return None
        return (time.monotonic() - since) / (self.done - first) * (self.total - self.done)

    def words(self) -> str:
        """For a log: everything there is to say."""
        rest = f", {self.left:.0f} s left" if self.left is not None else ""
        note = f" {self.note}" if self.note else ""
        return f"{self.title}: {self.done}/{self.total}{note} ({self.seconds:.0f} s{rest})"

    def line(self, width: int) -> str:
        """For one line of a terminal: of the note only what fits, numbers whole."""
        parts = [_cut(self.title, width // 3)]
        if self.total:
            filled = _BAR * self.done // self.total
            parts += ["━" * filled + "─" * (_BAR - filled), f"{self.done}/{self.total}"]
        known = self.left is not None
        parts.append(f"{_clock(self.left)} left" if known else _clock(self.seconds))
        head = "  ".join(parts)
        return head + _cut(f"  {self.note}", width - cell_len(head)).rstrip()


def _clock(seconds: float | None) -> str:
    minutes, rest = divmod(round(seconds or 0), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
    )


def _cut(text: str, width: int) -> str:
    """Text at most so wide, cut before a part that does not fit, or within the first one."""
    if cell_len(text) <= width:
        return text
    ends = [m.start() for m in re.finditer(r"(?<=\S)(, |  )", text)]
    if fitting := [end for end in ends if cell_len(text[:end]) <= width]:
        return text[: fitting[-1]]
    return set_cell_size(text, max(width - 1, 0)).rstrip("0123456789.") + "…"


class _Bar(ProgressColumn):
    """A task as one line, as wide as the terminal."""

    def __init__(self, task: _Task, out: Console) -> None:
        super().__init__()
        self._shown, self._out = task, out

    def render(self, task: Any) -> Text:
        del task
        return Text(self._shown.line(self._out.width), no_wrap=True)


@contextlib.contextmanager
def progress(title: str, out: Console) -> Iterator[types.Progress]:
    """One line that changes; outside a terminal the first and last report, and one now and then."""
    task, last = _Task(title), float("-inf")

    def say() -> None:
        nonlocal last
        out.print(task.words())
        last = time.monotonic()

    def tell(done: int, total: int, note: str) -> None:
        before = task.done
        task.update(done, total, note)
        if not out.is_terminal and (
            time.monotonic() - last >= _QUIET_EVERY or before < done == total
        ):
            say()

    with contextlib.ExitStack() as stack:
        if out.is_terminal:
            bar = stack.enter_context(Progress(_Bar(task, out), console=out))
            bar.add_task("")
        yield tell


def training_note(
    out: Callable[[int, int, str], Any],
) -> Callable[[int, int, dict[str, float]], None]:
    """Adapter from the loop's ``on_log`` to a progress bar."""

    def on_log(step: int, total: int, row: dict[str, float]) -> None:
        spread = f"  std {row['feature_std']:.2f}" if "feature_std" in row else ""
        out(step, total, f"loss {row['loss']:.3f}{spread}{_speed(row)}" if "loss" in row else "")

    return on_log


def probe_line(step: int, row: dict[str, float]) -> str:
    """What a line of metrics says of the probe, and of the loss where it has one."""
    names = {
        "loss": "loss", "probe_aupro": "probe AUPRO", "probe_pixel_auroc": "pixel AUROC",
        "probe_image_auroc": "image AUROC",
    }  # fmt: skip
    numbers = [f"{said} {row[name]:.3f}" for name, said in names.items() if name in row]
    return f"step {step}: {', '.join(numbers)}"


def _speed(row: dict[str, float]) -> str:
    """What the numbers of a line say of speed; the first line of a run has none."""
    if "images_per_s" not in row:
        return ""
    share = row["input_wait_ms"] / max(row["step_ms"], 1e-9)
    used = f"  MFU {row['mfu']:.0%}" if "mfu" in row else ""
    return f"  {row['images_per_s']:.0f} images/s{used}  input {share:.0%}"
