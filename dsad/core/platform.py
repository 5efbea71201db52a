"""The platform that programs are traced for: the one at hand, or one that is only planned for."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax

#: Share of the memory that is free now which large arrays may take.
SPARED = 0.8

_planned: contextvars.ContextVar[str] = contextvars.ContextVar("planned", default="")


def platform() -> str:
    """One of "cpu", "gpu" and "tpu", for code that is written differently for each.

    Unlike ``jax.default_backend()`` it can be told of hardware that is not there.
    """
    return _planned.get() or jax.default_backend()


@functools.cache
def has_matrix_units() -> bool:
    """Whether this machine's CPU multiplies bfloat16 matrices in units of their own (AMX)."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return any("amx_bf16" in line.split() for line in file if line.startswith("flags"))
    except OSError:
        return False


def free_memory() -> int | None:
    """Bytes of this machine's memory that large arrays may take; None where nobody tells."""
    try:
        with open("/proc/meminfo", encoding="ascii", errors="replace") as file:
            known = [line.split()[1] for line in file if line.startswith("MemAvailable:")]
    except OSError:
        return None
    return int(SPARED * 1024 * int(known[0])) if known else None


@contextlib.contextmanager
def planned_for(name: str) -> Iterator[None]:
    """Within it, ``platform()`` is ``name``; trace inside, with functions not traced before."""
    token = _planned.set(name)
    try:
        yield
    finally:
        _planned.reset(token)
