"""What messages and constants of the core promise to all packages."""

import dataclasses
import math
import pickle
import random
import re
from typing import Literal

import pytest

from dsad.augment import views
from dsad.core.config import Refused, Settings, as_dict, build_dataclass, field, listed
from dsad.core.errors import ConfigError
from dsad.models import family
from tests.helpers import ROOT


def test_the_statistics_of_imagenet_stand_in_one_place():
    assert views.ViewConfig().mean == views.IMAGENET_MEAN == family.Preprocessing().mean
    assert views.ViewConfig().std == views.IMAGENET_STD == family.Preprocessing().std
    sources = (p for p in (ROOT / "dsad").rglob("*.py") if "0.485, 0.456" in p.read_text())
    assert [p.name for p in sources] == ["pixels.py"]


def test_lists_in_messages_have_numbers_in_their_order():
    want = ["7z", "Layer2", "block0", "block02", "block2", "block2.5", "block10", "blocks", "x"]
    mixed = random.Random(0).sample(want, len(want))
    assert listed(mixed) == ", ".join(want)
    assert listed(["b10a2", "b10a10", "b9", 3]) == "3, b9, b10a2, b10a10"
    assert listed(["", "²", "1"]) == ", 1, ²"
    assert listed([]) == "(none)"


class Inner(Settings, place="inner"):
    count: int = field(3, at_least=1, odd=True)
    rate: float = field(0.5, above=0, below=1)
    share: float = field(0.5, within=(0, 1))
    most: float = field(0.0, at_most=2)
    free: float = 0.0
    area: tuple[float, float] = field((0.1, 1.0), above=0, at_most=1, rising=True)
    rgb: tuple[float, float, float] = (0.5, 0.5, 0.5)
    layers: tuple[str, ...] = field(("a",), distinct=True, filled=True)
    rows: tuple[tuple[str, float], ...] = ()
    kind: Literal["full", "half"] = "full"
    limit: int | None = field(None, at_least=2)
    on: bool = False

    def check(self) -> None:
        if self.kind == "half" and self.on:
            raise Refused("on", "False with kind='half'", self.on, "Set kind='full'.")


class Outer(Settings, place="outer"):
    name: str
    first: Inner = Inner()
    second: Inner = Inner(count=5)


GOOD = [
    *(("count", v, v) for v in (1, 9)),
    *(("rate", v, v) for v in (1e-9, 0.999)),
    *(("share", v, v) for v in (0.0, 1.0)),
    *(("most", v, v) for v in (-1e9, 2.0)),
    ("free", 3, 3.0),
    ("area", [0.5, 0.5], (0.5, 0.5)),
    ("area", (1e-3, 1), (1e-3, 1.0)),
    ("layers", ["b", "a"], ("b", "a")),
    ("rows", [["a", 1], ("b", 2.5)], (("a", 1.0), ("b", 2.5))),
    ("kind", "half", "half"),
    ("limit", None, None),
    ("limit", 2, 2),
    ("on", True, True),
]
BAD = [
    *(("count", "count", v, "an integer >= 1, odd") for v in (0, 2, -1, True, 3.0, "3", None)),
    *(("rate", "rate", v, "a finite number > 0, < 1") for v in (0, 1, math.nan, True, "0.5")),
    *(("share", "share", v, "a finite number in [0, 1]") for v in (-0.1, 1.1, math.inf, math.nan)),
    ("most", "most", 2.1, "a finite number <= 2"),
    *(("free", "free", v, "a finite number") for v in (math.nan, math.inf, -math.inf, False)),
    *(
        ("area", "area", v, "tuple[float, float] > 0, <= 1, from low to high")
        for v in ((0.9, 0.1), (0.1,), (0.1, 0.2, 0.3), 0.5, "ab")
    ),
    ("area", "area[0]", (0, 1), "a finite number > 0, <= 1"),
    ("area", "area[1]", [0.5, math.inf], "a finite number > 0, <= 1"),
    ("rgb", "rgb", (0.5, 0.5), "tuple[float, float, float]"),
    ("rgb", "rgb[2]", (0.5, 0.5, "x"), "a finite number"),
    *(
        ("layers", "layers", v, "tuple[str, ...] each once (a flag given twice adds up), at least")
        for v in ((), ("a", "b", "a"), "a")
    ),
    ("layers", "layers[1]", ("a", 2), "a string"),
    ("rows", "rows[1][1]", (("a", 1), ("b", "c")), "a finite number"),
    *(("kind", "kind", v, "one of 'full', 'half'") for v in ("ful", 1, None)),
    *(("limit", "limit", v, "an integer >= 2 or None") for v in (1, True, "None", 2.5)),
    *(("on", "on", v, "True or False") for v in (1, "True", None)),
]


def faulty(value, key):
    for index in map(int, re.findall(r"\d+", key)):
        value = value[index]
    return value


@pytest.mark.parametrize(("name", "value", "want"), GOOD)
def test_values_within_their_limits(name, value, want):
    for held in (Inner(**{name: value}), build_dataclass(Inner, {name: value})):
        assert getattr(held, name) == want
        assert type(getattr(held, name)) is type(want)


@pytest.mark.parametrize(("name", "key", "value", "expected"), BAD)
def test_values_beyond_their_limits(name, key, value, expected):
    found = repr(faulty(value, key))

    def message(place):
        return rf"^{re.escape(place + key)}: expected {re.escape(expected)}.*, found .*\.$"

    with pytest.raises(ConfigError, match=message("inner.")) as error:
        Inner(**{name: value})
    assert str(error.value).endswith(f"found {found}.")
    with pytest.raises(ConfigError, match=message("inner.")):
        dataclasses.replace(Inner(), **{name: value})
    with pytest.raises(ConfigError, match=message("config.outer.second.")) as error:
        build_dataclass(Outer, {"name": "x", "second": {name: value}}, "config.outer")
    assert str(error.value).endswith(f"found {found}.")


def test_checks_of_several_fields_know_their_place():
    told = "on: expected False with kind='half', found True. Set kind='full'."
    bad = {"kind": "half", "on": True}
    with pytest.raises(ConfigError, match=f"^{re.escape(f'inner.{told}')}$") as error:
        Inner(**bad)
    assert str(pickle.loads(pickle.dumps(error.value))) == f"inner.{told}"
    with pytest.raises(ConfigError, match=f"^{re.escape(f'config.first.{told}')}$"):
        build_dataclass(Outer, {"name": "x", "first": bad})


def test_keys_of_nested_settings():
    held = build_dataclass(Outer, {"name": "x", "first": {"count": 7}})
    assert held == Outer(name="x", first=Inner(count=7))
    assert hash(held) == hash(Outer(name="x", first=Inner(count=7)))
    assert build_dataclass(Outer, as_dict(held)) == held
    for values, message in (
        ({}, "config.name: missing; expected a string."),
        ({"name": "x", "first": 3}, "config.first: expected a group of keys, found 3."),
        ({"name": "x", "first": {"cont": 1}}, "config.first.cont: unknown key. Did you mean 'co"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            build_dataclass(Outer, values)
    with pytest.raises(ConfigError, match=r"outer\.first: expected a group of keys, found None"):
        Outer(name="x", first=None)


def test_limits_that_do_not_exist():
    with pytest.raises(KeyError, match="at_leest"):
        field(3, at_leest=1)


def test_a_limited_field_without_default():
    class Sized(Settings, place="sized"):
        size: int = field(at_least=1)

    with pytest.raises(ConfigError, match=r"^config\.size: missing; expected an integer >= 1\.$"):
        build_dataclass(Sized, {})
    with pytest.raises(TypeError, match="size"):
        Sized()
    with pytest.raises(ConfigError, match=r"^sized\.size: expected an integer >= 1, found 0\.$"):
        Sized(size=0)
