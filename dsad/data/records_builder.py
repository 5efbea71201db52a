"""Writes records with a builder of tensorflow-datasets: image files copied, or decoded canvases.

The builder goes shard by shard, so that every byte is written once and the records keep the order
of the data set. (A builder that shuffles needs TensorFlow and room for a second copy from 1 GB on.)
A stopped preparation leaves its complete shards, and the next one takes over those whose images,
files and settings are still the same.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dsad.core import batch as batches
from dsad.core import paths
from dsad.core.batch import BatchSpec, Needs
from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.types import Progress
from dsad.data import canvases, records
from dsad.data import facts as image_facts
from dsad.data.base import PLACES, IndexedDataset
from dsad.data.decode import MaskRule
from dsad.data.files import EncodedSource
from dsad.data.record_shards import Counter, Kept, Shard, Writer

#: Bytes after which a new file begins; about as much memory is used while one is written.
SHARD_BYTES = 256 * 2**20
#: An example needs no more than this beside its pixels or file contents.
_OVERHEAD = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be written: per split the sizes of its samples in bytes, before compression.

    ``canvas`` is 0 for copied files, else the side of the canvases.
    """

    dataset: IndexedDataset
    canvas: int
    sizes: Mapping[str, np.ndarray]

    @property
    def bytes(self) -> int:
        """Bytes of all records at most; canvases are compressed when they are written."""
        return sum(int(sizes.sum()) for sizes in self.sizes.values())

    @property
    def anomalous(self) -> bool:
        """Whether a sample is, so that canvases come with masks."""
        return any(r.label for split in self.sizes for r in self.dataset.splits[split])

    def __str__(self) -> str:
        numbers = ", ".join(f"{len(sizes):,} {split}" for split, sizes in self.sizes.items())
        if not self.canvas:
            return f"{numbers} images as they are: {paths.size(self.bytes)}"
        return (
            f"{numbers} canvases: {sum(map(len, self.sizes.values())):,} × {self.canvas}² × "
            f"{3 + self.anomalous} = {paths.size(self.bytes)}, less after compression"
        )


def plan(dataset: IndexedDataset, canvas: int = 0, progress: Progress | None = None) -> Plan:
    """The sizes of all samples; raises ConfigError for a data set that has no files to copy.

    Canvases are for training: of them only what ``config.data.split`` says is written.
    """
    sizes = {}
    only = dataset.config.split if canvas else "all"
    both = ("train", "test") if canvas else tuple(dataset.splits)
    splits = both if only == "all" else (only,)
    channels = 3 + any(r.label for split in splits for r in dataset.splits[split])  # with the mask
    files = Counter(sum(len(dataset.splits[split]) for split in splits), progress)
    for split in splits:
        source = dataset.source(split)
        if not canvas and not isinstance(source, EncodedSource):
            raise ConfigError(
                f"config.data.name: the {split} images of {dataset.name} are no files to copy. "
                "Canvases can be stored: --canvas=SIDE."
            )
        if len(source) == 0:
            continue
        if canvas:
            sizes[split] = np.full(len(source), canvas * canvas * channels, np.int64)
        else:
            sizes[split] = np.asarray([_measured(source, i, files) for i in range(len(source))])
    if ("train" not in sizes and only != "test") or not sizes:
        raise ConfigError(f"{dataset.name}: the split {only} has no sample; check config.data.")
    return Plan(dataset=dataset, canvas=canvas, sizes=sizes)


def _measured(source: Any, index: int, files: Counter) -> int:
    files.add(source.records[index].path)
    return source.size_of(index)


def write(
    planned: Plan,
    out: str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> pathlib.Path:
    """Write the records of a plan to the folder ``out``; returns it.

    Everything is written to a folder beside it, which then takes its name. Raises WorkdirError
    for a folder in use (unless ``overwrite`` and it holds records), one that cannot be written to
    and a disk too full; and DataError for an image that cannot be read, naming it. Then, and after
    a kill, shards that are complete stay beside it for the next call; ``say`` tells of them.
    """
    library, place = records.tfds(), target(out, overwrite)
    with _claimed(place) as part, paths.writing(place, "What was there before is unchanged."):
        kept = Kept(part)
        try:
            shards = _shards(planned, progress)
            kept.fit([shard for of_split in shards.values() for shard in of_split], say)
            needed = planned.bytes + _OVERHEAD * sum(map(len, planned.sizes.values()))
            _check_room(place, needed - sum(f.stat().st_size for f in kept.files()))
            _build(library, planned, part, shards, kept)
            for split in planned.sizes:
                _write_index(part, split, planned.dataset)
            about = json.dumps(_about(planned, kept.checks), indent=2) + "\n"
            (part / records.ABOUT).write_text(about, "utf-8")
            kept.finish()
            _move(part, place)
        finally:
            if left := kept.files():
                say(f"{len(left)} complete shards stay in {part} for the same command.")
            else:
                shutil.rmtree(part, ignore_errors=True)
    return place


def target(out: str, overwrite: bool) -> pathlib.Path:
    """The folder that ``write`` would take; raises WorkdirError or ConfigError if it may not."""
    if not out:
        raise ConfigError("dsad prepare: --out=DIR is missing; it takes the records.")
    if paths.is_remote(out):
        raise ConfigError(f"--out={out}: expected a local folder; copy it there afterwards.")
    place = pathlib.Path(out).expanduser().absolute()
    # The folder beside it is the one that is written to.
    for folder in (place, place.parent):
        paths.check_place(folder, "Choose another --out=DIR.")
    if not place.exists() or not any(place.iterdir()):
        return place
    if not overwrite:
        raise WorkdirError(
            f"--out={out}: in use. Replace its records with --overwrite, or choose another folder."
        )
    if not (place / records.ABOUT).is_file():
        raise WorkdirError(
            f"--out={out}: holds files but no records, and --overwrite only replaces records. "
            "Choose another folder."
        )
    return place


@contextlib.contextmanager
def _claimed(place: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder that is written to, for this process alone; WorkdirError if another one has it."""
    part = place.with_name(f".{place.name}.incomplete")
    with paths.writing(place, "Choose another --out=DIR."):
        part.mkdir(parents=True, exist_ok=True)
        lock = (part / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirError(
                f"--out={place}: another dsad prepare is writing it. Wait for its end, or choose "
                "another folder."
            ) from None
        except OSError:
            pass  # some shared file systems know no locks
        yield part


def _check_room(place: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(place.parent).free
    if needed > free:
        raise WorkdirError(
            f"--out={place}: {paths.size(needed)} needed, {paths.size(free)} free. Make room, or "
            "choose another disk or fewer config.data.categories."
        )


def _move(part: pathlib.Path, target: pathlib.Path) -> None:
    """Give the finished folder its name; an older one is only removed once it has it."""
    old = part.with_suffix(".replaced")
    if target.exists():
        target.rename(old)
    try:
        part.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_index(part: pathlib.Path, split: str, dataset: IndexedDataset) -> None:
    with records.index_file(part, split).open("w", encoding="utf-8") as file:
        for record in dataset.source(split).records:
            file.write(json.dumps(list(dataclasses.astuple(record)), ensure_ascii=False) + "\n")


def _about(planned: Plan, shards: Mapping[str, Any]) -> dict[str, Any]:
    dataset = planned.dataset
    source = dataset.source(next(iter(planned.sizes)))
    rule = source.rule if isinstance(source, EncodedSource) else MaskRule()
    return {
        "format": records.FORMAT,
        "name": dataset.name,
        "prepared_from": {
            "name": dataset.config.name,
            "root": str(pathlib.Path(dataset.config.place).expanduser().absolute())
            if dataset.config.place
            else "",
        },
        "categories": list(dataset.categories),
        "counts": {split: len(sizes) for split, sizes in planned.sizes.items()},
        "shards": dict(shards),
        "canvas": planned.canvas,
        "facts": list(records.known_facts()) if planned.canvas else [],
        "rule": {"threshold": rule.threshold, "values": rule.values},
        "saturations": {
            category: {str(value): dataclasses.asdict(x) for value, x in by_value.items()}
            for category, by_value in dataset.saturations.items()
        },
        "protocol": dict(dataset.protocol),
    }


# --- the builder ----------------------------------------------------------------------------


def _shards(planned: Plan, progress: Progress | None) -> dict[str, list[Shard]]:
    counter = Counter(sum(map(len, planned.sizes.values())), progress)
    make: Any = _file_example
    if planned.canvas:
        make = functools.partial(_canvas_example, masks=planned.anomalous)
    without = ("workers", "prefetch", "cache", *PLACES)  # of no effect on what a shard holds
    settings = [(k, v) for k, v in vars(planned.dataset.config).items() if k not in without]
    same = f"{records.FORMAT} {planned.canvas} {planned.anomalous} {settings}"
    return {
        split: [
            Shard(planned.dataset.source(split), rows, planned.canvas, make, counter, same)
            for rows in shard_rows(sizes)
        ]
        for split, sizes in planned.sizes.items()
    }


def _build(
    library: Any,
    planned: Plan,
    part: pathlib.Path,
    shards: Mapping[str, Sequence[Shard]],
    kept: Kept,
) -> None:
    """Run a builder over the plan, writing below ``part``."""
    base = library.core.ShardBasedBuilder

    class DsadRecords(base, skip_registration=True):  # type: ignore[call-arg]
        VERSION = library.core.Version("1.0.0")

        def _info(self) -> Any:
            return library.core.DatasetInfo(
                builder=self,
                description=f"Written by dsad prepare from {planned.dataset.name}.",
                features=library.features.FeaturesDict(_features(library, planned)),
                disable_shuffling=True,
            )

        def _shard_iterators_per_split(self, dl_manager: Any) -> Any:
            del dl_manager  # nothing is downloaded
            return {
                split: [functools.partial(kept.examples, shard) for shard in of_split]
                for split, of_split in shards.items()
            }

        def _example_writer(self) -> Any:
            order = [shard for of_split in shards.values() for shard in of_split]
            return Writer(super()._example_writer(), iter(order), kept)

        # What these would print is said by dsad.
        def _log_download_bytes(self) -> None: ...
        def _log_download_done(self) -> None: ...

    builder = DsadRecords(data_dir=part, file_format="array_record")
    builder.download_and_prepare(download_dir=part / "downloads")
    shutil.rmtree(part / "downloads", ignore_errors=True)


def _features(library: Any, planned: Plan) -> dict[str, Any]:
    kinds, canvas = library.features, planned.canvas
    text = {name: kinds.Text() for name in ("path", "category", "kind")}
    fields = {**text, "label": np.int64}
    if not canvas:
        masks = kinds.Sequence(kinds.Tensor(shape=(), dtype=np.bytes_))
        return {**fields, "image": kinds.Image(), "masks": masks}
    facts = {
        f"fact_{name}": kinds.Tensor(shape=fact.shape, dtype=fact.dtype)
        for name, fact in image_facts.FACTS.items()
    }

    def pixels(*channels: int) -> Any:
        return kinds.Tensor(shape=(canvas, canvas, *channels), dtype=np.uint8, encoding="bytes")

    masks = {"mask": pixels(), "masked": np.int32} if planned.anomalous else {}
    size = kinds.Tensor(shape=(2,), dtype=np.int32)
    return {**fields, **facts, **masks, "canvas": pixels(3), "size": size}


def _fields(source: Any, index: int) -> dict[str, Any]:
    record = source.records[index]
    return {
        "path": record.path,
        "category": record.category,
        "kind": record.kind,
        "label": record.label,
    }


def _file_example(source: Any, index: int, canvas: int) -> dict[str, Any]:
    del canvas
    masks = source.encoded_masks(index) if source.records[index].masks else []
    return {**_fields(source, index), "image": source.encoded(index), "masks": masks}


def _canvas_example(source: Any, index: int, canvas: int, *, masks: bool) -> dict[str, Any]:
    spec = BatchSpec(
        canvas=canvas, needs=Needs(mask=masks), facts=image_facts.fields(records.known_facts())
    )
    arrays = batches.zeros(spec.read, 1)
    canvases.fill(arrays, 0, canvases.reader_of(source, spec), index)
    facts = {f"fact_{name}": value[0] for name, value in arrays.pop("facts").items()}
    rows = {name: value[0] for name, value in arrays.items()}
    return {**_fields(source, index), **facts, "canvas": rows.pop("image"), **rows}


def shard_rows(sizes: np.ndarray, limit: int = SHARD_BYTES) -> list[range]:
    """Consecutive rows for each file: cut where a multiple of ``limit`` bytes is passed."""
    before = np.cumsum(sizes) - sizes
    starts = np.flatnonzero(np.diff(before // limit, prepend=-1)).tolist()
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True)]
