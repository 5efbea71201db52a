"""Strict configuration: plain mappings to frozen dataclasses, and names to modules."""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import math
import operator
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, Unpack

from dsad.core.errors import ConfigError

T = TypeVar("T")


def listed(names: Any) -> str:
    """Names as a readable list for an error message, ``by_number``."""
    return ", ".join(by_number(names)) or "(none)"


def by_number(names: Any) -> list[str]:
    """Names sorted, numbers in their order: block2, block10."""
    return sorted((str(n) for n in names), key=_natural)


def _natural(text: str) -> tuple[list[Any], str]:
    # Every second part is a number, so numbers meet numbers; 01 and 1 are told apart by the text.
    parts = re.split(r"(\d+)", text)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], text


def suggestion(name: str, known: Any) -> str:
    """A question for error messages when one of the known names is close, else nothing."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def named(known: Mapping[str, T], name: str, what: str) -> T:
    """``known[name]``; an unknown name is refused with what exists."""
    if name not in known:
        raise ConfigError(
            f"no {what} named {name!r}.{suggestion(name, known)} Known: {listed(known)}."
        )
    return known[name]


class Refused(ConfigError):
    """A value that its key cannot take: the key, what it expects, the value, and what to do.

    ``Settings.check`` raises it with the key below the group; the group is put before it.
    """

    place = ""

    def __init__(self, key: str, expected: str, value: Any, advice: str = "") -> None:
        super().__init__(key, expected, value, advice)

    def __str__(self) -> str:
        key, expected, value, advice = self.args
        return f"{self.place}{key}: expected {expected}, found {value!r}. {advice}".rstrip()


class _Limit(NamedTuple):
    of_tuple: bool
    holds: Callable[[Any, Any], bool]
    words: str


_LIMITS = {
    "at_least": _Limit(False, operator.ge, ">= {:g}"),
    "above": _Limit(False, operator.gt, "> {:g}"),
    "at_most": _Limit(False, operator.le, "<= {:g}"),
    "below": _Limit(False, operator.lt, "< {:g}"),
    "within": _Limit(False, lambda v, ends: ends[0] <= v <= ends[1], "in [{0[0]:g}, {0[1]:g}]"),
    "odd": _Limit(False, lambda v, _: v % 2 == 1, "odd"),
    "rising": _Limit(True, lambda v, _: list(v) == sorted(v), "from low to high"),
    "distinct": _Limit(
        True, lambda v, _: len(set(v)) == len(v), "each once (a flag given twice adds up)"
    ),
    "filled": _Limit(True, lambda v, _: len(v) > 0, "at least one"),
}


_MISSING: Any = dataclasses.MISSING


class Limits(TypedDict, total=False):
    """What a field can declare beside its type; bounds hold for each number of a tuple."""

    at_least: float
    above: float
    at_most: float
    below: float
    #: Both ends are allowed.
    within: tuple[float, float]
    odd: Literal[True]
    #: Entries of a tuple, such as the two of an interval: none is less than the one before it.
    rising: Literal[True]
    distinct: Literal[True]
    #: At least one entry.
    filled: Literal[True]


def field(default: T = _MISSING, **limits: Unpack[Limits]) -> T:
    """A field of settings: its default, if any, and limits checked wherever a value is from.

    The length of a tuple, options (``Literal``) and None are part of the field's type; numbers are
    finite.
    """
    chosen = tuple((_LIMITS[name], bound) for name, bound in limits.items())
    return dataclasses.field(default=default, metadata={"limits": chosen})


@typing.dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,)
)
class Settings:
    """Base of configs: a subclass is a frozen, keyword-only dataclass of checked values.

    Types and limits of the fields are checked first, lists become tuples and integers floats where
    the type says so; ``check`` is for what concerns several fields. ``place`` stands before the key
    in messages about an object that code made; ``build_dataclass`` knows the whole path of a key.
    Raises Refused.
    """

    _place = ""

    def __init_subclass__(cls, *, place: str = "") -> None:
        cls._place = f"{place}." if place else cls._place
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        try:
            for name, value in _fitted_fields(type(self), vars(self), "").items():
                object.__setattr__(self, name, value)
            self.check()
        except Refused as fault:
            fault.place = fault.place or self._place
            raise

    def check(self) -> None:
        """Refuse values that do not go together; raises Refused."""


def build_dataclass(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Build the frozen dataclass ``cls`` from a mapping, refusing unknown keys and wrong values.

    Nested dataclasses are built from nested mappings. ``where`` is the key path used in messages.
    Raises ConfigError.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ConfigError(
                f"{where}.{name}: unknown key.{suggestion(name, fields)} "
                f"{where} has: {listed(fields)}."
            )
    for name, entry in fields.items():
        bare = entry.default is entry.default_factory is dataclasses.MISSING
        if bare and name not in values:
            raise ConfigError(f"{where}.{name}: missing; expected {expected(cls, name)}.")
    fitted = _fitted_fields(cls, values, f"{where}.")
    try:
        return cls(**fitted)
    except ConfigError as error:  # what checks the values does not know where they stand
        if isinstance(error, Refused) and error.place == getattr(cls, "_place", None):
            error.place = f"{where}."
            raise
        raise ConfigError(f"{where}: {error}") from error


_hints = functools.cache(typing.get_type_hints)


def _fitted_fields(cls: Any, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    limits = {f.name: f.metadata.get("limits", ()) for f in dataclasses.fields(cls)}
    return {
        name: _fitted(values[name], _hints(cls)[name], limits[name], f"{where}{name}")
        for name in limits
        if name in values
    }


def _fitted(value: Any, hint: Any, limits: Any, key: str) -> Any:
    """The value as its type says, a list as a tuple; Refused if it does not fit."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in options:
            with contextlib.suppress(Refused):
                return _fitted(value, option, limits, key)
    elif origin is tuple and isinstance(value, tuple | list):
        hints = options[:1] * len(value) if options[1:] == (...,) else options
        if len(value) == len(hints):
            pairs = enumerate(zip(value, hints, strict=True))
            value = tuple(_fitted(v, h, limits, f"{key}[{i}]") for i, (v, h) in pairs)
            if _kept(value, limits, of_tuple=True):
                return value
    elif hint is Any or (origin is Literal and value in options):
        return value
    elif hint in (int, float):
        number = isinstance(value, int | hint) and not isinstance(value, bool)
        if number and math.isfinite(value) and _kept(value, limits, of_tuple=False):
            return hint(value)
    elif dataclasses.is_dataclass(hint) and hasattr(value, "items"):  # a ConfigDict is no Mapping
        return build_dataclass(hint, dict(value.items()), key)  # type: ignore[arg-type]
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise Refused(key, _described(hint, limits), value)


def _kept(value: Any, limits: Any, *, of_tuple: bool) -> bool:
    return all(x.holds(value, bound) for x, bound in limits if x.of_tuple == of_tuple)


def expected(settings: Any, name: str) -> str:
    """What a key of a dataclass takes, in words."""
    limits = settings.__dataclass_fields__[name].metadata.get("limits", ())
    return _described(_hints(settings)[name], limits)


_NOUNS = {
    int: "an integer", float: "a finite number", bool: "True or False", str: "a string",
    type(None): "None",
}  # fmt: skip


def _described(hint: Any, limits: Any) -> str:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(option, limits) for option in options)
    if origin is Literal:
        return f"one of {', '.join(map(repr, options))}"
    noun = _NOUNS.get(hint, str(hint))
    if dataclasses.is_dataclass(hint):
        noun = "a group of keys"
    if hint not in (int, float) and origin is not tuple:
        return noun
    words = [x.words.format(b) for x, b in limits if origin is tuple or not x.of_tuple]
    return f"{noun} {', '.join(words)}".rstrip()


def require(config: Any, group: str, example: str) -> Any:
    """The config itself, if it has the group of keys that the command is about."""
    if group not in config:
        raise ConfigError(
            f"config has no {group!r} (it has: {listed(config.keys())}); this command needs a "
            f"config such as {example}."
        )
    return config


#: What a member of each seam exposes, besides its ``Config``.
ENTRY = {"objectives": "build", "detectors": "build", "data": "scan"}


def members(package: str) -> tuple[str, ...]:
    """Names of the modules of ``dsad.<package>`` that expose its ``ENTRY``: members of a seam."""
    found = importlib.import_module(f"dsad.{package}")
    names = (m.name for m in pkgutil.iter_modules(found.__path__) if not m.name.startswith("_"))
    return tuple(
        n for n in names if ENTRY[package] in vars(importlib.import_module(f"dsad.{package}.{n}"))
    )


def resolve(package: str, name: str) -> types.ModuleType:
    """The module ``dsad.<package>.<name>`` of a seam; an unknown name lists what exists.

    A name with dots is that of a module elsewhere, which has to be importable.
    """
    if "." in name:
        return _elsewhere(package, name)
    known = members(package)
    if name not in known:
        raise ConfigError(
            f"no {package.rstrip('s')} named {name!r}.{suggestion(name, known)} "
            f"dsad.{package} has: {listed(known)}."
        )
    return importlib.import_module(f"dsad.{package}.{name}")


def _elsewhere(package: str, name: str) -> types.ModuleType:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"no {package.rstrip('s')} module {name!r}: {error}. Is its folder on PYTHONPATH?"
        ) from error
    if missing := [n for n in ("Config", ENTRY[package]) if n not in vars(module)]:
        raise ConfigError(f"{name}: expected Config and {ENTRY[package]}, no {listed(missing)}.")
    return module


def as_dict(value: Any) -> dict[str, Any]:
    """A config dataclass as nested plain dicts; tuples stay tuples."""
    return {
        f.name: as_dict(v) if dataclasses.is_dataclass(v := getattr(value, f.name)) else v
        for f in dataclasses.fields(value)
    }


def tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were, also inside dicts."""
    if isinstance(value, dict):
        return {k: tuples(v) for k, v in value.items()}
    return tuple(tuples(v) for v in value) if isinstance(value, list) else value
