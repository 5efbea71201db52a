"""Windows and borders in a whole evaluation: numbers are those of the image seen at once.

Cells of the test backbone are means of 4 × 4 pixels, and sizes are such that windows and borders
begin at whole cells: then nothing but the way through the inputs differs.
"""

import dataclasses
import subprocess
import sys
import types
import warnings

import jax
import numpy as np
import PIL.Image
import pytest

import dsad
from dsad.core.config import build_dataclass
from dsad.core.detection import DetectorTraits
from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.detectors import knn, padim, patchcore, superadd
from dsad.evaluation import fitting, stamp
from dsad.evaluation.compiled import Device
from dsad.evaluation.localize import EvalConfig, localize
from dsad.evaluation.support import Sampling, SupportConfig
from tests.evaluation.test_localize import Planted
from tests.evaluation.test_stored import CELLS

#: Images are 60 × 40 (height × width).
WHOLE = {"image_size": 60, "image_width": 40}
WAYS = {
    "windows": {"image_size": 36, "image_width": 24, "resize": "windows", "overlap": 6},
    "one direction": {"image_size": 36, "image_width": 48, "resize": "windows", "overlap": 6},
    "longer": {"image_size": 60, "image_width": 64, "resize": "longer"},
}
DETECTORS = {
    "knn": knn.build(knn.Config(layers=("colour",), bank_rows=200, sigma=1.0)),
    "top": knn.build(
        knn.Config(
            layers=("colour",), neighbourhood=1, sigma=1.0, image_score="top", image_share=0.05
        )
    ),
    "patchcore": patchcore.build(
        patchcore.Config(
            layers=("colour",), neighbourhood=1, sigma=1.0, bank="all", reweighted=True
        )
    ),
    # In units of the distance between images, which is not that between windows of one.
    "superadd": superadd.build(superadd.Config(layers=("colour",), sigma=1.0, image_score="max")),
}


def run(detector="knn", devices=1, sampling=None, **config):
    settings = {"batch_size": 4, "workers": 2, "gallery": 3} | config
    return localize(
        CELLS, DETECTORS[detector], Planted(strength=5), EvalConfig(**settings),
        mesh=make_mesh(MeshConfig(), jax.devices()[:devices]), key=jax.random.key(3),
        sampling=sampling or Sampling(),
    )  # fmt: skip


def close(one, other, **tolerance):
    """Equal but for the rounding of distances between colours of about 120."""
    for name, value in one.mean.items():
        assert other.mean[name] == pytest.approx(value, **tolerance), name
    scores = [[x["score"] for x in r.images["disc"]] for r in (one, other)]
    np.testing.assert_allclose(*scores, rtol=0.02)


@pytest.fixture(scope="module")
def whole():
    return {name: run(name, **WHOLE) for name in ("top", "patchcore", "superadd")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["top", "patchcore", "superadd"])
def test_numbers_are_those_of_the_image_at_once(whole, name, way):
    found = run(name, **WAYS[way])
    close(whole[name], found, rel=5e-3)
    # Every cell of the images is in the bank once, and nothing else.
    assert found.stamp["detector_state"] == whole[name].stamp["detector_state"]
    assert found.stamp["preprocessing"]["method"] == WAYS[way]["resize"]
    shapes = {n: x.shape for n, x in found.gallery.items()}
    assert shapes == {n: x.shape for n, x in whole[name].gallery.items()}


def test_devices_and_kept_features_change_nothing(tmp_path):
    way = WAYS["windows"] | {"feature_cache": str(tmp_path)}
    first = run(**way)
    close(first, run(devices=8, batch_size=8, **WAYS["windows"]), rel=5e-3)
    again = run(**way)
    close(first, again, rel=5e-3)
    kept = again.categories["disc"]["features_from_cache"]
    assert (kept["train"], kept["test"]) == (7, 11)


def test_thresholds_are_of_images_not_of_windows():
    found = run(false_alarm_rate=0.5, **WAYS["windows"])
    row = found.thresholds["disc"]["0"]
    assert row["held_out"] in (2, 3)  # of 7, not of their 28 windows
    sampling = Sampling(support=SupportConfig(rotations=4), shots=2, seeds=(0, 1))
    assert run(sampling=sampling, **WAYS["windows"]).mean["pixel_auroc"] > 0.5


def test_the_middle_alone_is_measured():
    """The same as of images that are no larger."""

    class Cut(Planted):
        def source(self, split, category=None):
            return CutSource(super().source(split, category))

    class CutSource:
        def __init__(self, inner):
            self.inner, self.records = inner, inner.records

        def __len__(self):
            return len(self.inner)

        def __getitem__(self, index):
            sample = self.inner[index]
            return dataclasses.replace(
                sample, image=sample.image[10:50], mask=sample.mask[10:50]
            )  # fmt: skip

    settings = {"batch_size": 4, "gallery": 3, "image_size": 40}
    results = [
        localize(
            CELLS, DETECTORS["knn"], data, EvalConfig(**settings, resize=method),
            mesh=make_mesh(MeshConfig(), jax.devices()[:1]), key=jax.random.key(3),
        )
        for data, method in ((Cut(strength=5), "stretched"), (Planted(strength=5), "shorter"))
    ]  # fmt: skip
    close(*results, rel=5e-3)
    pictures = [{n: x.shape for n, x in r.gallery.items()} for r in results]
    assert pictures[0] == pictures[1]


@pytest.mark.slow
def test_memory_of_a_large_picture_is_that_of_a_batch_of_windows(tmp_path):
    """4224 × 1056 pixels are 175 windows, 8 of which are a batch."""
    normal = np.random.default_rng(0).integers(90, 110, (4, 224, 224, 3), np.uint8)
    settings = {
        "evaluation.resize": "windows",
        "evaluation.batch_size": 8,
        "detector.bank_rows": 500,
    }
    model = dsad.fit(
        list(normal), backbone="resnet18", weights="random", detector="knn", settings=settings
    )
    model.save(tmp_path / "model")

    def peak(height, width, count):
        file = tmp_path / f"{height}x{width}.png"
        noise = np.random.default_rng(0).integers(90, 110, (height, width, 3), np.uint8)
        PIL.Image.fromarray(noise).save(file)
        worker = (sys.executable, "-m", "tests.evaluation.memory_worker")
        words = [*worker, *map(str, (tmp_path / "model", file, count))]
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        assert int(told[1]) == count
        return int(told[0])

    small, large = peak(448, 760, count=6), peak(4224, 1056, count=1)  # 2 × 4 windows, 6 times
    assert large < 1.2 * small, f"{large / 2**20:.0f} MB, and {small / 2**20:.0f} MB of 8 windows"


def test_detectors_of_positions_warn_of_windows_and_stamps_tell_of_borders():
    detector = padim.build(padim.Config(layers=("colour",), channels=0))
    for way, warned in (("windows", True), ("longer", False)):
        config = EvalConfig(gallery=0, **WAYS[way])
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            fitting.supports(detector, Planted(), ("disc",), config, Sampling())
        assert any("a place of a window" in str(x.message) for x in seen) is warned
        knn_says, padim_says = (
            stamp.make_stamp(
                Planted(), ("disc",), config=config, detector=x, backbone=CELLS,
                key=jax.random.key(0),
            )["preprocessing"]["uncounted"]
            for x in (DETECTORS["knn"], detector)
        )  # fmt: skip
        assert knn_says == "left out of fit and image score"
        assert "does not leave it out" in padim_says


def test_windows_that_are_trained_on_take_no_bank_of_images():
    detector = types.SimpleNamespace(
        layers=("colour",), traits=DetectorTraits(trains_on="images"), score=max
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    Device(CELLS, detector, EvalConfig(**WAYS["longer"]), mesh, [None])
    with pytest.raises(ConfigError, match="no wrapper"):
        Device(CELLS, detector, EvalConfig(**WAYS["windows"]), mesh, [None])


def test_refused():
    """By the keys that there are, also while the size is the backbone's own."""
    for settings, key in (
        ({"image_size": 36, "resize": "windows", "overlap": 18}, "overlap"),
        ({"image_size": 36, "resize": "longer", "crop": 0.9}, "crop"),
        ({"image_size": 0, "resize": "windows", "crop": 0.9}, "crop"),
        ({"image_size": 0, "scale": 0.5}, "scale"),
    ):
        with pytest.raises(ConfigError, match=rf"^config\.evaluation\.{key}: expected"):
            build_dataclass(EvalConfig, settings, "config.evaluation")
