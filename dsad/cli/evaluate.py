"""``dsad evaluate``: a backbone, a detector and a data set to numbers and pictures."""

import functools
import re
import shlex
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from dsad.assembly import evaluate, label_probe, model_config, workdir
from dsad.assembly.model import Saved
from dsad.assembly.saving import Writer
from dsad.core import distributed
from dsad.core.errors import ConfigError
from dsad.data.base import PLACES, read_as
from dsad.evaluation import thresholds
from dsad.evaluation.channels import KINDS
from dsad.evaluation.config import ABOUT_FURTHER
from dsad.evaluation.label_results import PROBES, LabelResults
from dsad.evaluation.results import Results, shown
from dsad.terminal import console, flags

#: Of these every one names images anew.
_NAMED = ("root", "normal", "manifest")


def table(results: Results, title: str = "") -> Table:
    """Numbers per category, per kind of defect, and the mean; ± the deviation over seeds.

    F1-max is left to results.json and the report, sPRO to a table of its own: the table fits 80
    columns. Of further numbers there are the means, below it.
    """
    further = [name for name in results.metric_names if name in ABOUT_FURTHER]
    apart = (*further, *_saturated(results))
    names = [name for name in results.metric_names if "_f1_" not in name and name not in apart]
    columns = ("images", *(name.replace("_", "\n", 1) for name in names))
    made = console.table("category / kind", *columns, title=title or None, title_justify="left")
    std = results.std
    for category, row in results.categories.items():
        counts = row["counts"]
        images = f"{counts['normal']}+{counts['anomalous']}"
        spread = std["categories"][category] if std else {}
        made.add_row(category, images, *_cells(row, names, spread))
        for kind, numbers in results.kinds[category].items():
            cells = _cells(numbers, names)
            made.add_row(f" {kind}", str(numbers["images"]), *cells, style="dim")
    made.add_section()
    cells = _cells(results.mean, names, std["mean"] if std else {})
    made.add_row("mean", "", *cells, style="bold")
    captions = [
        f"{name}: {cell.replace(chr(10), ' ')}"
        for name, cell in zip(
            further, _cells(results.mean, further, std["mean"] if std else {}), strict=True
        )
    ]
    captions += [text for text in (results.about_defects, results.about_means) if text]
    if std:
        captions.append(
            f"mean ± sample standard deviation over {len(results.seeds)} seeds "
            f"({', '.join(results.seeds)})"
        )
        if 0 in std["mean"].values():
            captions.append("without ±: the same with every seed")
    made.caption = "\n".join(captions) or None
    return made


def _saturated(results: Results) -> list[str]:
    """The names of sPRO, and of means over kinds of defect."""
    names = results.metric_names
    return [name for name in names if name.startswith("spro_") or name.endswith(KINDS)]


def spro_table(results: Results) -> Table:
    """Image AUROC and sPRO of all images, by kind of defect, and the mean over kinds."""
    kinds = [name for name in _saturated(results) if name.endswith(KINDS)]
    names = [name.removesuffix(KINDS) for name in kinds]
    columns = ("images", *(name.replace("_", "\n", 1) for name in names))
    made = console.table(
        "category / kind", *columns, title="Saturated per-region overlap (sPRO)",
        title_justify="left", caption="mean of kinds: of each against all normal images",
    )  # fmt: skip
    std = results.std
    for category, row in {**results.categories, "mean": results.mean}.items():
        if category == "mean":
            made.add_section()
        spread = (std["mean"] if category == "mean" else std["categories"][category]) if std else {}
        images = f"{x['normal']}+{x['anomalous']}" if (x := row.get("counts")) else ""
        made.add_row(category, images, *_cells(row, names, spread), style="bold" * (not images))
        for kind, numbers in results.kinds.get(category, {}).items():
            made.add_row(f" {kind}", str(numbers["images"]), *_cells(numbers, names), style="dim")
        made.add_row(" mean of kinds", "", *_cells(row, kinds, spread))
    return made


def _cells(row: Any, names: list[str], spread: Mapping[str, Any] | None = None) -> list[str]:
    """Numbers, and below them ±.012: as narrow as they are, which leaves room for names.

    Those that are equal with all seeds have none.
    """
    stds = {n: x for n, x in (spread or {}).items() if n in names and x}
    below = {n: f"\n±{x:.3f}".replace("±0", "±") for n, x in stds.items()}
    return [shown(row[n]) + below.get(n, "") for n in names]


def threshold_table(results: Results) -> Table:
    """Thresholds from normals outside the fit, and what they achieve on the test images.

    Images and pixels have a row each: the table fits 80 columns.
    """
    rate = results.stamp["thresholds"]["false_alarm_rate"]
    captions = [results.about_defects, "means over seeds" if results.std else ""]
    made = console.table(
        "category / pixels", "held\nout", "threshold", "bound", "false\nalarms", "defects\nfound",
        title=f"Thresholds from normal images, false-alarm rate {rate:g}",
        title_justify="left", caption="; ".join(filter(None, captions)) or None,
    )  # fmt: skip
    for category, by_seed in results.thresholds.items():
        row = thresholds.mean(list(by_seed.values()))
        about = {n: shown(row[n], ".4g") for n, _ in thresholds.COLUMNS}
        cells = [about[f"image{n}"] for n in ("", "_bound", "_false_alarms", "_recall")]
        made.add_row(category, f"{row['held_out']:g}", *cells)
        cells = [about["pixel"], "", about["pixel_false_alarms"], about["pixel_recall"]]
        made.add_row(" pixels", "", *cells, style="dim")
    return made


def rule_table(results: Results) -> Table:
    """F1 of pixels (SegF1) and of images (ClassF1) at the threshold of every rule."""
    rules, std = results.stamp["decisions"], results.std
    made = console.table(
        "category", "rule", "threshold", "SegF1", "ClassF1", title_justify="left",
        title="F1 at one threshold, which never sees a test image",
        caption="\n".join(f"{rule}: {text}" for rule, text in rules.items()),
    )  # fmt: skip
    rows = {**results.categories, "mean": results.mean}
    for title, row in rows.items():
        if title == "mean":
            made.add_section()
        spread = (std["mean"] if title == "mean" else std["categories"][title]) if std else {}
        by_seed = results.thresholds.get(title, {}).values()
        for i, rule in enumerate(rules):
            limits = [x["decisions"][rule] for x in by_seed]
            limit = None if None in limits or not limits else sum(limits) / len(limits)
            cells = _cells(row, [f"pixel_f1_{rule}", f"image_f1_{rule}"], spread)
            made.add_row("" if i else title, rule, shown(limit, ".4g"), *cells)
    return made


def decisions(results: Results) -> list[str]:
    """What is found and falsely flagged at the thresholds: a line per category and seed."""
    lines = []
    about = f"; {results.about_defects}" if results.about_defects else ""
    for category, by_seed in results.thresholds.items():
        for seed, row in by_seed.items():
            name = f"{category}, seed {seed}" if results.std else category
            lines.append(f"{name}: {row['decision']}{about}")
    return lines


def probe_table(results: LabelResults) -> Table:
    """Top-1 of both probes, top-5 from five classes on, beside chance; ± the deviation."""
    rows = {**PROBES, "chance": "chance (the most frequent classes)"}
    columns = [f"top-{best}" for best in results.tops]
    about = results.stamp
    shares = console.table(
        "share of test images that are right", *columns, title=about["name"],
        title_justify="left",
    )  # fmt: skip
    for name, title in rows.items():
        cells = [_cells(results.mean, [f"{name}_top{n}"], results.std)[0] for n in results.tops]
        shares.add_row(title, *cells)
    counts = results.counts
    lines = [
        f"{about['classes']} classes, {counts['train']} training and {counts['test']} test images "
        f"{'of each seed' if results.std else ''}".rstrip(),
        f"{about['layer']}, {about['pooling']}, {about['preprocessing']['height']} px; "
        f"k = {counts['k']}, C = {about['linear']['C']:g}",
    ]
    if results.std:
        lines.append(
            f"mean ± sample standard deviation over {len(results.seeds)} splits "
            f"(seeds {', '.join(results.seeds)})"
        )
    shares.caption = "\n".join(lines)
    return shares


def _probe(config: Any, values: Any, out: Console) -> int:
    """The command with a config of probes by labels."""
    for flag in ("model", "save_model"):
        if getattr(values, flag):
            raise ConfigError(f"--{flag}: probes by labels fit no detector; leave it out.")
    claim = functools.partial(
        workdir.claim, values.workdir, "evaluate", config.to_dict(), overwrite=values.overwrite
    )
    claim(dry=True)
    parts = distributed.together(lambda: label_probe.prepare(config, out))
    path = claim()
    with read_as(parts.config.data):
        results = label_probe.evaluate(parts, path, out, name=values.name)
    out.print(probe_table(results))
    for line in results.warnings:
        out.print(line)
    out.print(f"written: {path}/results.json; page:\n  dsad report {shlex.quote(str(path))}")
    return 0


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command(
        "evaluate",
        "localize defects with a backbone, or probe it by labels, and measure it.",
        config="configs/knn.py",
    )
    command.string("model", "", "Directory of fitted models to measure, instead of a config.")
    command.string("save_model", "", "Directory that takes what is fitted.")
    command.string("workdir", "", "Directory of the evaluation: results.json and pictures.")
    command.string("name", "", "Name of this evaluation in tables and reports.")
    command.switch("overwrite", "Replace the evaluation in --workdir.")
    command.distributed()
    if model := command.early(argv).model:
        if command.chooses_config(argv):
            raise ConfigError("--model brings the config of its fit; leave --config out.")
        if any(re.match(rf"--?config\.data\.({'|'.join(_NAMED)})(=|$)", a) for a in argv):
            argv = [*(f"--config.data.{key}=" for key in PLACES), *argv]  # in place of the fit's
        command.config = f"{model_config.__file__}:{model}"
    config, values, _ = command.parse(argv)
    flags.start_distributed(values)
    out = console.console()
    if label_probe.is_meant(config):
        return _probe(config, values, out)
    claim = functools.partial(
        workdir.claim, values.workdir, "evaluate", config.to_dict(), overwrite=values.overwrite
    )
    claim(dry=True)
    writer = None
    if values.save_model:
        if values.model:
            raise ConfigError("--save-model: expected a fit, found --model.")
        writer = Writer(values.save_model, overwrite=values.overwrite, workdir=values.workdir)
    saved = Saved.read(values.model) if values.model else None
    parts = distributed.together(lambda: evaluate.prepare(config, out, saved=saved))
    if writer:
        writer.check(parts.detector, parts.backbone, parts.config.seeds)
    path = claim()
    with read_as(parts.config.data):
        results = evaluate.evaluate(parts, path, out, name=values.name, writer=writer)
    out.print(table(results))
    if _saturated(results):
        out.print(spro_table(results))
    for category, row in results.categories.items():
        for note in row.get("notes", []):
            out.print(f"{category}: {note}")
    counted = [row["error_bound"] for row in results.categories.values() if "error_bound" in row]
    if counted:
        out.print(f"pixel numbers by counting, each within {max(counted):.1e} of the exact one")
    if results.thresholds:
        out.print(threshold_table(results))
        if "decisions" in results.stamp:
            out.print(rule_table(results))
        for line in decisions(results):
            out.print(line)
    if writer:
        out.print(f"fitted models: {writer.directory}")
    out.print(f"written: {path}/results.json; pictures:\n  dsad report {shlex.quote(str(path))}")
    return 0
