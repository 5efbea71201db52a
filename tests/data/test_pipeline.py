"""The input pipeline: canvases, one order in every cache mode, resume, process shards."""

import jax
import numpy as np
import pytest
from PIL import Image

from dsad.core.batch import zeros
from dsad.core.errors import ConfigError, DataError
from dsad.core.mesh import MeshConfig, make_mesh, place_batch
from dsad.core.types import Record, Sample
from dsad.data import facts
from dsad.data.base import load
from dsad.data.canvases import canvases, place
from dsad.data.pipeline import make_pipeline
from dsad.train.cache import abstract_store, fetch_with, put_store
from tests.data import trees

SIDE = 20
FACTS = ("original_size", "foreground_box")


class Source:
    """Eleven images of different sizes in two categories; the first pixel tells which."""

    def __init__(self, count=11):
        self.records = [
            Record(path=f"{i}.png", category="ab"[i % 2], label=0, kind="good")
            for i in range(count)
        ]

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index, /):
        image = np.full((6 + index, 17 - index, 3), 10 * index + 1, np.uint8)
        return Sample(record=self.records[index], image=image, mask=None)


def spec(side=SIDE, names=()):
    return trees.batch_spec(side, names)


def pipeline(cache="device", batch_size=4, seed=0, source=None, names=(), **kwargs):
    source = Source() if source is None else source
    return make_pipeline(
        source, spec(names=names), cache=cache, batch_size=batch_size, seed=seed, **kwargs
    )


def canvas(image, side):
    out = zeros({"image": spec(side).read["image"]}, 1)["image"][0]
    return out, place(image, out)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def leaves(batch):
    """The arrays of a batch, those of its facts by their path."""
    facts = batch.get("facts", {})
    return {k: v for k, v in batch.items() if k != "facts"} | {
        f"facts/{name}": rows for name, rows in facts.items()
    }


def flat(batches, name="index"):
    return np.concatenate([b[name] for b in batches]).tolist()


def equal(left, right):
    for a, b in zip(map(leaves, left), map(leaves, right), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def test_canvas_keeps_a_small_image():
    image = trees.pixels(0)
    placed, size = canvas(image, 32)
    assert size == (16, 24)
    np.testing.assert_array_equal(placed[:16, :24], image)
    assert placed.shape == (32, 32, 3)
    assert not placed[16:].any()
    assert not placed[:, 24:].any()


@pytest.mark.parametrize(("shape", "size"), [((40, 80), (10, 20)), ((80, 40), (20, 10))])
def test_canvas_shrinks_a_large_image(shape, size):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    placed, found = canvas(image, SIDE)
    assert found == size
    expected = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(placed[: size[0], : size[1]], np.asarray(expected))


def test_canvas_never_loses_a_dimension():
    assert canvas(np.ones((1, 100, 3), np.uint8), 10)[1] == (1, 10)


def test_canvases():
    calls = []
    store = canvases(Source(), spec(), progress=lambda *args: calls.append(args))
    assert store.pop("facts") == {}
    assert {k: (v.shape, v.dtype.name) for k, v in store.items()} == {
        "image": ((11, 20, 20, 3), "uint8"),
        "size": ((11, 2), "int32"),
        "category": ((11,), "int32"),
    }
    assert store["category"].tolist() == [0, 1] * 5 + [0]
    assert store["size"][3].tolist() == [9, 14]
    assert store["image"][:, 0, 0, 0].tolist() == [10 * i + 1 for i in range(11)]
    assert [c[:2] for c in calls] == [(i, 11) for i in range(12)]


def test_broken_file_is_named(tmp_path):
    config = trees.mvtec(tmp_path)
    broken = tmp_path / "disc/train/good/001.png"
    broken.write_bytes(broken.read_bytes()[:300])
    source = load(config).source("train")
    with pytest.raises(DataError, match=r"disc/train/good/001.png: \[K8\]"):
        make_pipeline(source, spec(32), cache="device", batch_size=2, seed=0)
    streamed = make_pipeline(source, spec(32), cache="none", batch_size=6, seed=0)
    with pytest.raises(DataError, match=r"disc/train/good/001.png: \[K8\]"):
        next(streamed.iterator())


def test_epochs_are_different_permutations():
    batches = take(pipeline().iterator(), 11)  # 44 elements: four epochs
    index, epoch = flat(batches), flat(batches, "epoch")
    assert epoch == [e for e in range(4) for _ in range(11)]
    orders = [tuple(index[11 * e : 11 * e + 11]) for e in range(4)]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert len(set(orders)) == 4
    assert flat(take(pipeline(seed=1).iterator(), 11)) != index
    assert batches[0]["index"].dtype == np.int32
    assert batches[0]["epoch"].dtype == np.int32


def test_cache_modes_agree():
    device, host, none = (
        take(pipeline(cache).iterator(), 8) for cache in ("device", "host", "none")
    )
    equal(host, none)
    assert flat(device) == flat(host)
    assert flat(device, "epoch") == flat(host, "epoch")
    assert set(device[0]) == {"index", "epoch"}
    assert set(host[0]) == {"index", "epoch", "image", "size", "category", "facts"}
    batch = host[5]
    assert batch["image"][:, 0, 0, 0].tolist() == (10 * batch["index"] + 1).tolist()
    assert batch["category"].tolist() == (batch["index"] % 2).tolist()
    assert batch["size"].tolist() == [[6 + i, 17 - i] for i in batch["index"]]
    assert pipeline("none").store is None
    assert set(pipeline("host").store) == {"image", "size", "category", "facts"}


class Objects(Source):
    """The same, with one bright object in each, and a count of the images read."""

    def __init__(self, count=11):
        super().__init__(count)
        self.read = []

    def __getitem__(self, index, /):
        self.read.append(index)
        sample = super().__getitem__(index)
        sample.image[2:5, 3 : 4 + index % 3] = 255
        return sample


def test_facts_are_those_of_the_original_in_all_cache_modes():
    """Side 8 scales every image down; facts of the canvas would differ."""
    mesh = make_mesh(MeshConfig())
    found = {}
    for cache in ("device", "host", "none"):
        made = make_pipeline(Objects(), spec(8, FACTS), cache=cache, batch_size=8, seed=0)
        batches = take(made.iterator(), 6)
        if cache == "device":
            assert set(made.store["facts"]) == set(FACTS)
            for limit in (0, 2**30):
                places, gather = abstract_store(made.spec, 11, mesh, replicate_below=limit)
                store, fetch = put_store(made.store, places), fetch_with(gather, made.spec)
                gathered = [jax.jit(fetch)(store, place_batch(b, mesh)) for b in batches]
                found[limit] = jax.device_get(gathered)
        else:
            found[cache] = batches
    for other in ("none", 0, 2**30):
        equal(found["host"], found[other])
    for batch in found["host"]:
        index = batch["index"]
        assert batch["facts"]["original_size"].tolist() == [[6 + i, 17 - i] for i in index]
        assert batch["facts"]["original_size"].dtype == np.int32
        for i, row in zip(index, batch["facts"]["foreground_box"], strict=True):
            expected = facts.find(FACTS, Objects()[int(i)].image)["foreground_box"]
            np.testing.assert_array_equal(row, expected)
        assert batch["facts"]["foreground_box"].dtype == np.int32


def test_a_stream_finds_the_facts_of_an_image_once(monkeypatch):
    source, calls = Objects(), []

    def counted(image):
        calls.append(image.shape[:2])
        return facts.original_size(image)

    fact = facts.FACTS["original_size"]._replace(function=counted)
    monkeypatch.setattr(facts, "FACTS", {"original_size": fact})
    monkeypatch.setattr("dsad.data.canvases.THREADS", 1)
    stream = pipeline("none", batch_size=11, source=source, names=("original_size",)).iterator()
    batches = take(stream, 3)
    assert sorted(calls) == sorted((6 + i, 17 - i) for i in range(11))
    assert len(source.read) >= 33  # the images themselves are read in every epoch
    for batch in batches:
        sizes = [[6 + i, 17 - i] for i in batch["index"]]
        assert batch["facts"]["original_size"].tolist() == sizes


def test_batch_larger_than_the_set():
    (batch,) = take(pipeline("host", batch_size=25).iterator(), 1)
    assert batch["image"].shape == (25, SIDE, SIDE, 3)
    assert batch["epoch"].tolist() == [0] * 11 + [1] * 11 + [2] * 3


@pytest.mark.parametrize("cache", ["device", "host", "none"])
@pytest.mark.parametrize("position", [0, 1, 2, 3, 7])
def test_resume_is_exact(cache, position):
    iterator = pipeline(cache).iterator()
    take(iterator, position)
    state = iterator.get_state()
    expected = take(iterator, 5)
    fresh = pipeline(cache).iterator()
    take(fresh, 2)
    fresh.set_state(state)
    equal(take(fresh, 5), expected)


def test_resume_in_another_cache_mode():
    iterator = pipeline("device").iterator()
    take(iterator, 3)
    other = pipeline("none").iterator()
    other.set_state(iterator.get_state())
    assert flat(take(other, 4)) == flat(take(iterator, 4))


def test_checkpoint_through_orbax(tmp_path):
    import grain
    import orbax.checkpoint as ocp

    iterator = pipeline("host").iterator()
    take(iterator, 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        fresh = pipeline("host").iterator()
        restore = grain.checkpoint.CheckpointRestore(fresh)
        manager.restore(3, args=ocp.args.Composite(data=restore))
    equal(take(fresh, 4), take(iterator, 4))


@pytest.mark.parametrize("cache", ["device", "none"])
@pytest.mark.parametrize("count", [2, 4])
def test_the_parts_of_the_processes_make_the_one_stream(cache, count):
    whole = take(pipeline(cache, batch_size=8, names=FACTS).iterator(), 6)
    parts = [
        take(
            pipeline(
                cache, batch_size=8, process_index=p, process_count=count, names=FACTS
            ).iterator(),
            6,
        )
        for p in range(count)
    ]
    for step, batch in enumerate(map(leaves, whole)):
        for name in batch:
            pieces = np.concatenate([leaves(part[step])[name] for part in parts])
            np.testing.assert_array_equal(pieces, batch[name])


def test_a_store_of_some_rows_leaves_the_others_unread():
    whole = pipeline("device", names=FACTS).store
    some = pipeline("device", names=FACTS, rows=[1, 4]).store
    for name, values in leaves(some).items():
        if name != "category":  # of the index, no image is read for it
            np.testing.assert_array_equal(values[[1, 4]], leaves(whole)[name][[1, 4]])
            assert not values[[0, 2, 3]].any()


def test_refused_settings():
    with pytest.raises(ConfigError, match=r"batch size 5: expected a positive multiple of the 2"):
        pipeline(batch_size=5, process_count=2)
    with pytest.raises(ConfigError, match=r"no sample"):
        pipeline(source=Source(0))
    with pytest.raises(ConfigError, match=r"process 2 of 2 does not exist"):
        pipeline(process_index=2, process_count=2)
    with pytest.raises(ConfigError, match=r"found 'disk'"):
        pipeline("disk")
    with pytest.raises(ConfigError, match=r"'foreground_bax'. Did you mean 'foreground_box'"):
        pipeline(names=("foreground_bax",))
