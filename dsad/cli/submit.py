"""``dsad submit``: what the server for MVTec AD 2's private images takes, with a fitted model."""

import dataclasses
import pathlib

import PIL.Image

from dsad.assembly import datasets, submission, submission_check
from dsad.assembly.model import Saved
from dsad.core.config import build_dataclass
from dsad.core.errors import ConfigError, DataError
from dsad.data.base import DataConfig, IndexedDataset, read_as
from dsad.terminal import console, flags

_NAME = "mvtec_ad2"


def main(argv: list[str]) -> int:
    """The command; 1 for a submission with faults."""
    command = flags.Command(
        "submit", "MODEL: score the private images of MVTec AD 2 and pack what its server takes.\n"
        "  dsad submit MODEL --out=DIR   DIR, DIR.tar.gz, DIR.json that tells of them\n"
        "  dsad submit --check=DIR       every fault of a submission at once",
        positional=True,
    )  # fmt: skip
    command.string("out", "", "Folder of this machine that takes maps and masks.")
    command.string("root", "", "Folder of the data set, if not where the model was fitted.")
    command.string("rule", "", "Of the thresholds, the model's first by default; none: maps alone.")
    command.string("check", "", "Folder of a submission to check; with --root sizes as well.")
    command.switch("quarter", "Maps of a quarter of the height and width: 1/16 of the disk space.")
    command.switch("partial", "As many images as there are, for a trial; the server takes all.")
    command.switch("overwrite", "Replace the submission in --out.")
    _, values, rest = command.parse(argv)
    out = console.console(80)
    if values.check:
        if rest:
            raise ConfigError(f"dsad submit --check: expected no model, found {rest[0]!r}.")
        config = DataConfig(name=_NAME, root=values.root)
        dataset = datasets.loaded(config, out) if values.root else None
        if values.partial and dataset is None:
            raise ConfigError("dsad submit --check --partial: --root=DIR is missing.")
        shapes = _shapes(dataset, config) if dataset else None
        counts = _counts(dataset) if dataset and values.partial else submission.PUBLISHED
        return _checked(pathlib.Path(values.check), counts, shapes, out)
    if len(rest) != 1:
        raise ConfigError("dsad submit: expected one directory, of fitted models.")
    folder = submission.claim(values.out, overwrite=values.overwrite)
    saved = Saved.read(rest[0])
    config = build_dataclass(DataConfig, saved.config()["data"], "config.data")
    if config.name != _NAME:
        raise ConfigError(
            f"{rest[0]}: was fitted to config.data.name={config.name}; the server takes maps of "
            f"{_NAME} alone."
        )
    config = dataclasses.replace(config, root=values.root or config.root)
    dataset = datasets.loaded(config, out)
    plan = submission.plan(saved, dataset, values.rule, quarter=values.quarter)
    images = submission.images(dataset)
    counts = _counts(dataset) if values.partial else submission.PUBLISHED
    if missing := submission_check.absent(images, submission.expected(counts)):
        raise DataError(
            f"{config.root}: the server takes all private images:\n  " + "\n  ".join(missing) + "\n"
            "Unpack the whole archive, with models of all objects, or try it with --partial."
        )
    with read_as(config), console.progress("scoring", out) as tell:
        shapes = submission.write(plan, folder, tell)
    if code := _checked(folder, counts, shapes, out):
        return code
    with console.progress("packing", out) as tell:
        packed = submission.pack(folder, tell)
    out.print(f"{len(images)} images, thresholds by the rule {plan.rule}, scale {plan.scale:g}")
    out.print(f"written: {packed}")
    return 0


def _counts(dataset: IndexedDataset) -> dict[str, int]:
    """Images of a private set of every object as they are there."""
    return {
        c: max(len(dataset.source(split, c)) for split in submission.PRIVATE)
        for c in dataset.categories
    }


def _shapes(dataset: IndexedDataset, config: DataConfig) -> dict[str, tuple[int, int]]:
    """(h, w) of every private image by its path, from the heads of the files."""
    made = {}
    for name in submission.images(dataset):
        with read_as(config), PIL.Image.open(pathlib.Path(config.root, f"{name}.png")) as image:
            made[name] = (image.height, image.width)
    return made


def _checked(folder, counts, shapes, out) -> int:
    with console.progress("checking", out) as tell:
        faults = submission_check.check(folder, counts, shapes, tell)
    for line in faults:
        out.print(line)
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    verdict = f"{count}: the server will refuse it" if faults else "no fault"
    out.print(f"{folder}: {verdict}.")
    return 1 if faults else 0
