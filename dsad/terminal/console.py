"""What people see while they wait."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dsad.core import distributed, types

#: Seconds between the lines that stand in for a bar when the output is not a terminal.
_QUIET_EVERY = 15.0


def console(width: int = 120) -> Console:
    """Standard output; ``width`` wide, never to cut paths, when it is not a terminal.

    Of several processes only the first one talks. Text is shown as it is: names of categories,
    runs and files may hold what would be markup or an emoji's code.
    """
    return Console(
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
        made.add_column(column, justify="right" if number else "left", no_wrap=whole and not number)
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


@contextlib.contextmanager
def progress(title: str, out: Console) -> Iterator[types.Progress]:
    """A progress bar; outside a terminal a line now and then."""
    if not out.is_terminal:
        yield _lines(title, out)
        return
    columns = (
        TextColumn("{task.description}", style="bold", markup=False), BarColumn(),
        MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=out) as bar:
        task = bar.add_task(title, total=None, note="")
        yield lambda done, total, note: bar.update(task, completed=done, total=total, note=note)


def _lines(title: str, out: Console) -> types.Progress:
    start = last = time.monotonic()

    def report(done: int, total: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _QUIET_EVERY and done < total:
            return
        left = (now - start) / max(done, 1) * (total - done)
        out.print(f"{title}: {done}/{total} {note} ({now - start:.0f} s, {left:.0f} s left)")
        last = now

    return report


def training_note(
    out: Callable[[int, int, str], Any],
) -> Callable[[int, int, dict[str, float]], None]:
    """Adapter from the loop's ``on_log`` to a progress bar."""

    def on_log(step: int, total: int, row: dict[str, float]) -> None:
        spread = f"  std {row['feature_std']:.2f}" if "feature_std" in row else ""
        out(step, total, f"loss {row['loss']:.3f}{spread}{_speed(row)}")

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
