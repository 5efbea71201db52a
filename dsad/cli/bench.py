"""``dsad bench TOPIC``: speed and memory, measured side by side in one process.

One module of ``dsad.bench`` per topic, found by its name: it exposes ``main(argv) -> int`` and its
first docstring line says what it measures.
"""

import importlib
import pkgutil

from dsad import bench
from dsad.core.config import listed, suggestion
from dsad.core.errors import ConfigError


def topics() -> tuple[str, ...]:
    """Names of the modules of ``dsad.bench``."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(bench.__path__) if m.name[0] != "_"))


def main(argv: list[str]) -> int:
    """The command: the first argument that is no flag names the topic."""
    if not argv:
        print(usage())
        return 2
    if argv[0] in ("--help", "-h"):
        print(usage())
        raise SystemExit(0)
    name, *rest = argv
    if name not in topics():
        raise ConfigError(
            f"dsad bench: expected `dsad bench TOPIC`, found {name!r}.{suggestion(name, topics())} "
            f"Topics: {listed(topics())}."
        )
    return importlib.import_module(f"dsad.bench.{name}").main(rest)


def usage() -> str:
    """The topics, a line each."""
    lines = []
    for name in topics():
        text = importlib.import_module(f"dsad.bench.{name}").__doc__ or ""
        lines.append(f"  {name:<10} {text.strip().splitlines()[0].partition(': ')[2]}")
    return (
        "usage: dsad bench TOPIC [--flags]\n\n" + "\n".join(lines) + "\n\ndsad bench TOPIC --help"
    )
