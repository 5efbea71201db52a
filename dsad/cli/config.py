"""``dsad config FILE[:VARIANT] [WORD...]``: the keys of a config, what they hold and mean."""

import textwrap
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from dsad.assembly import comparison, evaluate, label_probe, pretrain
from dsad.cli.check_data import data_config
from dsad.core.config import listed, members
from dsad.core.errors import ConfigError
from dsad.terminal import console, flags, keys

_WIDTH = 80


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command(
        "config", "FILE[:VARIANT] [WORD...]: every key, its value, type and meaning; with words "
        "only the keys that hold them.", config="configs/ds2.py", positional=True,
    )  # fmt: skip
    if argv and not argv[0].startswith("-"):
        argv = [f"--config={argv[0]}", *argv[1:]]
    elif not any(a.startswith(("--config=", "-h", "--help")) for a in argv):
        raise ConfigError(
            f"dsad config: expected a config file; shipped with dsad: "
            f"{listed(flags.shipped_configs())}."
        )
    config, _, words = command.parse(argv)
    entries = list(_entries(config, "config"))
    shown = [k for k in entries if all(word in k.path for word in words)]
    if not any(k.expected for k in shown):
        hint = keys.question(".".join(words), config)
        raise ConfigError(f"dsad config: no key holds {' and '.join(map(repr, words))}.{hint}")
    out = console.console(_WIDTH)
    for key in shown:
        out.print(_text(key))
    return 0


def _entries(config: Any, where: str) -> Iterator[keys.Key]:
    """The keys of a config of any command."""
    if "pretrain" in config:  # one for each stage
        for stage in config:
            yield from _entries(config[stage], f"{where}.{stage}")
    elif "objective" in config:
        run, _, method = pretrain.parse(config)
        yield from keys.walk(run, type(run)(), where)
        yield from _method(config.objective.name, method, "objectives", f"{where}.objective")
    elif "detector" in config:
        whole, detector = evaluate.parse(config)
        yield from keys.walk(whole, type(whole)(), where)
        method = detector.config
        yield from _method(config.detector.name, method, "detectors", f"{where}.detector")
    elif comparison.is_meant(config):
        yield from _compared(config, where)
    elif label_probe.is_meant(config):
        probe = label_probe.parse(config)
        yield from keys.walk(probe, type(probe)(), where)
    else:
        data = data_config(config)
        yield from keys.walk(data, type(data)(), f"{where}.data")


def _compared(config: Any, where: str) -> Iterator[keys.Key]:
    """The keys of a comparison: its own, and those of its rows and data sets by name."""
    plan = comparison.parse(config)
    yield from keys.walk(plan.config, type(plan.config)(), where)
    for name, network in plan.backbones.items():
        place = f"{where}.backbones.{name}"
        if isinstance(config.backbones[name], str):
            about = "a backbone by its spec alone; a group has spec, weights and layers."
            yield keys.Key(place, about, network.spec, network.spec, "a string")
        else:
            yield from keys.walk(network, type(network)(spec=network.spec), place)
    for name, data in plan.datasets.items():
        yield from keys.walk(data, type(data)(), f"{where}.datasets.{name}")
    for detector, own in plan.settings.items():
        for key, value in own.items():
            about = f"a key of {detector}, see dsad config configs/{detector}.py."
            kind = f"as of {type(value).__name__}"
            yield keys.Key(f"{where}.settings.{detector}.{key}", about, value, value, kind)


def _method(name: str, settings: Any, seam: str, where: str) -> Iterator[keys.Key]:
    group, *entries = keys.walk(settings, type(settings)(), where)
    about = "the method, whose keys the others here are; choose it by the config file."
    kind = f"one of {', '.join(map(repr, members(seam)))}"
    yield from (group, keys.Key(f"{where}.name", about, name, name, kind), *entries)


def _text(key: keys.Key) -> Text:
    """A key with its meaning below it, a group with it beside."""
    if not key.expected:
        return Text(textwrap.fill(f"{key.path}: {key.about}", _WIDTH), "bold")
    usual = "" if key.value == key.default else f"; default {key.default!r}"
    head = f"  {key.path} = {key.value!r}"
    kind = f"[{key.expected}{usual}]"
    lines, styles = [f"{head}  {kind}"], ["cyan"]
    if len(lines[0]) > _WIDTH:
        heads, kinds = (textwrap.wrap(x.strip(), _WIDTH - 6) for x in (head, kind))
        lines = [f"  {heads[0]}", *heads[1:], *kinds]
        styles = ["cyan"] * len(heads) + ["dim"] * len(kinds)
    text = Text("\n      ").join(Text(x, s) for x, s in zip(lines, styles, strict=True))
    about = textwrap.fill(key.about, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return Text.assemble(text, "\n", about)
