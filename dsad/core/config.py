"""Strict configuration: plain mappings to frozen dataclasses, and names to modules."""

import dataclasses
import difflib
import importlib
import pkgutil
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from dsad.core.errors import ConfigError

T = TypeVar("T")


def listed(names: Any) -> str:
    """Names as a readable list for an error message, numbers in their order: block2, block10."""
    return ", ".join(sorted((str(n) for n in names), key=_natural)) or "(none)"


def _natural(text: str) -> tuple[list[Any], str]:
    # Every second part is a number, so numbers meet numbers; 01 and 1 are told apart by the text.
    parts = re.split(r"(\d+)", text)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], text


def suggestion(name: str, known: Any) -> str:
    """A question for error messages when one of the known names is close, else nothing."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def build_dataclass(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Build the frozen dataclass ``cls`` from a mapping, refusing unknown keys and wrong types.

    Nested dataclasses are built from nested mappings, lists become tuples, integers are accepted
    for floats. ``where`` is the key path used in messages. Raises ConfigError.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ConfigError(
                f"{where}.{name}: unknown key.{suggestion(name, fields)} "
                f"{where} has: {listed(fields)}."
            )
    hints = typing.get_type_hints(cls)
    made = {}
    for name, field in fields.items():
        path = f"{where}.{name}"
        if name in values:
            made[name] = _convert(values[name], hints[name], path)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}: missing; expected {_type_name(hints[name])}.")
    try:
        return cls(**made)
    except ConfigError as error:  # a check across fields knows its keys, but not where it stands
        raise ConfigError(f"{where}: {error}") from error


def check_options(config: Any, where: str) -> None:
    """Refuse a dataclass one of whose ``Literal`` fields holds none of its options.

    For ``__post_init__``: ``build_dataclass`` checks what comes from files, not what code passes.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is typing.Literal:
            _convert(getattr(config, name), hint, f"{where}.{name}")


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _convert(value: Any, hint: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if dataclasses.is_dataclass(value) and isinstance(value, hint):
            return value
        items = getattr(value, "items", None)  # a ConfigDict is no Mapping
        if items is None:
            raise ConfigError(f"{path}: expected a group of keys, found {value!r}.")
        return build_dataclass(hint, dict(items()), path)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            options = ", ".join(repr(a) for a in typing.get_args(hint))
            raise ConfigError(f"{path}: expected one of {options}; found {value!r}.")
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, hint, path)
    if origin is tuple:
        return _convert_tuple(value, hint, path)
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        wrong_bool = isinstance(value, bool) and hint is not bool
        if wrong_bool or not isinstance(value, hint):
            raise ConfigError(
                f"{path}: expected {hint.__name__}, found {value!r} ({type(value).__name__})."
            )
    return value


def _convert_union(value: Any, hint: Any, path: str) -> Any:
    for option in typing.get_args(hint):
        if option is type(None):
            if value is None:
                return None
            continue
        try:
            return _convert(value, option, path)
        except ConfigError:
            continue
    raise ConfigError(f"{path}: expected {_type_name(hint)}, found {value!r}.")


def _convert_tuple(value: Any, hint: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        raise ConfigError(f"{path}: expected a tuple, found {value!r} ({type(value).__name__}).")
    args = typing.get_args(hint)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(v, args[0], f"{path}[{i}]") for i, v in enumerate(value))
    if len(args) != len(value):
        raise ConfigError(f"{path}: expected {len(args)} entries, found {len(value)}: {value!r}.")
    return tuple(
        _convert(v, a, f"{path}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True))
    )


def require(config: Any, group: str, example: str) -> Any:
    """The config itself, if it has the group of keys that the command is about."""
    if group not in config:
        raise ConfigError(
            f"config has no {group!r} (it has: {listed(config.keys())}); this command needs a "
            f"config such as {example}."
        )
    return config


def members(package: str) -> tuple[str, ...]:
    """Names of the modules of ``dsad.<package>`` that expose ``build``: the members of a seam."""
    found = importlib.import_module(f"dsad.{package}")
    names = (m.name for m in pkgutil.iter_modules(found.__path__) if not m.name.startswith("_"))
    return tuple(
        n for n in names if hasattr(importlib.import_module(f"dsad.{package}.{n}"), "build")
    )


def resolve(package: str, name: str) -> types.ModuleType:
    """The module ``dsad.<package>.<name>`` of a seam; an unknown name lists what exists."""
    known = members(package)
    if name not in known:
        raise ConfigError(
            f"no {package.rstrip('s')} named {name!r}.{suggestion(name, known)} "
            f"dsad.{package} has: {listed(known)}."
        )
    return importlib.import_module(f"dsad.{package}.{name}")


def as_dict(value: Any) -> dict[str, Any]:
    """A config dataclass as nested plain dicts; tuples stay tuples."""
    return {
        f.name: as_dict(v) if dataclasses.is_dataclass(v := getattr(value, f.name)) else v
        for f in dataclasses.fields(value)
    }
