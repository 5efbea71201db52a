"""Compiling a program and keeping what is worth knowing of the result, once per program."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

import dsad
from dsad.core import paths
from dsad.core.errors import ConfigError
from dsad.plan import hlo, hlo_cost
from dsad.terminal import console

Effort = Literal["fast", "full"]
#: What the compilers take for "finish soon", as jax 0.10 spells it and as later versions do. On
#: few cores a third of the time, with the same memory and FLOPs where both were tried.
OPTIONS: dict[Effort, tuple[dict[str, Any], ...]] = {
    "fast": (
        {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0},
        {"optimization_level": "O1", "memory_fitting_level": "O1"},
    ),
    "full": ({},),
}
#: Below so many cores "fast" is the default.
FEW_CORES = 16
#: Seconds between two signs of life where the output is no terminal.
EVERY = 15.0
#: Counts up when the content of a stored result changes its meaning.
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a compiler says of a program, per device; sizes in bytes.

    Attributes:
      arguments: the weights or state, the inputs and the data that live on the device.
      outputs, alias: results, and the part of them that takes the place of donated arguments.
      temporaries: everything in between, at its fullest.
      code: the program itself.
      peak: the compiler's own figure for all of it at the fullest moment; 0 where it gives none.
      refused: the compiler's words where the program does not fit and was not made; then all other
        figures are 0 but ``peak``, what it would have needed, if that was said.
      flops, bf16_flops, bytes: see ``hlo_cost.Cost``.
      xla_flops, xla_bytes: of ``cost_analysis``, which counts bodies of loops once.
      collectives: rows of ``hlo.summary`` with the bytes of one result, largest traffic first.
      messages: the partitioner's warnings.
      seconds: of compilation.

    """

    arguments: int = 0
    outputs: int = 0
    alias: int = 0
    temporaries: int = 0
    code: int = 0
    peak: int = 0
    refused: str = ""
    flops: float = 0.0
    bf16_flops: float = 0.0
    bytes: float = 0.0
    xla_flops: float = 0.0
    xla_bytes: float = 0.0
    collectives: tuple[dict[str, Any], ...] = ()
    messages: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """Memory that the program needs: the sum, because temporaries are taken as one block.

        The peak of what lives at once may be below it, and on CPUs leaves the temporaries out.
        """
        whole = self.arguments + self.outputs - self.alias + self.temporaries + self.code
        return self.peak if self.refused else max(self.peak, whole)


def compiled(
    lower: Callable[[], jax.stages.Lowered],
    mesh: Mesh,
    effort: Effort,
    out: Console,
    cache: epath.Path | None,
    about: str,
) -> tuple[Program, bool]:
    """What ``lower`` gives, compiled, and whether an earlier run had compiled it.

    ``about`` names the devices: the same text for another chip is another program.
    """
    with waiting(out, "tracing"):
        lowered = lower()
        text = lowered.as_text()
    file = cache / f"{_key(text, effort, mesh, about)}.json" if cache else None
    if file and (found := _stored(file)):
        return found, True
    with waiting(out, f"compiling for {about} ({effort})"):
        program = _compile(lowered, effort)
    if file:
        _store(file, program)
    return program, False


def _compile(lowered: jax.stages.Lowered, effort: Effort) -> Program:
    start = time.monotonic()
    with captured_stderr() as log:
        try:
            made = _made(lowered, effort)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise ConfigError(f"the compiler refuses the program: {error}") from error
            return Program(
                refused=str(error).strip().splitlines()[0], peak=needed(str(error)),
                seconds=time.monotonic() - start,
            )  # fmt: skip
    seconds = time.monotonic() - start
    text, memory, analysis = made.as_text() or "", made.memory_analysis(), made.cost_analysis()
    own = analysis if isinstance(analysis, dict) else {}
    if memory is None:
        raise ConfigError("this version of jax states no memory figures for these devices.")
    return Program(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        alias=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        peak=int(getattr(memory, "peak_memory_in_bytes", 0) or 0),
        **dataclasses.asdict(hlo_cost.cost(text)),
        xla_flops=float(own.get("flops", 0.0)),
        xla_bytes=float(own.get("bytes accessed", 0.0)),
        collectives=tuple(_collectives(text)),
        messages=tuple(partitioner_messages(log.text)),
        seconds=seconds,
    )


def _made(lowered: jax.stages.Lowered, effort: Effort) -> jax.stages.Compiled:
    *earlier, last = OPTIONS[effort]
    for options in earlier:
        try:
            return lowered.compile(compiler_options=dict(options))
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
    return lowered.compile(compiler_options=dict(last))


def _collectives(text: str) -> list[dict[str, Any]]:
    """One row for equal ones; ``sent`` are the bytes of all its executions that a device sends."""
    found = hlo.collectives(text)
    size = {(c.kind, ", ".join(c.shapes), c.group_size): c.result_bytes for c in found}
    names = ("kind", "shapes", "group_size", "count", "sent", "result_bytes")
    return [dict(zip(names, (*r, size[r[:3]]), strict=True)) for r in hlo.summary(found)]


def needed(message: str) -> int:
    """Bytes that a program would need, from the words with which a compiler refuses it.

    0 if it does not say. Sizes are given as in "Used 25.9G of 15.75G hbm", G meaning 2³⁰.
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    pattern = (
        r"(?:Used|memory required for HLO temporaries \()\s*([\d.]+)([KMGT])\w*\)?\s*"
        r"(?:of|exceeds)|Total \w+ usage >= ([\d.]+)([KMGT])"
    )
    found = re.findall(pattern, message)
    return max((int(float(a or b) * units[u or v]) for a, u, b, v in found), default=0)


def partitioner_messages(log: str) -> list[str]:
    """The partitioner's reports of arrays that it copies whole to every device, each once."""
    found = []
    for line in log.splitlines():
        if "nvoluntary full rematerialization" not in line:
            continue
        array = re.search(r"for HLO operation %?([\w.\-]+) = (\w+\[[\d,]*\])", line)
        where = re.search(r'op_name="([^"]*)"', line)
        shapes = re.search(r"from sharding (\{.*?\}) to (\{.*?\}) efficiently", line)
        parts = [array.group(2) if array else "an array"]
        if where:
            parts.append(f"at {where.group(1)}")
        if shapes:
            parts.append(f"from {shapes.group(1)} to {shapes.group(2)}")
        found.append(" ".join(parts))
    return list(dict.fromkeys(found))


class Captured:
    """What was written to standard error within ``captured_stderr``."""

    text = ""


@contextlib.contextmanager
def captured_stderr() -> Iterator[Captured]:
    """Standard error of this process, also of its C++ libraries, kept instead of shown.

    Shown after all where the block raises something other than a refusal it handles itself.
    """
    captured = Captured()
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield captured
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            captured.text = file.read().decode(errors="replace")


@contextlib.contextmanager
def waiting(out: Console, what: str) -> Iterator[None]:
    """Signs of life with the seconds so far, while a call gives none."""
    if out.is_terminal:
        with (
            out.status(what) as status,
            console.every(1.0, lambda s: status.update(f"{what}: {s:.0f} s")),
        ):
            yield
        return
    with console.every(EVERY, lambda s: out.print(f"{what}: {s:.0f} s")):
        yield


def default_cache() -> str:
    """The user's folder for results."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dsad", "plan")


def _key(text: str, effort: Effort, mesh: Mesh, about: str) -> str:
    order = [d.id for d in mesh.devices.flat]
    flags = [os.environ.get(n, "") for n in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    parts = (_FORMAT, text, OPTIONS[effort], about, order, _versions(), flags)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _versions() -> list[str]:
    found = [dsad.__version__]
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found.append(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            found.append("")
    return found


def _stored(file: epath.Path) -> Program | None:
    """A stored result; one that cannot be read counts as none and is replaced."""
    try:
        values = json.loads(file.read_text())
        values["collectives"] = tuple(values["collectives"])
        return Program(**{**values, "messages": tuple(values["messages"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _store(file: epath.Path, program: Program) -> None:
    text = json.dumps(dataclasses.asdict(program))
    paths.write_whole(file, text, "Give another --cache=DIR, or --cache=off.")
