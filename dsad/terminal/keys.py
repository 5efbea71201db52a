"""The keys of a config: what each is for, and which one was meant."""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_collections

from dsad.core.config import expected, listed


class Key(NamedTuple):
    """A key with its dotted ``path``, or a group of keys, which only has a meaning."""

    path: str
    about: str
    value: Any = None
    default: Any = None
    expected: str = ""


def meanings(settings: type) -> dict[str, str]:
    """What the keys of a class of settings are for: the "Attributes" of its docstring.

    Those of its bases are part of it. An entry "a, b: text" is one of both.
    """
    entries: dict[str, str] = {}
    for base in reversed(settings.__mro__):
        names: list[str] = []
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")
        for line in section.splitlines():
            head = re.match(r"  (\w[\w, ]*): (.*)", line)
            if head:
                names = head[1].split(", ")
            elif line and not line.startswith("    "):
                break
            for name in names if line else ():
                text = head[2] if head else f"{entries[name]} {line.strip()}"
                entries[name] = text.replace("``", "")
    return entries


def walk(settings: Any, default: Any, where: str) -> Iterator[Key]:
    """All keys of an object of settings, each group before its keys; ``default`` is another one."""
    yield Key(where, (type(settings).__doc__ or "").partition("\n")[0].replace("``", ""))
    about = meanings(type(settings))
    names = [f.name for f in dataclasses.fields(settings)]
    # Keys first: a group would part them from their own.
    for name in sorted(names, key=lambda n: dataclasses.is_dataclass(getattr(settings, n))):
        value, usual = getattr(settings, name), getattr(default, name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, usual, f"{where}.{name}")
        else:
            kind = expected(type(settings), name)
            yield Key(f"{where}.{name}", about.get(name, ""), value, usual, kind)


def fault(config: ml_collections.ConfigDict, path: str, prefix: str = "") -> str:
    """That a dotted path is no key of a config and what may be meant, or "".

    ``prefix`` stands before the paths that are named.
    """
    node: Any = config
    where = "config"
    for part in path.split("."):
        have = node.keys() if isinstance(node, ml_collections.ConfigDict) else ()
        if part not in have:
            hint = question(path, config, prefix)
            return f"{where}.{part}: unknown key.{hint} {where} has: {listed(have)}."
        node, where = node[part], f"{where}.{part}"
    return ""


def question(path: str, config: ml_collections.ConfigDict, prefix: str = "") -> str:
    """Asks whether another key is meant, where one is like it: of its name, or spelled alike."""
    paths = list(_leaves(config))
    group, _, name = path.rpartition(".")
    beside = [p for p in paths if p.rpartition(".")[0] == group]
    near = [p for p in paths if _name(p) == name] + _alike(name, beside)
    near = list(dict.fromkeys(near or _alike(name, paths)))
    near.sort(key=lambda p: -difflib.SequenceMatcher(None, path, p).ratio())
    return f" Did you mean {' or '.join(prefix + p for p in near[:3])}?" if near else ""


def _leaves(config: ml_collections.ConfigDict) -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from (f"{name}.{path}" for path in _leaves(value))
        else:
            yield name


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _alike(name: str, paths: list[str]) -> list[str]:
    close = difflib.get_close_matches(name, list(dict.fromkeys(map(_name, paths))), n=1)
    return [p for p in paths if _name(p) in close]
