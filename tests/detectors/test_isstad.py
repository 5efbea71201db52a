"""ISSTAD's scores: the published numbers, exponents per category, no second Gaussian."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.assembly import evaluate
from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.detectors import isstad
from dsad.evaluation.localize import EvalConfig, localize
from dsad.ops.resize import gaussian_smooth, top_count
from dsad.terminal import flags
from tests.backbones import Plain, static
from tests.contracts.detectors.common import ALONE, KEY, Batches, close, made
from tests.contracts.detectors.isstad import maps_of, oracle
from tests.evaluation.test_localize import Planted
from tests.helpers import ROOT


def fitted(detector, *categories):
    class Named(Batches):
        def __iter__(self):
            raise AssertionError("the fit reads images")

    source = Named(maps_of(0, 1))
    source.categories = categories
    return detector.fit(source, **ALONE)


def scored(config, maps):
    detector = made("isstad", **config)
    return jax.jit(detector.score)(fitted(detector, "tiles"), maps)


def test_the_gaussian_is_the_published_one():
    smooth = jax.jit(lambda maps: gaussian_smooth(maps, isstad.Config().sigma))
    impulse = np.zeros((1, 65, 65), np.float32)
    impulse[0, 32, 32] = 1
    found = np.float64(smooth(impulse)[0])
    assert found[32, 32] == pytest.approx(0.00994789, rel=1e-6)
    taps = found.sum(axis=0)
    assert (taps > 0).sum() == 33
    assert taps[32] == pytest.approx(0.0997391, rel=1e-6)
    for side in (7, 224):  # mirrored borders keep the mean, also of maps below the radius
        noise = np.random.default_rng(0).uniform(size=(2, side, side)).astype(np.float32)
        mean = np.float64(smooth(noise)).mean((1, 2))
        np.testing.assert_allclose(mean, noise.mean((1, 2)), rtol=1e-5)


def test_counts_of_the_largest_values():
    assert top_count(0.1, 224 * 224) == 5018
    assert top_count(0.5, 224 * 224) == 25088
    assert top_count(0.07, 100) == 7  # 7.000000000000001 in floats
    assert top_count(1e-9, 100) == 1
    values = np.random.default_rng(0).permutation(50176).astype(np.float32)
    largest = jax.jit(isstad.top_mean)(values.reshape(1, 224, 224), jnp.int32(5018))
    assert float(largest[0]) == pytest.approx(50175 - 5017 / 2, rel=1e-6)


@pytest.mark.parametrize("pixel", ["product", "alpha", "max"])
@pytest.mark.parametrize("image", ["product", "alpha", "weighted"])
def test_constant_errors_give_finite_scores(pixel, image):
    maps = {n: m.copy() for n, m in maps_of(0, 3).items()}
    maps["error"][0] = 0.25  # a constant map has nothing to normalise by
    maps["probability"][1:], maps["error"][1:] = 0, 0
    found = scored({"pixel": pixel, "image": image, "a": 0.3, "b": 7.0}, maps)
    p = np.float64(maps["probability"][0, ..., 0])
    expected_map = {"product": 0, "alpha": 0.5 * p.mean(), "max": p.mean()}[pixel]
    assert found.map[0].mean() == pytest.approx(expected_map, rel=1e-5)
    if image == "product":
        assert found.image[0] == pytest.approx(0.25 * p.mean(), rel=1e-5)
    np.testing.assert_array_equal(found.map[1:], 0)
    np.testing.assert_array_equal(found.image[1:], 1 if image == "weighted" else 0)


def test_the_factor_of_the_first_code_is_a_factor():
    maps = maps_of(0, 2)
    one, other = scored({}, maps), scored({"scale": 255.0}, maps)
    np.testing.assert_allclose(other.map, 255 * one.map, rtol=1e-5)
    np.testing.assert_array_equal(other.image, one.image)


def test_every_category_has_its_exponents():
    rows = (("b", 0.5, 0.1, 1.0), ("c", 0.1, 1.0, 0.01))
    config = {"image": "weighted", "sigma": 1.0, "exponents": rows}
    detector, maps = made("isstad", **config), maps_of(0, 4)
    score = jax.jit(detector.score)
    for category, own in (("a", ("", 0.1, 1.0, 1.0)), ("b", rows[0]), ("c", rows[1])):
        single = {**config, "exponents": (), **dict(zip("qab", own[1:], strict=True))}
        close(score(fitted(detector, category), maps), oracle(single, None, maps), 1e-5)
    fitted(detector, "a", "d")  # neither has a row: one detector serves both
    with pytest.raises(ConfigError, match=r"found several for a, b.*one_for_all=False"):
        fitted(detector, "a", "b")


def test_unusable_settings_name_their_key():
    for values, message in [
        ({"layers": ("error",)}, r"layers: expected tuple\[str, str\] .*found \('error',\)"),
        ({"alpha": 1.5}, r"alpha: expected a finite number in \[0, 1\], found 1.5"),
        ({"q": 0.0}, r"q: expected a finite number > 0, <= 1, found 0\.0"),
        (
            {"exponents": (("b", 0.1, -1.0, 1.0),)},
            r"exponents\[0\]: expected .*b >= 0, found .*-1\.0",
        ),
        ({"exponents": (("b", 0.1, 1.0, 1.0),) * 2}, r"exponents: .* once, found \['b'\]"),
        ({"sigma": -1.0}, "sigma"),
        ({"scale": 0.0}, "scale"),
    ]:
        with pytest.raises(ConfigError, match=rf"detector.*{message}"):
            made("isstad", **values)


def test_maps_that_do_not_belong_are_refused():
    detector, maps = made("isstad"), maps_of(0, 2)
    state = fitted(detector, "tiles")
    with pytest.raises(ConfigError, match="no feature map named error; the backbone gives: block0"):
        detector.score(state, {n: m for n, m in maps.items() if n != "error"})
    maps["error"] = np.concatenate([maps["error"]] * 2, axis=3)
    with pytest.raises(ConfigError, match=r"of one size, found \(2, 12, 10, 1\) and \(2, 12, 10"):
        detector.score(state, maps)


@dataclasses.dataclass(frozen=True)
class Maps(Plain):
    """Colour above grey as probability, and twice its square as error: a network's two maps."""

    mean: tuple = static(default=(0.0, 0.0, 0.0))
    std: tuple = static(default=(1.0, 1.0, 1.0))
    images: list = dataclasses.field(default_factory=list, compare=False)

    def maps(self, images):
        jax.debug.callback(lambda n: self.images.append(int(n)), images.shape[0])
        excess = images.max(-1, keepdims=True) - images.min(-1, keepdims=True)
        return {"probability": excess, "error": 2 * excess**2, "reconstruction": images}


def run(backbone, **config):
    settings = {"image_size": 48, "batch_size": 16, "workers": 1, "gallery": 0}
    return localize(
        backbone, made("isstad", sigma=1.0), Planted(), EvalConfig(**{**settings, **config}),
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]), key=KEY,
    )  # fmt: skip


def test_an_evaluation_reads_test_images_only_and_smooths_once():
    backbone = Maps()
    results = run(backbone)
    jax.effects_barrier()
    assert backbone.images == [16]  # 11 test images, none of the 7 for training
    assert results.mean["image_auroc"] == 1.0
    assert results.mean["pixel_auroc"] > 0.99
    assert results.stamp["detector"]["config"]["sigma"] == 1.0
    assert results.stamp["smoothing"]["gaussian_sigma_px"] == 0.0


def parsed(spec, *argv):
    config, _, _ = flags.Command("evaluate", "", config=str(spec)).parse(list(argv))
    return evaluate.parse(config)


@pytest.mark.parametrize(
    ("variant", "pixel", "image"),
    [("", "product", "product"), (":alpha", "alpha", "alpha"), (":max", "max", "product"),
     (":weighted", "product", "weighted")],
)  # fmt: skip
def test_the_configs_are_the_published_scores(variant, pixel, image):
    cfg, detector = parsed(f"configs/isstad_detector.py{variant}")
    assert cfg.evaluation.image_size == 0  # that of the run
    assert detector.config == isstad.Config(pixel=pixel, image=image)
    with pytest.raises(ConfigError, match="isstad_detector.py has no variant 'nope'"):
        parsed("configs/isstad_detector.py:nope")


def test_tables_give_categories_their_exponents(tmp_path):
    own = shutil.copy(ROOT / "configs" / "isstad_detector.py", tmp_path)
    default = {"q": 0.1, "a": 1, "b": 1, "k": 2}
    rows = {"candle": {"b": 0.01}, "fryum": {"k": 5}, "macaroni1": {"q": 0.5}}
    tables = {"default": default, "visa": {"main": {"pcb1": {"a": 7}}, "ext": rows}}
    (tmp_path / "isstad_tables.json").write_text(json.dumps(tables))
    _, detector = parsed(f"{own}:visa", "--config.detector.alpha=0.25")
    assert detector.config.image == "weighted"
    assert detector.config.exponents == (("candle", 0.1, 1.0, 0.01), ("macaroni1", 0.5, 1.0, 1.0))
