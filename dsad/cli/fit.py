"""``dsad fit``: good pictures to a model that ``dsad predict`` and ``dsad evaluate`` take."""

import shlex

from dsad.assembly import evaluate
from dsad.assembly.fit import FALSE_ALARM_RATE, fit
from dsad.assembly.saving import Writer
from dsad.core.config import require
from dsad.core.errors import ConfigError
from dsad.data.base import read_as
from dsad.evaluation import thresholds
from dsad.evaluation.support import validation
from dsad.terminal import console, flags

_RATE = "--config.evaluation.false_alarm_rate"


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command(
        "fit", "fit a detector to good pictures, and set its thresholds. For example\n"
        "  dsad fit --config.data.name=folder --config.data.root=GOOD \\\n"
        "    --config.weights=imagenet --out=MODEL",
        config="configs/patchcore.py",
    )  # fmt: skip
    command.string("out", "", "Directory that takes the model.")
    command.switch("overwrite", "Replace the model in --out.")
    config, values, _ = command.parse(argv)
    if not values.out:
        raise ConfigError("dsad fit: --out=DIR is missing; it takes the model.")
    require(config, "detector", "configs/patchcore.py")
    if not config.evaluation.false_alarm_rate and not any(a.startswith(_RATE) for a in argv):
        config.evaluation.false_alarm_rate = FALSE_ALARM_RATE
    out = console.console(80)
    writer = Writer(values.out, overwrite=values.overwrite)
    parts = evaluate.prepare(config, out, measured=False)
    with read_as(parts.config.data), console.progress("fitting", out) as tell:
        results = fit(parts, writer, tell)
    for category, by_seed in parts.sets.by_category.items():
        (support,) = by_seed.values()
        tested = sum(not r.label for r in parts.dataset.source("test", category).records)
        left = f", {tested} left for tests" if tested and config.data.name == "folder" else ""
        held = f"; a second fit without {len(support.held_out)} set the threshold"
        if parts.sets.validated:
            count = len(validation(parts.dataset, category))
            held = f"; {count} validation images set the threshold"
        good, bad = len(support.bank) - len(support.anomalous), len(support.anomalous)
        out.print(
            f"{category}: fitted on {good} good pictures{f' and {bad} bad ones' if bad else ''}"
            f"{left}{held if support.held_out or parts.sets.validated else ''}"
        )
        for row in results.thresholds.get(category, {}).values():
            at = thresholds.at_rate(row)
            out.print(f"{category}: threshold {row['image']:.4g}, false alarms at most {at}")
    out.print(f"written: {writer.directory}")
    several = " --category=CATEGORY" if len(parts.sets.by_category) > 1 else ""
    out.print(f"use it:\n  dsad predict {shlex.quote(values.out)} IMAGES{several} --out=DIR")
    return 0
