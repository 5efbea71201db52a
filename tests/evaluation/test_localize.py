"""The localization run against planted answers, geometry, padding, devices, files."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from scipy import ndimage
from sklearn import metrics as oracle

from dsad.core.detection import DetectorTraits, Scores
from dsad.core.errors import ConfigError, DataError, WorkdirError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.types import Record, Sample
from dsad.evaluation.compiled import finished
from dsad.evaluation.localize import EvalConfig, localize, read_results, write_results
from dsad.evaluation.preprocessing import Preprocessing
from dsad.evaluation.report import gallery
from tests.backbones import Plain

NUMBERS = {
    *("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max"),
    *("aupro_30", "aupro_05"),
}


class Planted:
    """Grey noise images of 60 × 40 (height × width); defects are a colour at known pixels."""

    name = "planted"
    protocol = types.MappingProxyType({"name": "planted", "split": "by hand"})

    def __init__(self, categories=("disc",), noise=6, strength=60, without_mask=0, good=5):
        self.categories = tuple(categories)
        self.noise, self.strength, self.without_mask, self.good = (
            noise,
            strength,
            without_mask,
            good,
        )

    def source(self, split, category=None):
        rows = []
        for c in self.categories if category is None else [category]:
            if split == "train":
                rows += [(c, "good", i) for i in range(7)]
            else:
                rows += [(c, "good", i) for i in range(self.good)]
                rows += [(c, kind, i) for kind in ("blue", "red") for i in range(3)]
        return PlantedSource(self, split, rows)


class PlantedSource:
    def __init__(self, owner, split, rows):
        self.owner, self.split, self.rows = owner, split, rows
        self.records = [
            Record(
                path=f"{c}/{split}/{kind}/{i:03d}.png",
                category=c,
                label=int(kind != "good"),
                kind=kind,
                masks=() if kind == "good" else (f"{c}/ground_truth/{kind}/{i:03d}_mask.png",),
            )
            for c, kind, i in rows
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        _, kind, number = self.rows[index]
        owner, record = self.owner, self.records[index]
        seed = sum(map(ord, record.path))
        rng = np.random.default_rng(seed)
        image = 120 + rng.integers(-owner.noise, owner.noise + 1, (60, 40, 3))
        mask = np.zeros((60, 40), bool)
        if kind != "good":
            row, column = 6 + 15 * number, 5 + 9 * number
            mask[row : row + 12, column : column + 10] = True
            image[mask] += np.array([0, 0, 1] if kind == "blue" else [1, 0, 0]) * owner.strength
        lost = kind != "good" and number < owner.without_mask
        return Sample(record=record, image=image.astype(np.uint8), mask=None if lost else mask)


@dataclasses.dataclass(frozen=True)
class Pooled(Plain):
    """Mean colour of 4 × 4 pixels as features: an untrained backbone with a known answer."""

    traced = 0  # how often with just the maps that a detector reads

    def maps(self, images):
        Pooled.traced += self.layers is not None
        b, h, w, c = images.shape
        cells = images.reshape(b, h // 4, 4, w // 4, 4, c).mean((2, 4))
        return {"colour": cells, "unused": cells}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance:
    """Distance to the mean training cell; the mean is taken over valid rows only."""

    layers: tuple[str, ...] = ("colour",)
    power: float = 1.0
    sigma: float = 1.0
    traits = property(lambda self: DetectorTraits(sigma=self.sigma))
    config = property(lambda self: self)

    def fit(self, source, *, mesh, key, progress, trained=None):
        seen = []
        for _ in range(2):  # the source is re-iterable
            total, count = np.zeros(3), 0
            for batch in source:
                cells = np.asarray(batch.maps["colour"])
                assert (batch.index[batch.valid] >= 0).all()
                total += cells[batch.valid].astype(np.float64).sum((0, 1, 2))
                count += batch.valid.sum() * cells.shape[1] * cells.shape[2]
            seen.append(total / count)
        assert np.array_equal(*seen)
        return {"mean": jnp.asarray(seen[0], jnp.float32)}

    def score(self, state, features, *, mesh=None):
        cells = features["colour"] - state["mean"][None, None, None, :]
        found = jnp.sqrt(jnp.sum(cells**2, -1)) ** self.power
        return Scores(map=found, image=found.max((1, 2)))


def run(dataset=None, devices=1, mesh=None, **config):
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:devices])
    settings = {"image_size": 48, "batch_size": 4, "workers": 2} | config
    return localize(
        Pooled(),
        Distance(),
        dataset or Planted(),
        EvalConfig(**settings),
        mesh=mesh,
        key=jax.random.key(3),
    )


def test_results_on_a_prompt_are_numbers_without_pictures():
    results = run()
    assert results.gallery
    assert "array(" not in repr(results)
    assert repr(results.mean) in repr(results)


def test_planted_defects_are_found():
    results = run()
    row = results.categories["disc"]
    assert set(row) == NUMBERS | {"counts", "seconds"}
    assert row["image_auroc"] == 1.0
    assert row["image_ap"] == pytest.approx(1.0, abs=1e-12)
    assert row["pixel_auroc"] > 0.97
    assert row["counts"] == {
        "train": 7,
        "normal": 5,
        "anomalous": 6,
        "anomalous_without_mask": 0,
        "anomalous_with_empty_mask": 0,
    }
    assert results.mean == {m: row[m] for m in NUMBERS}
    assert set(results.kinds["disc"]) == {"blue", "red"}
    assert set(results.kinds["disc"]["red"]) == NUMBERS | {"images"}
    assert [x["kind"] for x in results.images["disc"]] == ["good"] * 5 + ["blue"] * 3 + ["red"] * 3


def test_numbers_equal_an_independent_pipeline():
    """Weak defects: numpy, Pillow, scipy and scikit-learn all the way, in float64."""
    dataset = Planted(strength=4)
    results = run(dataset)
    train = [dataset.source("train", "disc")[i].image for i in range(7)]

    def cells(image):
        small = np.asarray(PIL.Image.fromarray(image).resize((48, 48), PIL.Image.BILINEAR))
        return ((small / 255 - 0.5) / 0.25).reshape(12, 4, 12, 4, 3).mean((1, 3))

    centre = np.mean([cells(x) for x in train], (0, 1, 2))
    test = dataset.source("test", "disc")
    scores, maps, masks = [], [], []
    for i in range(len(test)):
        found = np.linalg.norm(cells(test[i].image) - centre, axis=-1)
        scores.append(found.max())
        wide = sampled(found, 48, 48)
        smooth = ndimage.gaussian_filter(wide, 1.0, mode="reflect", truncate=4.0)
        maps.append(sampled(smooth, 60, 40))
        masks.append(test[i].mask)
    labels = [r.label for r in test.records]
    row = results.categories["disc"]
    assert row["image_auroc"] == pytest.approx(oracle.roc_auc_score(labels, scores), abs=1e-6)
    assert row["image_ap"] == pytest.approx(
        oracle.average_precision_score(labels, scores), abs=1e-6
    )
    flat, truth = np.ravel(maps), np.ravel(masks)
    assert 0.5 < row["pixel_auroc"] < 0.999
    assert row["pixel_auroc"] == pytest.approx(oracle.roc_auc_score(truth, flat), abs=1e-5)
    assert row["pixel_ap"] == pytest.approx(oracle.average_precision_score(truth, flat), abs=1e-4)
    for entry, expected, scored in zip(results.images["disc"], scores, maps, strict=True):
        assert entry["score"] == pytest.approx(expected, rel=1e-5)
        assert entry["max"] == pytest.approx(scored.max(), rel=1e-5)


def sampled(values, height, width):
    """Bilinear samples at half-pixel centres, by scipy."""
    rows = (np.arange(height) + 0.5) * values.shape[0] / height - 0.5
    columns = (np.arange(width) + 0.5) * values.shape[1] / width - 0.5
    at = np.meshgrid(
        rows.clip(0, values.shape[0] - 1), columns.clip(0, values.shape[1] - 1), indexing="ij"
    )
    return ndimage.map_coordinates(values, at, order=1, mode="nearest")


@pytest.mark.parametrize(("row", "column"), [(0, 0), (17, 31), (59, 39), (40, 3)])
def test_a_peak_comes_back_to_its_original_pixel(row, column):
    image = np.zeros((60, 40, 3), np.uint8)
    image[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = 255
    preprocessing = Preprocessing(height=224, width=200)
    small = preprocessing.to_input(image)[..., 0].astype(np.float32)
    assert small.shape == preprocessing.size
    # A map that is blurred at network input, as a real one is.
    back = preprocessing.to_original(ndimage.gaussian_filter(small, 3.0), (60, 40))
    peak = np.unravel_index(back.argmax(), back.shape)
    assert back.shape == (60, 40)
    assert max(abs(peak[0] - row), abs(peak[1] - column)) <= 1


def test_a_perfect_map_is_perfect_on_original_pixels():
    mask = np.zeros((60, 40), bool)
    mask[21:37, 8:15] = True
    image = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, -1)
    preprocessing = Preprocessing(height=240, width=240)
    back = preprocessing.to_original(preprocessing.to_input(image)[..., 0], (60, 40))
    assert oracle.roc_auc_score(mask.ravel(), back.ravel()) == 1.0
    assert np.array_equal(back > 127, mask)


def test_to_original_matches_scipy_when_shrinking_too():
    values = np.random.default_rng(0).normal(size=(50, 50))
    back = Preprocessing(height=50, width=50).to_original(values, (33, 90))
    np.testing.assert_allclose(back, sampled(values, 33, 90), atol=1e-5)


@pytest.mark.parametrize(("devices", "batch"), [(1, 5), (1, 64), (8, 8), (8, 3)])
def test_batches_and_devices_do_not_change_numbers(devices, batch):
    dataset = Planted(strength=9)
    expected, found = run(dataset, batch_size=1), run(dataset, devices, batch_size=batch)
    for name in NUMBERS:
        assert found.mean[name] == pytest.approx(expected.mean[name], abs=1e-6)
    for a, b in zip(expected.images["disc"], found.images["disc"], strict=True):
        assert b["path"] == a["path"]
        assert b["score"] == pytest.approx(a["score"], rel=1e-6)
        assert b["max"] == pytest.approx(a["max"], rel=1e-5)


def test_one_compilation_serves_all_categories():
    Pooled.traced = 0
    results = run(Planted(categories=("a", "b", "c")))
    assert Pooled.traced == 1
    assert list(results.categories) == ["a", "b", "c"]
    values = [results.categories[c]["pixel_ap"] for c in "abc"]
    assert results.mean["pixel_ap"] == pytest.approx(np.mean(values))


def test_images_without_mask_count_for_image_numbers_only():
    full, partial = run(Planted(strength=9)), run(Planted(strength=9, without_mask=1))
    counts = partial.categories["disc"]["counts"]
    assert counts["anomalous"] == 6
    assert counts["anomalous_without_mask"] == 2
    assert partial.mean["image_auroc"] == full.mean["image_auroc"]
    assert partial.mean["pixel_ap"] != full.mean["pixel_ap"]
    none = [x for x in partial.images["disc"] if x["label"] and x["pixel_auroc"] is None]
    assert len(none) == 2


def test_other_limits_are_named():
    assert [m for m in run(fpr_limit=0.05).mean if m.startswith("aupro")] == ["aupro_05"]
    assert EvalConfig(fpr_limit=0.1).metric_names[-2:] == ("aupro_10", "aupro_05")
    with pytest.raises(ConfigError, match="fpr_limit"):
        EvalConfig(fpr_limit=0.0)
    with pytest.raises(ConfigError, match="batch_size"):
        EvalConfig(batch_size=0)


def test_counting_measures_the_same_as_sorting():
    exact, counted = run(), run(method="streaming")
    assert counted.metric_names == exact.metric_names
    row = counted.categories["disc"]
    assert row["error_bound"] <= 1e-5
    for name in NUMBERS:
        expected = exact.categories["disc"][name]
        assert row[name] == pytest.approx(expected, abs=row["error_bound"] + 1e-12)
    assert counted.curves.keys() == exact.curves.keys()
    with pytest.raises(ConfigError, match="evaluation.method"):
        EvalConfig(method="fast")  # type: ignore[arg-type]


def test_missing_layer_and_category_list_what_exists():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    given = {"mesh": mesh, "key": jax.random.key(0)}
    config = EvalConfig(image_size=48)
    with pytest.raises(ConfigError, match=r"no feature map layer9; it has: colour, unused"):
        localize(Pooled(), Distance(layers=("layer9",)), Planted(), config, **given)
    with pytest.raises(ConfigError, match=r"cup not in planted, which has: disc"):
        localize(Pooled(), Distance(), Planted(), config, categories=["cup"], **given)
    with pytest.raises(DataError, match=r"uint8"):
        Preprocessing(height=8, width=8).to_input(np.zeros((4, 4, 3), np.float32))


def test_progress_reaches_the_total():
    seen = []
    localize(
        Pooled(),
        Distance(),
        Planted(),
        EvalConfig(image_size=48),
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
        key=jax.random.key(0),
        progress=lambda done, total, text: seen.append((done, total, text)),
    )
    assert seen[-1][0] == seen[-1][1] == 18
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)
    assert {s[1] for s in seen} == {18}  # from the start
    texts = [s[2] for s in seen]
    assert texts[0] == "compiling …"
    for what in ("train features", "scores"):
        before = texts.index(f"compiling …  {what}: disc")
        assert texts[before + 1] == f"{what}: disc"


def test_results_survive_the_files(tmp_path):
    results = run(Planted(categories=("a", "b"), strength=9))
    path = write_results(results, tmp_path / "out")
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "curves.npz",
        "gallery.npz",
        "results.json",
    ]
    content = json.loads(path.read_text())
    assert set(content) >= {"stamp", "categories", "mean", "kinds", "images"}
    assert set(content["categories"]["a"]) >= NUMBERS
    assert set(content["mean"]) == NUMBERS
    again = read_results(path.parent)
    assert again.mean == results.mean
    assert again.images == results.images
    assert again.stamp == results.stamp
    for name, array in results.gallery.items():
        np.testing.assert_array_equal(again.gallery[name], array)
    assert again.curves["a/roc/fpr"].size > 2


def test_unreadable_results_say_what_to_do(tmp_path):
    with pytest.raises(WorkdirError, match=r"results\.json: no such file.*dsad evaluate"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(WorkdirError, match="not valid JSON"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"mean": {}}')
    with pytest.raises(WorkdirError, match="no stamp, categories"):
        read_results(tmp_path)
    write_results(run(), tmp_path)
    (tmp_path / "gallery.npz").write_bytes(b"PK half a file")
    with pytest.raises(WorkdirError, match=r"gallery\.npz: cannot be read"):
        read_results(tmp_path)
    write_results(run(), tmp_path)
    write_results(run(fpr_limit=0.1), tmp_path / "other")
    (tmp_path / "other" / "curves.npz").replace(tmp_path / "curves.npz")
    with pytest.raises(WorkdirError, match=r"curves\.npz: does not belong to the numbers"):
        read_results(tmp_path)


def test_cases_are_ranked_and_distinct():
    def image(number, value, label=1, score=0.0):
        own = value if label else None
        return {"path": f"{number:02d}", "label": label, "score": score, "pixel_auroc": own}

    images = [image(i, i / 20, score=10.0 + (7 * i) % 20) for i in range(20)]
    images += [image(20 + i, None, label=0, score=8.0 + i) for i in range(6)]
    cases = gallery.choose_cases(images, 9)
    assert cases["missed"] == [0, 3, 6]  # scores 10, 11, 12
    assert cases["worst"] == [1, 2, 4]
    assert cases["median"] in ([9, 10, 11], [10, 11, 12])
    assert cases["best"] == [19, 18, 17]
    assert cases["false_alarms"] == [25, 24, 23]
    assert cases["normal"] == [22, 21, 20]
    decided = gallery.choose_cases(images, 9, 12.0)
    assert decided["missed"] == [0, 3, 6]  # what is at the threshold is not flagged
    assert decided["false_alarms"] == [25]
    assert decided["normal"] == [24, 23, 22]
    many = gallery.choose_cases(images, 9, 26.0)  # those beyond nine are nowhere
    assert many["missed"] == [0, 3, 6, 9, 12, 15, 18, 1, 4]
    assert {n for s in ("worst", "median", "best") for n in many[s]} == {11, 14, 17}
    few = gallery.choose_cases(images[:4], 9)
    shown = few["missed"] + few["best"] + few["median"] + few["worst"]
    assert sorted(shown) == [0, 1, 2, 3]


def test_the_scale_comes_from_normals_only():
    results = run()
    scale = results.scales["disc"]
    maps = [results.gallery[f"map/disc/{i}"].astype(np.float32) for i in range(5)]
    assert abs(np.median(maps)) < 0.1  # 0 is the normals' median
    assert 0.7 < max(m.max() for m in maps) < 2.0  # 1 is their 99.9th percentile
    assert results.gallery["map/disc/5"].max() > 3.0  # a planted defect lies far outside
    assert scale["p99_9"] > scale["median"] > 0


def test_what_a_training_detector_learned_reaches_its_fit():
    """``train`` is called once per category, before fit, with what it may learn from."""
    calls = []

    class Trained(Distance):
        traits = DetectorTraits(trains_on="features")

        def fit(self, source, *, trained=None, **given):
            assert trained == {"images": 7}
            return super().fit(source, **given)

    def train(detector, data):
        calls.append((type(detector).__name__, data.title, data.seed, data.folder))
        images = np.concatenate(list(data.images()))
        assert images.shape == (7, 48, 48, 3)
        cells = np.concatenate([b.maps["colour"][b.valid] for b in data.features])
        pixels = (images / 255 - 0.5) / 0.25  # the same images, in the same order
        expected = pixels.reshape(7, 12, 4, 12, 4, 3).mean((2, 4))
        np.testing.assert_allclose(cells, expected, atol=1e-5)
        return {"images": len(cells)}

    def localized(**given):
        localize(
            Pooled(), Trained(), Planted(categories=("disc", "ring")),
            EvalConfig(image_size=48, batch_size=4, workers=2),
            mesh=make_mesh(MeshConfig(), jax.devices()[:1]), key=jax.random.key(3), **given,
        )  # fmt: skip

    localized(train=train)
    assert calls == [("Trained", "disc", 0, None), ("Trained", "ring", 0, None)]
    with pytest.raises(ConfigError, match=r"this detector trains; expected train="):
        localized()


class OnTest(Distance):
    """Fitted on the images that it scores."""

    traits = DetectorTraits(fits_on="test")

    def fit(self, source, **given):
        seen = [int(i) for batch in source for i in batch.index[batch.valid]]
        assert seen == list(range(11))
        return super().fit(source, **given)


def test_test_images_are_fitted_without_any_training_image():
    class Untrained(Planted):
        def source(self, split, category=None):
            source = super().source(split, category)
            if split == "train":
                source.rows, source.records = [], []
            return source

    seen = []
    results = localize(
        Pooled(), OnTest(), Untrained(strength=9), EvalConfig(image_size=48, batch_size=4),
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]), key=jax.random.key(3),
        progress=lambda done, total, text: seen.append((done, total)),
    )  # fmt: skip
    assert results.categories["disc"]["counts"]["train"] == 0
    assert results.stamp["support"]["rule"].startswith("the test images themselves")
    assert seen[-1] == (22, 22)
    with pytest.raises(DataError, match="no training image in disc"):
        run(Untrained())


def test_too_few_test_images_for_a_fit_are_refused_before_they_are_read():
    class Many(OnTest):
        traits = DetectorTraits(fits_on="test", least_images=12)

    with pytest.raises(DataError, match="needs at least 12, found 11 of disc"):
        localize(
            Pooled(), Many(), Planted(strength=9), EvalConfig(image_size=48, batch_size=4),
            mesh=make_mesh(MeshConfig(), jax.devices()[:1]), key=jax.random.key(3),
        )  # fmt: skip


@pytest.mark.parametrize("image_score", ["max", "top"])
def test_the_image_score_is_of_the_smoothed_map_if_asked(image_score):
    """Against scipy's Gaussian on the map that the plain run gives."""
    cells = np.random.default_rng(2).uniform(size=(3, 6, 5)).astype(np.float32)
    traits = DetectorTraits(sigma=1.5, image_score=image_score, image_share=0.05)
    scores = Scores(map=jnp.asarray(cells), image=jnp.zeros(3))
    given = (traits, (24, 20), False)
    maps, image = jax.jit(finished, static_argnums=(0, 1, 2))(*given, scores)
    plain = finished(DetectorTraits(), (24, 20), False, scores)
    np.testing.assert_array_equal(plain.image, 0)
    for one, smoothed, score in zip(np.float64(plain.map), maps, image, strict=True):
        expected = ndimage.gaussian_filter(one, 1.5, mode="reflect")
        np.testing.assert_allclose(smoothed, expected, atol=1e-5)
        count = 1 if image_score == "max" else 24  # of 480
        assert score == pytest.approx(np.sort(expected.ravel())[-count:].mean(), abs=1e-5)
