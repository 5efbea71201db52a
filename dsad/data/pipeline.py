"""The input pipeline: canvases, one global sample order, resumable batches of host arrays.

The order is a grain MapDataset over range(N): seeded, shuffled anew every epoch, repeated, cut by
process last. It is the same in all cache modes and for any number of processes. The only module
that knows grain, imported when a pipeline is made because that takes seconds.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from PIL import Image

from dsad.core.errors import ConfigError
from dsad.core.types import Progress, Source
from dsad.data import facts as image_facts

CacheMode = Literal["device", "host", "none"]
_THREADS = max(2, min(16, os.cpu_count() or 2))


def canvas(image: np.ndarray, side: int) -> tuple[np.ndarray, tuple[int, int]]:
    """An image (h, w, 3) uint8 on a zero canvas (side, side, 3), top left, and its size there.

    An image larger than the canvas is scaled down to fit (aspect kept, Pillow's antialiased
    bilinear filter); a smaller one stays as it is.
    """
    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    if scale < 1.0:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        height, width = image.shape[:2]
    out = np.zeros((side, side, 3), np.uint8)
    out[:height, :width] = image
    return out, (height, width)


def _category_ids(source: Source) -> np.ndarray:
    names = sorted({record.category for record in source.records})
    number = {name: i for i, name in enumerate(names)}
    return np.asarray([number[record.category] for record in source.records], np.int32)


def canvases(
    source: Source, side: int, *, facts: Sequence[str] = (), progress: Progress | None = None
) -> dict[str, Any]:
    """All samples of a source as arrays, decoded by threads.

    ``image`` (N, side, side, 3) uint8, ``size`` (N, 2) int32 valid height and width, ``category``
    (N,) int32 position in the sorted names of the source's categories, ``facts``: a dict of arrays
    (N, ...), those of ``dsad.data.facts`` that are asked for, of the images before they are
    scaled. Raises DataError naming the first file that cannot be read.
    """
    total = len(source)
    image = np.zeros((total, side, side, 3), np.uint8)
    size = np.zeros((total, 2), np.int32)
    found = image_facts.empty(facts, total)

    def place(i: int) -> int:
        original = source[i].image
        image[i], size[i] = canvas(original, side)
        for name, value in image_facts.find(facts, original).items():
            found[name][i] = value
        return i

    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for done, _ in enumerate(pool.map(place, range(total)), start=1):
                if progress is not None:
                    progress(done, total, "decoding images")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {"image": image, "size": size, "category": _category_ids(source), "facts": found}


class _Stream:
    """Samples decoded when they are asked for; the facts of an image are found the first time."""

    def __init__(self, source: Source, side: int, facts: Sequence[str]):
        self.source, self.side, self.facts = source, side, facts
        self.known: dict[int, dict[str, np.ndarray]] = {}

    def sample(self, index: int) -> tuple[np.ndarray, tuple[int, int], dict[str, np.ndarray]]:
        original = self.source[index].image
        if not self.facts:
            return *canvas(original, self.side), {}
        if index not in self.known:  # two threads may both find them, and find the same
            self.known[index] = image_facts.find(self.facts, original)
        return *canvas(original, self.side), self.known[index]

    def batch(self, index: np.ndarray) -> dict[str, Any]:
        samples = [self.sample(int(i)) for i in index]
        facts = image_facts.empty(self.facts, len(samples))
        for i, (_, _, found) in enumerate(samples):
            for name, value in found.items():
                facts[name][i] = value
        return {
            "image": np.stack([image for image, _, _ in samples]),
            "size": np.asarray([size for _, size, _ in samples], np.int32),
            "facts": facts,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Batches in a fixed order; ``store`` holds the cached arrays of :func:`canvases`, or None."""

    store: dict[str, Any] | None
    samples: int
    batch_size: int
    _dataset: Any
    _read_options: Any

    def iterator(self) -> Iterator[dict[str, Any]]:
        """A fresh grain DatasetIterator over this process's batches, without end.

        It has ``get_state`` and ``set_state`` (the next batch's number) and can be checkpointed
        with grain.checkpoint.CheckpointSave.
        """
        return iter(self._dataset.to_iter_dataset(self._read_options))


def _refuse(samples: int, batch_size: int, process_index: int, process_count: int) -> None:
    if samples < 1:
        raise ConfigError("the training split has no sample; check config.data.")
    if batch_size < 1 or batch_size % process_count:
        raise ConfigError(
            f"batch size {batch_size}: expected a positive multiple of the {process_count} "
            "processes; every process reads an equal part."
        )
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process {process_index} of {process_count} does not exist.")


def make_pipeline(
    source: Source,
    *,
    canvas: int,
    cache: CacheMode,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    facts: Sequence[str] = (),
    progress: Progress | None = None,
) -> Pipeline:
    """The endless pipeline of this process's part (B = batch_size / process_count) of each batch.

    Every batch has ``index`` and ``epoch`` (B,) int32. With cache "host" and "none" also ``image``
    (B, canvas, canvas, 3) uint8, ``size`` (B, 2) and ``category`` (B,) int32, and ``facts``, a dict
    of arrays (B, ...) with the named facts of ``dsad.data.facts``, found once per image; with
    "device" the caller gathers from ``store`` by index. Batches run across the ends of epochs,
    nothing is dropped. Process p of P takes the elements p, p + P, ... of the global order.
    """
    import grain

    samples, side, facts = len(source), canvas, image_facts.check(facts)
    _refuse(samples, batch_size, process_index, process_count)
    if cache not in ("device", "host", "none"):
        raise ConfigError(f"config.data.cache: expected device, host or none; found {cache!r}.")
    store, stream = None, _Stream(source, side, facts)
    if cache != "none":
        store = canvases(source, side, facts=facts, progress=progress)
    category = _category_ids(source)

    def number(position: int, index: int) -> dict[str, np.integer]:
        return {"index": np.int32(index), "epoch": np.int32(position // samples)}

    def with_images(batch: dict[str, Any]) -> dict[str, Any]:
        index = batch["index"]
        if store is None:
            arrays = stream.batch(index)
        else:
            arrays = {name: store[name][index] for name in ("image", "size")}
            arrays["facts"] = {name: rows[index] for name, rows in store["facts"].items()}
        return {**batch, **arrays, "category": category[index]}

    order = grain.MapDataset.range(samples).seed(seed).shuffle().repeat().map_with_index(number)
    order = order[process_index::process_count].batch(batch_size // process_count)
    if cache != "device":
        order = order.map(with_images)
    threads = _THREADS if cache == "none" else 1
    return Pipeline(
        store=store,
        samples=samples,
        batch_size=batch_size,
        _dataset=order,
        _read_options=grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads),
    )
