"""``dsad predict``: pictures to scores, decisions, regions and overlays, with a fitted model."""

import shlex

from dsad.assembly import pictures
from dsad.assembly.model import FittedModel
from dsad.assembly.predict import CSV, OVERLAYS, claim, predict
from dsad.core.config import Refused
from dsad.core.errors import ConfigError
from dsad.terminal import console, flags

#: Unreadable images that are listed on the screen; all are in the files.
_LISTED = 5


def main(argv: list[str]) -> int:
    """The command; 1 if an image could not be read."""
    command = flags.Command(
        "predict", "MODEL IMAGES...: score files, folders, or patterns with a fitted model.\n"
        "  dsad predict MODEL NEW --out=PREDICTIONS",
        positional=True,
    )  # fmt: skip
    command.string("out", "", "Directory that takes predictions and overlays.")
    command.string("category", "", "Of a model with several.")
    command.string("rate", "", "Share of false alarms, instead of the model's; nothing is fitted.")
    command.string("threshold", "", "Score above which an image is flagged, instead of a rate.")
    command.string("maps", "none", "tiff: also every map, float32 on the pixels of its image.")
    command.switch("overwrite", "Replace the predictions in --out.")
    _, values, rest = command.parse(argv)
    if len(rest) < 2:
        raise ConfigError("dsad predict: expected a model's directory, then images or folders.")
    if values.maps not in ("none", "tiff"):
        raise Refused("--maps", "none or tiff", values.maps)
    claim(values.out, overwrite=values.overwrite, dry=True)
    model = FittedModel.load(rest[0], values.category)
    decision = model.decision(_number("rate", values.rate), _number("threshold", values.threshold))
    given = pictures.matching(rest[1:], without=values.out)
    folder = claim(values.out, overwrite=values.overwrite)
    out = console.console(80)
    with console.progress("predicting", out) as tell:
        summary = predict(model, given, decision, folder, tell, maps=values.maps == "tiff")
    for path, fault in list(summary.faults.items())[:_LISTED]:
        out.print(f"not read: {fault if path in fault else f'{path}: {fault}'}")
    for line in summary.warnings():
        out.print(f"warning: {line}")
    flagged = f", {summary.flagged} flagged" if decision.image is not None else ""
    missing = f", {len(summary.faults)} not read" if summary.faults else ""
    images = f"{summary.total} image{'s' if summary.total != 1 else ''}"
    out.print(f"{images}{flagged}{missing}; {decision}")
    drawn = f"; pictures: {folder / OVERLAYS}" if summary.total > len(summary.faults) else ""
    out.print(f"written: {folder / CSV}{drawn}")
    out.print(f"on one page: dsad report {shlex.quote(values.out)}")
    return 1 if summary.faults else 0


def _number(name: str, text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        raise Refused(f"--{name}", "a number", text) from None
