"""What ``dsad prepare`` wrote: ArrayRecord files of image files, or of canvases ready to train on.

The folder holds ``dsad_records.json`` (from what it was prepared, and how), an index of every
split, and the records of a tensorflow-datasets builder, which ``tfds.builder_from_directory`` reads
too. TensorFlow is not needed. Records are in the order of the data set they were made from, so
training from them is the same as training from the files, to the last bit.

Records of files carry the bytes of image and mask and can be evaluated like the files. Records of
canvases hold what ``config.data.split`` says at one ``config.data.canvas`` and cannot.
"""

import dataclasses
import hashlib
import importlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dsad.core.batch import BatchSpec
from dsad.core.channels import Saturation
from dsad.core.config import listed
from dsad.core.errors import ConfigError
from dsad.core.types import Record, Sample
from dsad.data import facts as image_facts
from dsad.data import files, saturation
from dsad.data.base import (
    DataConfig,
    Fault,
    FaultError,
    IndexedDataset,
    Saturations,
    check_command,
    chosen,
    error,
    variant,
)
from dsad.data.decode import MaskRule

#: Beside the records: what they are.
ABOUT = "dsad_records.json"
#: Raised when what is stored changes.
FORMAT = 4
#: What to do about damaged records.
AGAIN = "prepare the data set again, or copy that file again."
#: Where the builder of tensorflow-datasets puts its files.
FOLDER = "dsad_records/1.0.0"


def tfds() -> Any:
    """tensorflow-datasets; ConfigError with the command that installs it."""
    try:
        return importlib.import_module("tensorflow_datasets")
    except ImportError as problem:
        raise ConfigError(
            "records are written and read by tensorflow-datasets (without TensorFlow), which is "
            f'not installed: pip install "dsad[records]" ({problem})'
        ) from problem


def index_file(root: pathlib.Path, split: str) -> pathlib.Path:
    """The index of a split: a JSON list per line, of the fields of Record."""
    return root / f"index-{split}.jsonl"


def checksum(file: pathlib.Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


class _Stored:
    """The examples of one split by position; a damaged file is named."""

    def __init__(self, root: pathlib.Path, split: str):
        library = tfds()
        skip = library.decode.SkipDecoding()
        builder = library.builder_from_directory(root / FOLDER)
        decoders = {"image": skip} if "image" in builder.info.features else None
        self.root, self.split = root, split
        self.examples = builder.as_data_source(split=split, decoders=decoders)
        self._info = builder.info.splits[split]

    def shard(self, position: int) -> str:
        """The path, below the root, of the file that holds an example."""
        ends = np.cumsum(self._info.shard_lengths)
        return f"{FOLDER}/{self._info.filenames[int(np.searchsorted(ends, position, 'right'))]}"

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, position: int, path: str) -> Mapping[str, Any]:
        """The example of the image ``path``."""
        try:
            found = self.examples[position]
        except Exception as problem:  # whatever the library makes of damaged bytes
            text = f"record {position} cannot be read: {problem}. {self._advice(position)}"
            raise FaultError(error("K8", path, text)) from problem
        there = found.get("path")
        if there is None or there.decode() != path:  # a file cut short gives empty records
            what = "is empty" if there is None else f"is that of {there.decode()}"
            text = f"record {position} {what}. {self._advice(position)}"
            raise FaultError(error("K8", path, text))
        return found

    def _advice(self, position: int) -> str:
        return f"It is in {self.root / self.shard(position)}; {AGAIN}"


class RecordSource(files.EncodedSource):
    """Samples whose files lie in records."""

    def __init__(
        self, stored: _Stored | None, records: Sequence[Record], positions: np.ndarray,
        *, lossy: tuple[str, ...], rule: MaskRule, saturations: Saturations,
    ):  # fmt: skip
        super().__init__(records, lossy=lossy, rule=rule, saturations=saturations)
        self._stored, self._positions = stored, positions

    def _example(self, index: int) -> Mapping[str, Any]:
        record, position = self.records[index], int(self._positions[index])
        assert self._stored is not None  # a split without records has none to ask for
        return self._stored.example(position, record.path)

    def encoded(self, index: int) -> bytes:
        """The content of an image's file, as it was copied."""
        return self._example(index)["image"]

    def encoded_masks(self, index: int) -> list[bytes]:
        """The contents of the mask files of a sample, as they were copied."""
        return list(self._example(index)["masks"])

    def files(self, index: int) -> list[pathlib.Path]:
        """The one that every preparation of the records writes."""
        del index
        return [self._stored.root / ABOUT] if self._stored else []


class RecordCanvases:
    """Samples decoded before: what is left of them is their canvas of one side, and their facts."""

    def __init__(
        self, stored: _Stored, records: Sequence[Record], positions: np.ndarray,
        about: Mapping[str, Any],
    ):  # fmt: skip
        self.records = records
        self._stored, self._positions, self._about = stored, positions, about

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int) -> Mapping[str, Any]:
        """``canvas``, ``size``, a ``fact_...`` for every fact, perhaps ``mask`` and ``masked``."""
        return self._stored.example(int(self._positions[index]), self.records[index].path)

    def __getitem__(self, index: int, /) -> Sample:
        """The image and its mask as they lie on the canvas: scaled down if they were larger."""
        record, example = self.records[index], self.example(index)
        height, width = example["size"].tolist()
        image, mask = np.array(example["canvas"][:height, :width]), np.zeros((height, width), bool)
        if "mask" in example:
            mask = example["mask"][:height, :width] > 0
        unknown = record.label and not example.get("masked", 0)
        return Sample(record=record, image=image, mask=None if unknown else mask)

    def canvas_reader(self, spec: BatchSpec) -> "CanvasReader":
        """Canvases for the pipeline; ConfigError unless side and facts are what was prepared."""
        prepared = self._about["canvas"]
        if spec.canvas != prepared:
            raise ConfigError(
                f"config.data.canvas: {spec.canvas}, but {self._stored.root} was prepared with "
                f"canvases of {prepared}. Train with --config.data.canvas={prepared}, or prepare "
                f"the data set again with --canvas={spec.canvas}."
            )
        if unknown := [name for name in spec.facts if name not in self._about["facts"]]:
            raise ConfigError(
                f"{self._stored.root} was prepared without the facts {listed(unknown)} that the "
                "objective needs, by an older dsad. Prepare the data set again."
            )
        return CanvasReader(self)


class CanvasReader:
    """Copies stored canvases to where the pipeline wants them."""

    def __init__(self, source: RecordCanvases):
        self._source = source

    def __call__(self, index: int, row: dict[str, Any]) -> None:
        """Fill the fields ``BatchSpec.read`` of a sample."""
        example = self._source.example(index)
        row["image"][...], row["size"][...] = example["canvas"], example["size"]
        for name, value in row["facts"].items():
            value[...] = example[f"fact_{name}"]
        if "mask" in row:  # without anomalous images none is stored: all are known to be normal
            row["mask"][...], row["masked"][...] = example.get("mask", 0), example.get("masked", 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordDataset(IndexedDataset):
    """A prepared data set; ``about`` is the content of its dsad_records.json.

    ``name`` and ``protocol`` are those of the data set it was made from: a number measured on
    records of files means the same as one measured on the files.
    """

    root: pathlib.Path
    about: Mapping[str, Any]
    positions: Mapping[str, np.ndarray]  # of the records of each split, in the files
    stored: Mapping[str, _Stored]

    def source(self, split: str, category: str | None = None) -> Any:
        """Samples of a split, of one category or of all, sorted by path."""
        if self.about["canvas"] and split not in self.stored:
            raise ConfigError(
                f"{self.root} holds canvases of the {listed(self.stored)} images alone, not of the "
                f"{split} images. Take the files it was prepared from, "
                f"{self.about['prepared_from']['root']}, or with records prepared without --canvas."
            )
        records = files.select(self.splits, self.categories, split, category)
        positions = self.positions[split]
        if category is not None:
            mine = [r.category == category for r in self.splits[split]]
            positions = positions[np.asarray(mine, bool)]
        if self.about["canvas"]:
            return RecordCanvases(self.stored[split], records, positions, self.about)
        return RecordSource(
            self.stored.get(split), records, positions,
            lossy=self.config.lossy, rule=_rule(self.about), saturations=self.saturations,
        )  # fmt: skip

    def damages(self) -> list[Fault]:
        """K8 of every file of records whose SHA-256 is not the one that was noted."""
        names = self.about["shards"]
        with ThreadPoolExecutor(min(4, max(1, len(names)))) as pool:
            found = pool.map(lambda name: checksum(self.root / FOLDER / name), names)
            return [
                error("K8", f"{FOLDER}/{name}", f"damaged: its SHA-256 is another; {AGAIN}")
                for name, digest in zip(names, found, strict=True)
                if digest != names[name]["sha256"]
            ]


def described(about: Mapping[str, Any]) -> str:
    """Contents of dsad_records.json in a line."""
    origin, counts = about["prepared_from"], about["counts"]
    what = f"canvases of {about['canvas']} px" if about["canvas"] else "image files"
    numbers = ", ".join(f"{n:,} {split}" for split, n in counts.items())
    return (
        f"records of {what} ({numbers}) prepared from {origin['name']} in "
        f"{origin['root'] or 'no folder'}, split {about['protocol']['split_hash']}"
    )


def _rule(about: Mapping[str, Any]) -> MaskRule:
    values = about["rule"]["values"]
    return MaskRule(
        threshold=about["rule"]["threshold"], values=None if values is None else tuple(values)
    )


def _saturations(about: Mapping[str, Any], categories: Sequence[str]) -> dict[str, Any]:
    """Those of the categories; records of earlier versions have none, nor has their protocol."""
    return {
        category: {int(value): Saturation(**x) for value, x in by_value.items()}
        for category, by_value in about.get("saturations", {}).items()
        if category in categories
    }


def read_about(root: pathlib.Path) -> dict[str, Any]:
    """The content of dsad_records.json; DataError when the folder is none of dsad's."""
    file = root / ABOUT
    try:
        about = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        text = f"{ABOUT} is missing; expected a folder written by `dsad prepare`."
        raise FaultError(error("K0", str(root), text)) from None
    except (OSError, ValueError) as problem:
        raise FaultError(error("K8", str(file), f"cannot be read: {problem}.")) from problem
    if about.get("format") != FORMAT:
        text = (
            f"format {about.get('format')}; this dsad reads {FORMAT}. Prepare the data set again."
        )
        raise FaultError(error("K0", str(file), text))
    return about


def _read_index(root: pathlib.Path, split: str, expected: int) -> tuple[Record, ...]:
    file = index_file(root, split)
    names = [field.name for field in dataclasses.fields(Record)]
    try:
        with file.open(encoding="utf-8") as lines:
            found = tuple(
                _record(dict(zip(names, json.loads(line), strict=True))) for line in lines
            )
    except (OSError, ValueError) as problem:
        raise FaultError(error("K8", str(file), f"cannot be read: {problem}.")) from problem
    if len(found) != expected:
        text = f"{len(found)} lines for {expected} records; prepare the data set again."
        raise FaultError(error("K8", str(file), text))
    return found


def _record(values: dict[str, Any]) -> Record:
    return Record(**{**values, "masks": tuple(values["masks"])})


def _open(root: pathlib.Path, split: str, expected: int) -> _Stored:
    try:
        stored = _Stored(root, split)
    except ConfigError:
        raise
    except Exception as problem:  # whatever the library makes of a damaged folder
        text = f"the records of {split} cannot be opened: {problem}. Prepare the data set again."
        raise FaultError(error("K8", str(root / FOLDER), text)) from problem
    if len(stored) != expected:
        text = f"{len(stored)} records of {split}, expected {expected}; prepare it again."
        raise FaultError(error("K8", str(root / FOLDER), text))
    return stored


def _cut(root: pathlib.Path, shards: Mapping[str, Any]) -> list[Fault]:
    """K8 of every file of records that is missing or has another size; none is read."""
    faults = []
    for name, noted in shards.items():
        file = root / FOLDER / name
        size = file.stat().st_size if file.is_file() else None
        if size != noted["bytes"]:
            what = "missing" if size is None else f"{size:,} bytes of {noted['bytes']:,}"
            faults.append(error("K8", f"{FOLDER}/{name}", f"{what}; {AGAIN}"))
    return faults


def _refuse(config: DataConfig, about: Mapping[str, Any], splits: Mapping[str, Any]) -> None:
    """What the config asks for and the records cannot give any more."""
    lossy = about["protocol"].get("lossy", [])
    if about["canvas"] and config.lossy and sorted(config.lossy) != sorted(lossy):
        raise ConfigError(
            f"config.data.lossy={config.lossy}: the canvases were decoded with {tuple(lossy)}. "
            "Leave it empty, or prepare the data set again."
        )
    if config.missing_masks == "error":
        bare = [r for rs in splits.values() for r in rs if r.label == 1 and not r.masks]
        if bare:
            faults = [files.missing_mask(r.path, "in the records", False) for r in bare]
            raise FaultError(
                *faults, where=f"records in {config.root}", command=check_command(config)
            )


def scan(config: DataConfig) -> RecordDataset:
    """The prepared data set; raises DataError for a folder that is incomplete or damaged."""
    variant(config)
    root = files.root_folder(config)
    if not root.is_dir():
        raise FaultError(files.missing_root(root))
    about = read_about(root)
    if cut := _cut(root, about["shards"]):
        raise FaultError(*cut, where=f"records in {root}", command=check_command(config))
    counts = {"train": 0, "test": 0, **about["counts"]}
    whole = {split: _read_index(root, split, n) if n else () for split, n in counts.items()}
    stored = {split: _open(root, split, n) for split, n in counts.items() if n}
    categories = chosen(config, tuple(about["categories"]))
    positions = {
        split: np.flatnonzero([r.category in categories for r in records])
        for split, records in whole.items()
    }
    splits = {s: tuple(whole[s][i] for i in found) for s, found in positions.items()}
    _refuse(config, about, splits)
    protocol = {**about["protocol"], "missing_masks": config.missing_masks}
    saturations = _saturations(about, categories)
    if len(categories) < len(about["categories"]):
        protocol["split_hash"] = files.split_hash(splits)
        protocol.pop("saturations", None)
        protocol |= saturation.described(saturations)
    if not about["canvas"]:
        protocol["lossy"] = sorted(config.lossy)
    return RecordDataset(
        name=about["name"], categories=categories, protocol=protocol, config=config, root=root,
        about=about, splits=splits, positions=positions, stored=stored, origin=described(about),
        saturations=saturations,
    )  # fmt: skip


def known_facts() -> tuple[str, ...]:
    """Facts that are stored with a canvas: all there are."""
    return tuple(sorted(image_facts.FACTS))
