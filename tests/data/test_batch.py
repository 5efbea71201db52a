"""A batch holds the same bits, whatever keeps the images and however many processes read them."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dsad.assembly import evaluate
from dsad.core.batch import Companions, shapes
from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh, place_batch
from dsad.core.tree import flatten
from dsad.data import records_builder
from dsad.data.base import DataConfig, load
from dsad.data.combined import training_source
from dsad.data.pipeline import make_pipeline
from dsad.train.cache import abstract_store, fetch_with, put_store
from tests.data import trees

SIDE, BATCH = 16, 8
ASKED = {
    "label": True, "group": True, "mask": True,
    "companions": Companions(count=3, same=("category",)),
}  # fmt: skip
FACTS = ("original_size", "foreground_box")
SPEC = trees.batch_spec(SIDE, FACTS, **ASKED)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Twelve images of several sizes; one anomalous image has no mask, another has two."""
    root = tmp_path_factory.mktemp("set")
    g = np.random.default_rng(0)

    def save(path, height, width, mask=None):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = g.integers(0, 256, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels if mask is None else mask).save(root / path)

    for i in range(5):
        save(f"disc/train/good/{i}.png", 10 + 7 * i, 30)
    for i in range(2):
        save(f"disc/test/good/{i}.png", 12, 12)
    for i in range(5):
        save(f"disc/test/dent/{i}.png", 20 + 4 * i, 36)
        if i:
            mask = np.zeros((20 + 4 * i, 36), np.uint8)
            mask[4 * i : 4 * i + 5, 3:29] = 255
            save(f"disc/ground_truth/dent/{i}_mask.png", 0, 0, mask)
    return DataConfig(
        name="mvtec", root=str(root), missing_masks="image_only", split="all", canvas=SIDE
    )


@pytest.fixture(scope="module")
def sources(config, tmp_path_factory):
    """The samples as files, as records of these, and as records of canvases."""
    found = {"files": load(config)}
    for name, side in (("records", 0), ("canvases", SIDE)):
        folder = tmp_path_factory.mktemp("out") / name
        records_builder.write(records_builder.plan(found["files"], side), str(folder))
        found[name] = load(
            DataConfig(name="records", root=str(folder), missing_masks="image_only", split="all")
        )
    return {name: training_source(data, "all") for name, data in found.items()}


def pipeline(source, cache, **how):
    return make_pipeline(source, SPEC, cache=cache, batch_size=BATCH, seed=1, **how)


def take(made, count=3):
    batches = made.iterator()
    try:
        return [flatten(next(batches)) for _ in range(count)]
    finally:
        batches.close()


def same(left, right):
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype, name
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture(scope="module")
def expected(sources):
    return take(pipeline(sources["files"], "host"))


@pytest.mark.parametrize("kind", ["files", "records", "canvases"])
@pytest.mark.parametrize(
    ("cache", "workers"),
    [("host", 0), ("none", 0), pytest.param("none", 2, marks=pytest.mark.slow)],
)
def test_the_same_in_every_cache_and_from_every_source(sources, expected, kind, cache, workers):
    same(take(pipeline(sources[kind], cache, workers=workers)), expected)
    names = shapes(SPEC.whole, BATCH)
    assert {p: (a.shape, a.dtype) for p, a in flatten(names).items()} == {
        p: (a.shape, a.dtype) for p, a in expected[0].items()
    }


@pytest.mark.parametrize("kind", ["files", "canvases"])
@pytest.mark.parametrize("limit", [0, 2**30], ids=["split", "replicated"])
def test_the_same_from_the_devices(sources, expected, devices, kind, limit):
    made, mesh = pipeline(sources[kind], "device"), make_mesh(MeshConfig(), devices)
    places, gather = abstract_store(SPEC, made.samples, mesh, replicate_below=limit)
    store, fetch = put_store(made.store, places), jax.jit(fetch_with(gather, SPEC))
    batches = made.iterator()
    gathered = [fetch(store, place_batch(next(batches), mesh)) for _ in range(3)]
    same([flatten(jax.device_get(b)) for b in gathered], expected)


@pytest.mark.parametrize("cache", ["host", "none"])
def test_the_parts_of_two_processes_are_the_batch(sources, expected, cache):
    parts = [
        take(pipeline(sources["files"], cache, process_index=p, process_count=2)) for p in (0, 1)
    ]
    joined = [
        {name: np.concatenate([a[name], b[name]]) for name in a}
        for a, b in zip(*parts, strict=True)
    ]
    same(joined, expected)


def test_masks_lie_on_their_images(sources, expected):
    """Nearest neighbour at the size that the image has on its canvas, by an oracle of its own."""
    source, seen = sources["files"], set()
    for batch in expected:
        for row, index in enumerate(batch["index"].tolist()):
            sample = source[index]
            height, width = batch["size"][row]
            want = np.zeros((SIDE, SIDE), np.uint8)
            if sample.mask is not None:
                full = Image.fromarray(sample.mask)
                want[:height, :width] = full.resize((width, height), Image.Resampling.NEAREST)
            np.testing.assert_array_equal(batch["mask"][row], want)
            assert batch["masked"][row] == (sample.mask is not None)
            assert batch["label"][row] == sample.record.label
            seen.add((int(batch["label"][row]), int(batch["masked"][row]), bool(want.any())))
    assert seen == {(0, 1, False), (1, 0, False), (1, 1, True)}


def test_references_are_the_canvases_of_normal_others(sources, expected):
    plain = pipeline(sources["files"], "host").store
    for batch in expected:
        chosen = batch["references/index"]
        assert batch["references/valid"].all()
        for name in ("image", "size"):
            np.testing.assert_array_equal(batch[f"references/{name}"], plain[name][chosen])
        assert (plain["label"][chosen] == 0).all()
        assert (chosen != batch["index"][:, None]).all()


@pytest.mark.parametrize(("batch_size", "processes"), [(4, 1), (8, 1), (8, 2), (6, 2)])
@pytest.mark.parametrize("cache", ["device", "host", "none"])
def test_a_pass_has_every_sample_exactly_once(sources, cache, batch_size, processes):
    parts = [
        list(
            make_pipeline(
                sources["files"], SPEC, cache=cache, batch_size=batch_size, seed=0,
                process_index=p, process_count=processes,
            ).one_pass()
        )
        for p in range(processes)
    ]  # fmt: skip
    _check_pass(parts, 12)


@pytest.mark.slow
def test_a_pass_by_worker_processes(sources):
    """More of them than batches, of which the last is filled up."""
    pipeline = make_pipeline(
        sources["files"], SPEC, cache="none", batch_size=8, seed=0,
        process_index=0, process_count=1, workers=3,
    )  # fmt: skip
    _check_pass([list(pipeline.one_pass())], 12)


def _check_pass(parts, samples):
    batch_size = sum(len(part[0][0]["index"]) for part in parts)
    seen = []
    for batches in zip(*parts, strict=True):
        rows = {count for _, count in batches}
        assert len(rows) == 1
        whole = np.concatenate([batch["index"] for batch, _ in batches])
        assert len(whole) == batch_size
        seen += whole[: rows.pop()].tolist()
    assert seen == list(range(samples))


def test_several_masks_of_an_image_are_one(tmp_path, config):
    data = load(config)
    extra = np.zeros((24, 36), np.uint8)
    extra[20:, 30:] = 255
    Image.fromarray(extra).save(tmp_path / "more.png")
    records = tuple(
        dataclasses.replace(r, masks=(*r.masks, str(tmp_path / "more.png")))
        if r.path.endswith("dent/1.png")
        else r
        for r in data.splits["test"]
    )
    source = dataclasses.replace(data, splits={**data.splits, "test": records}).source("test")
    index = next(i for i, r in enumerate(records) if len(r.masks) == 2)
    one = load(config).source("test")[index].mask
    np.testing.assert_array_equal(source[index].mask, one | (extra > 0))


def test_canvases_of_a_split_refuse_the_other(config, tmp_path):
    train = records_builder.plan(load(dataclasses.replace(config, split="train")), SIDE)
    assert train.bytes == 5 * SIDE**2 * 3
    planned = records_builder.plan(load(dataclasses.replace(config, split="test")), SIDE)
    assert planned.bytes == 7 * SIDE**2 * 4, "defects come with masks"
    records_builder.write(planned, str(tmp_path / "out"))
    made = load(DataConfig(name="records", root=str(tmp_path / "out"), missing_masks="image_only"))
    assert len(made.source("test")) == 7
    with pytest.raises(ConfigError, match="canvases of the test images alone, not of the train"):
        made.source("train")


def test_canvases_are_not_evaluated(config, tmp_path):
    """They are smaller than the images, so the numbers would not be comparable."""
    records_builder.write(records_builder.plan(load(config), SIDE), str(tmp_path / "out"))
    evaluation = evaluate.default_config("knn")
    evaluation.weights = "random"
    evaluation.data.update(name="records", root=str(tmp_path / "out"), missing_masks="image_only")
    with pytest.raises(ConfigError, match="holds canvases for training"):
        evaluate.prepare(evaluation, Console())
    evaluation.data.split = "all"
    with pytest.raises(ConfigError, match="split: 'all' is for pretraining"):
        evaluate.prepare(evaluation, Console())
