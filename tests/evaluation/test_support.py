"""Support sets: drawn from seed, category and path alone; several seeds give mean and deviation."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.cli.evaluate import table
from dsad.core.detection import DetectorTraits, Scores
from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.types import Record
from dsad.evaluation import extract, stamp, support
from dsad.evaluation.localize import EvalConfig, localize, read_results, write_results
from dsad.evaluation.preprocessing import Preprocessing
from dsad.evaluation.results import Results
from dsad.evaluation.seeds import collect, repeat
from dsad.evaluation.support import Sampling
from tests.backbones import Plain
from tests.evaluation.test_localize import Distance, Planted, Pooled

INPUT = Preprocessing(height=48, width=48)

PATHS = [f"c/train/good/{i:03d}.png" for i in range(40)]


class Shuffled(Planted):
    """The same training images in another order of files."""

    def source(self, split, category=None):
        found = super().source(split, category)
        if split == "train":
            found.rows, found.records = found.rows[::-1], found.records[::-1]
        return found


def sampled(given):
    """The sampling that some of the keywords ask for, without them."""
    names = [n for n in Sampling.__dataclass_fields__ if n in given]
    return Sampling(**{n: given.pop(n) for n in names})


def run(dataset=None, detector=None, devices=1, mesh=None, **given):
    names = EvalConfig.__dataclass_fields__
    config = {n: given.pop(n) for n in list(given) if n in names}
    settings = {"image_size": 48, "batch_size": 4, "workers": 2} | config
    return localize(
        given.pop("backbone", None) or Pooled(), detector or Distance(),
        dataset or Planted(strength=9), EvalConfig(**settings),
        mesh=mesh or make_mesh(MeshConfig(), jax.devices()[:devices]),
        key=jax.random.key(3), sampling=sampled(given), **given,
    )  # fmt: skip


def test_draws_depend_on_seed_category_and_path_alone():
    rank = lambda p: hashlib.sha256(f"7\tc\t{p}".encode()).hexdigest()  # noqa: E731
    expected = tuple(sorted(sorted(PATHS, key=rank)[:4]))
    assert support.draw(PATHS, 4, 7, "c") == expected
    assert support.draw(PATHS[::-1], 4, 7, "c") == expected
    assert support.draw(PATHS, 4, 8, "c") != expected
    assert support.draw(PATHS, 4, 7, "d") != expected
    assert set(support.draw(PATHS, 2, 7, "c")) < set(expected)
    assert support.draw(PATHS[::-1], 0, 7, "c") == tuple(PATHS)


def test_draws_are_uniform():
    hits = np.zeros(40)
    for seed in range(400):
        hits[[PATHS.index(p) for p in support.draw(PATHS, 8, seed, "c")]] += 1
    # 400 draws of 8 of 40: 80 ± 8 per image.
    assert (abs(hits - 80) < 5 * 8).all()
    assert hits.std() == pytest.approx(8, rel=0.5)


def test_held_out_images_are_drawn_from_the_bank():
    given = {"shots": 0, "seeds": (0, 1), "holdout": lambda n: (2, 0)}
    chosen, other = support.choose(Planted(), ["disc"], **given)["disc"].values()
    paths = [f"disc/train/good/{i:03d}.png" for i in range(7)]
    ranked = sorted(paths, key=lambda p: hashlib.sha256(f"0\tdisc\t{p}".encode()).hexdigest())
    assert chosen.held_out == tuple(sorted(ranked[:2])) != other.held_out
    assert chosen.bank == tuple(paths)
    whole = support.choose(Planted(), ["disc"], shots=0, seeds=(0,))["disc"][0]
    assert (whole.bank, whole.held_out) == (tuple(paths), ())
    assert whole.sha256 != chosen.sha256


def grouped(*sizes):
    """Records of groups of these sizes; 0 is an image of no group."""
    groups = [(f"g{i}" if n else "", j) for i, n in enumerate(sizes) for j in range(n or 1)]
    return [
        Record(path=f"{i:03d}", category="c", label=0, kind="good", group=g)
        for i, (g, _) in enumerate(groups)
    ]


def test_groups_are_held_out_whole_and_at_most_half():
    records = grouped(3, 1, 4, 0, 2, 0, 2, 3)
    for seed in range(30):
        for groups, images in ((1, 0), (3, 0), (0, 5), (99, 99)):
            held = support.hold_out(records, seed, groups, images)
            named = {r.group or r.path for r in records if r.path in held}
            assert sorted(held) == [r.path for r in records if (r.group or r.path) in named]
            assert len(held) <= len(records) // 2
            enough = len(named) >= groups and len(held) >= images
            assert enough or groups == 99
            assert held == tuple(sorted(support.hold_out(records[::-1], seed, groups, images)))
    assert support.hold_out(grouped(5), 0, 1, 1) == ()
    assert len(support.hold_out(grouped(*[0] * 40), 0, 19, 8)) == 19
    assert len(support.hold_out(grouped(*[0] * 40), 0, 3, 8)) == 8
    assert len(support.hold_out(grouped(*[0] * 20), 0, 19, 4)) == 10


def test_sets_that_cannot_be_drawn_are_named_together():
    with pytest.raises(ConfigError, match=r"(?s)a: 7 training images, shots = 8.*b: 7"):
        run(Planted(categories=("a", "b")), shots=8)
    with pytest.raises(ConfigError, match="(?s)single training image cannot both.*Add images"):
        run(shots=1, false_alarm_rate=0.1)
    for seeds in ((), (1, 1), (-1,)):
        with pytest.raises(ConfigError, match="seeds: expected distinct"):
            run(seeds=seeds)
    with pytest.raises(ConfigError, match="shots"):
        run(shots=-1)


def test_a_model_sees_its_support_set_and_nothing_else():
    seen = {}

    class Watching(Distance):
        def fit(self, source, **given):
            rows = [(b.category, int(i)) for b in source for i in b.index[b.valid]]
            seen[len(seen)] = rows
            return super().fit(source, **given)

    results = run(Planted(categories=("a", "b")), Watching(), shots=2, seeds=(0, 5))
    assert [rows[0][0] for rows in seen.values()] == ["a", "a", "b", "b"]
    assert all([i for _, i in rows] == [0, 1] for rows in seen.values())
    listed = results.support
    assert listed["a"]["0"]["paths"] == list(
        support.draw([f"a/train/good/{i:03d}.png" for i in range(7)], 2, 0, "a")
    )
    assert {len(x["paths"]) for by_seed in listed.values() for x in by_seed.values()} == {2}
    assert results.stamp["support"]["shots"] == 2
    assert results.stamp["support"]["seeds"] == [0, 5]


def test_the_order_of_files_changes_nothing():
    left = run(Planted(strength=9), shots=3, seeds=(1,))
    right = run(Shuffled(strength=9), shots=3, seeds=(1,))
    assert left.mean == right.mean
    assert left.support == right.support
    assert stamp.differences(left.stamp, right.stamp) == []


def test_several_seeds_are_summarised():
    seeds = (0, 3, 9)
    alone = [run(Planted(categories=("a", "b"), strength=9), shots=1, seeds=(s,)) for s in seeds]
    together = run(Planted(categories=("a", "b"), strength=9), shots=1, seeds=seeds)
    assert alone[0].std == {}
    for m in together.metric_names:
        for c in "ab":
            values = [r.categories[c][m] for r in alone]
            assert together.categories[c][m] == pytest.approx(np.mean(values), abs=1e-7)
            spread = np.std(values, ddof=1)
            assert together.std["categories"][c][m] == pytest.approx(spread, abs=1e-7)
        means = [r.mean[m] for r in alone]
        assert together.mean[m] == pytest.approx(np.mean(means), abs=1e-7)
        assert together.std["mean"][m] == pytest.approx(np.std(means, ddof=1), abs=1e-7)
        kind = [r.kinds["a"]["red"][m] for r in alone]
        assert together.kinds["a"]["red"][m] == pytest.approx(np.mean(kind), abs=1e-7)
    assert max(together.std["mean"].values()) > 1e-4  # the seeds do differ
    for s, r in zip(seeds, alone, strict=True):
        assert together.seeds[str(s)]["mean"] == pytest.approx(r.mean, abs=1e-7)
    assert together.images == alone[0].images  # pictures are those of the first seed
    assert together.kinds["a"]["red"]["images"] == 3


def test_seeds_with_the_same_images_are_measured_once_where_nothing_is_drawn():
    fits, shown = [], []

    class Unseeded(Distance):
        traits = property(lambda self: DetectorTraits(sigma=self.sigma, seeded=False))

        def fit(self, source, **given):
            fits.append(1)
            return super().fit(source, **given)

    def found(detector, **given):
        fits.clear()
        shown.clear()
        data = Planted(categories=("a", "b"), strength=9)
        progress = lambda done, total, text: shown.append((done, total))  # noqa: E731
        return run(data, detector, progress=progress, seeds=(0, 1, 2), **given), len(fits)

    each, _ = found(Distance())
    once, count = found(Unseeded())
    assert count == 2  # one of each category
    assert shown[-1][0] == shown[-1][1]
    for field in ("seeds", "std", "mean", "kinds", "images", "support"):
        assert getattr(once, field) == getattr(each, field)
    assert once.categories["b"]["measured_once"] == {"0": [1, 2]}
    assert once.categories["b"]["notes"] == [
        "seeds 0, 1, 2 fit on the same images and nothing is drawn: measured once"
    ]
    assert "notes" not in each.categories["b"]
    assert once.stamp["detector_state"] == each.stamp["detector_state"]
    assert set(once.std["mean"].values()) == {0.0}
    assert "±" not in str(table(once).columns[2]._cells)
    assert "without ±: the same with every seed" in table(once).caption

    def drawn(results):
        """How many sets, of both categories: two seeds may draw the same."""
        return sum(len({own["sha256"] for own in x.values()}) for x in results.support.values())

    few, count = found(Unseeded(), shots=2)
    assert count == drawn(few) > 2  # other images
    split, count = found(Unseeded(), false_alarm_rate=0.2, holdout=2)
    assert count == 2 * drawn(split) > 4  # others are held out
    assert split.thresholds == found(Distance(), false_alarm_rate=0.2, holdout=2)[0].thresholds


def test_of_which_seed_numbers_were_repeated():
    made = Results(stamp={"detector_state": {"a": {}}}, categories={"a": {}})
    for measured, again in ((0, 1), (2, 3), (0, 4)):
        if str(measured) not in made.seeds:
            collect(made, "a", measured, {"image_ap": measured / 8}, {}, {"fit": 1.0})
            made.stamp["detector_state"]["a"][str(measured)] = {"rows": measured}
        repeat(made, ["a"], "a", measured, again)
    assert made.categories["a"] == {"measured_once": {"0": [1, 4], "2": [3]}, "seconds": {"fit": 2}}
    assert [s["categories"]["a"]["image_ap"] for s in made.seeds.values()] == [0, 0, 0.25, 0.25, 0]
    assert made.stamp["detector_state"]["a"]["3"] == {"rows": 2}


def test_seeds_survive_the_files_and_unequal_support_is_refused(tmp_path):
    results = run(shots=2, seeds=(0, 1), false_alarm_rate=0.2, holdout=2)
    write_results(results, tmp_path)
    again = read_results(tmp_path)
    for field in ("seeds", "std", "support", "thresholds"):
        assert getattr(again, field) == getattr(results, field)
    lines = stamp.differences(results.stamp, run(shots=2, seeds=(0, 2)).stamp)
    assert [x.partition(":")[0] for x in lines][:2] == ["support.seeds", "support.sha256"]
    assert any(x.startswith("thresholds") for x in lines)


@pytest.mark.parametrize(("limit", "passes"), [(1024, 1), (0, 3)])
def test_test_features_are_computed_once_if_they_fit(monkeypatch, limit, passes):
    calls = []
    features = extract.Extractor.__call__
    monkeypatch.setattr(
        extract.Extractor, "__call__",
        lambda self, images: calls.append(len(images)) or features(self, images),
    )  # fmt: skip
    results = run(shots=1, seeds=(0, 1, 2), cache_mb=limit)
    test_batches = 3  # 11 images in batches of 4
    train_batches = 3 * (1 if limit else 2)  # ``Distance`` reads its source twice
    assert len(calls) == passes * test_batches + train_batches
    kept = results.categories["disc"]["features_between_seeds"]
    assert (kept["kept_bytes"] > 0) == (limit > 0)
    assert kept["recomputed"] == ([] if limit else ["disc/test", "disc/train"])
    if not limit:
        assert run(shots=1, seeds=(0, 1, 2)).mean == results.mean


def test_a_detector_draws_by_seed_and_seed_0_is_the_plain_key():
    keys = {}

    class Keyed(Distance):
        def fit(self, source, *, key, **given):
            keys.setdefault("used", []).append(tuple(stamp.key_data(key)))
            return super().fit(source, key=key, **given)

    run(detector=Keyed(), seeds=(0, 1))
    run(detector=Keyed())
    assert keys["used"][0] == keys["used"][2] != keys["used"][1]


# --- many categories ------------------------------------------------------------------------


class Unequal(Planted):
    """Categories with 3, 5 and 7 training images."""

    def source(self, split, category=None):
        found = super().source(split, category)
        if split == "train" and category is not None:
            n = 3 + 2 * self.categories.index(category)
            found.rows, found.records = found.rows[:n], found.records[:n]
        return found


def test_one_program_scores_categories_of_unequal_size():
    traced = []

    class Counting(Distance):
        def score(self, state, features, *, mesh=None):
            traced.append(1)
            return super().score(state, features)

    Pooled.traced = 0
    results = run(Unequal(categories=("a", "b", "c")), Counting())
    assert [results.categories[c]["counts"]["train"] for c in "abc"] == [3, 5, 7]
    assert len(traced) == 1
    assert Pooled.traced == 1


def test_one_model_for_all_categories(devices):
    fits = []

    class Watching(Distance):
        def fit(self, source, **given):
            fits.append([(b.category, b.index[b.valid].tolist()) for b in source])
            return super().fit(source, **given)

    dataset = Unequal(categories=("a", "b"), strength=9)
    results = run(dataset, Watching(), mesh=make_mesh(MeshConfig(), devices), pooled=True)
    rows = [(c, i) for c, index in fits[0] for i in index]
    assert len(fits) == 1
    assert rows == [("a", i) for i in range(3)] + [("b", i) for i in range(3, 8)]
    assert list(results.categories) == ["a", "b"]
    assert results.stamp["model"] == "one for all categories"
    assert list(results.stamp["detector_state"]) == ["all categories"]
    images = [
        dataset.source("train", c)[i].image for c, n in (("a", 3), ("b", 5)) for i in range(n)
    ]
    centre = np.mean([((INPUT.to_input(x) / 255 - 0.5) / 0.25).mean((0, 1)) for x in images], 0)
    test = dataset.source("test", "b")
    cells = (INPUT.to_input(test[7].image) / 255 - 0.5) / 0.25
    cells = cells.reshape(12, 4, 12, 4, 3).mean((1, 3))
    expected = np.linalg.norm(cells - centre, axis=-1).max()
    assert results.images["b"][7]["score"] == pytest.approx(expected, rel=1e-5)
    lines = stamp.differences(results.stamp, run(dataset, Watching()).stamp)
    assert [x.partition(":")[0] for x in lines] == ["model"]


def test_one_backbone_per_category_shares_a_program():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Weighted(Plain):
        weight: jax.Array

        def maps(self, images):
            traced.append(self.layers)
            maps = Pooled()(images)
            return {n: m * self.weight for n, m in maps.items()}

    traced = []
    weights = {"a": 1.0, "b": 2.0}
    dataset = Planted(categories=("a", "b"), strength=9)
    made = run(dataset, backbone_of=lambda c: Weighted(jnp.float32(weights[c]), description=c))
    assert traced.count(("colour",)) == 1
    assert made.stamp["backbone"]["per_category"]["b"]["weights"] == "b"
    for c in "ab":
        own = run(dataset, backbone=Weighted(jnp.float32(weights[c])), categories=[c])
        assert made.images[c] == own.images[c]
    with pytest.raises(ConfigError, match="one backbone"):
        run(dataset, backbone_of=lambda c: None, pooled=True)


def test_a_score_gets_a_mesh_of_several_devices(devices):
    seen = []

    class Meshed(Distance):
        def score(self, state, features, *, mesh=None):
            seen.append(mesh)
            return super().score(state, features)

    mesh = make_mesh(MeshConfig(), devices)
    results = run(detector=Meshed(), mesh=mesh)
    assert seen == [mesh if len(devices) > 1 else None]
    expected = run(detector=Distance())
    assert results.mean == pytest.approx(expected.mean, abs=1e-6)


def test_knn_gives_equal_numbers_on_1_and_8_devices():
    from dsad.core.config import resolve

    module = resolve("detectors", "knn")
    detector = module.build(module.Config(layers=("colour",), neighbourhood=1))
    one, eight = (run(detector=detector, devices=n, batch_size=8) for n in (1, 8))
    assert eight.mean == pytest.approx(one.mean, abs=1e-6)
    for a, b in zip(one.images["disc"], eight.images["disc"], strict=True):
        assert b["score"] == pytest.approx(a["score"], rel=1e-5)
    state = one.stamp["detector_state"]["disc"]["0"]
    assert state == {
        "bytes": 1024 * 3 * 4 + 4, "arrays": {"bank": [1024, 3]}, "bank_rows": 7 * 144,
        "numbers": {"rows": 7 * 144},
    }  # fmt: skip


def test_state_sizes_of_padded_banks():
    state = {"bank": jnp.zeros((8, 2)), "rows": jnp.int32(5)}
    assert stamp.describe_state(state)["bank_rows"] == 5
    assert stamp.describe_state(Scores(map=jnp.zeros(3), image=jnp.zeros(2)))["bytes"] == 20


def test_rotations_enlarge_the_bank_alone():
    """A quarter turn of a square image moves its pixels; anything is mirrored beyond borders."""
    config = support.SupportConfig(rotations=4)
    source = Planted().source("train")
    turned = config.applied(source)
    assert len(turned) == 4 * len(source)
    assert [r.path for r in turned.records[:8:4]] == [r.path for r in source.records[:2]]
    np.testing.assert_array_equal(turned[4].image, source[1].image)
    height, width = source[1].image.shape[:2]
    half = source[1].image[::-1, ::-1]
    np.testing.assert_array_equal(turned[6].image, half)
    side = min(height, width) // 2 - 1
    rows, columns = (slice(n // 2 - side, n // 2 + side) for n in (height, width))
    quarter = np.rot90(source[1].image[rows, columns], 1)
    np.testing.assert_array_equal(turned[5].image[rows, columns], quarter)
    assert turned[5].image.min() >= source[1].image.min()  # no black corners
    seen = []

    class Counting(Distance):
        def fit(self, source, **given):
            seen.append(sum(int(batch.valid.sum()) for batch in source))
            return super().fit(source, **given)

    results = run(detector=Counting(), shots=3, support=config, false_alarm_rate=0.5)
    assert seen == [12, 8]  # three images, four times each; then without the one held out
    assert results.stamp["support"]["rotations"] == 4


def test_brightness_is_drawn_for_every_image():
    source = Planted().source("train")
    lit = support.SupportConfig(brightness=0.2).applied(source)
    factors = []
    for i in range(len(source)):
        image = np.float64(source[i].image)
        factor = (lit[i].image * image).sum() / (image**2).sum()
        expected = np.clip(factor * image, 0, 255)
        np.testing.assert_allclose(lit[i].image, expected, atol=1.5)
        factors.append(factor)
        assert lit[i].image.dtype == np.uint8
    assert 0.8 <= min(factors) < 0.95 < 1.05 < max(factors) <= 1.2
    again = support.SupportConfig(brightness=0.2, rotations=2).applied(source)
    np.testing.assert_array_equal(again[2].image, lit[1].image)
    np.testing.assert_array_equal(again[3].image, lit[1].image[::-1, ::-1])
    assert support.AS_DRAWN.describe() == {"rotations": 1}
    assert support.SupportConfig(brightness=0.2).describe()["brightness"] == 0.2
