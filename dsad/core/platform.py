"""The platform that programs are traced for: the one at hand, or one that is only planned for."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_planned: contextvars.ContextVar[str] = contextvars.ContextVar("planned", default="")


def platform() -> str:
    """One of "cpu", "gpu" and "tpu", for code that is written differently for each.

    Unlike ``jax.default_backend()`` it can be told of hardware that is not there.
    """
    return _planned.get() or jax.default_backend()


@contextlib.contextmanager
def planned_for(name: str) -> Iterator[None]:
    """Within it, ``platform()`` is ``name``; trace inside, with functions not traced before."""
    token = _planned.set(name)
    try:
        yield
    finally:
        _planned.reset(token)
