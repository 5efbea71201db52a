"""AnomalyDINO: distances, tail, masks and the mode without normal images; float64 oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from dsad.core.errors import ConfigError, DataError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.detectors import anomalydino
from dsad.detectors._features import tail_mean
from dsad.evaluation import support
from tests.contracts.detectors.anomalydino import directions, foreground
from tests.contracts.detectors.common import ALONE, Batches, made
from tests.evaluation.test_localize import Planted

ONE = {"layers": ("layer2",)}


def tokens(seed, count, grid=(6, 5), depth=7):
    values = np.random.default_rng(seed).standard_normal((count, *grid, depth)) + 0.5
    return {"layer2": values.astype(np.float32)}


def fitted(normal, source=None, **config):
    detector = made("anomalydino", **ONE, **config)
    return detector, detector.fit(source or Batches(normal), **ALONE)


def maps(normal, test, **config):
    detector, state = fitted(normal, **config)
    return np.asarray(jax.jit(detector.score)(state, test).map)


def test_distances_are_half_the_squares_between_unit_rows():
    normal, test = tokens(0, 3), tokens(1, 4)
    bank = directions(np.float64(normal["layer2"])).reshape(-1, 7)
    gaps = directions(np.float64(test["layer2"]))[..., None, :] - bank
    expected = np.sum(gaps**2, axis=-1).min(axis=-1) / 2
    np.testing.assert_allclose(maps(normal, test), expected, rtol=1e-5)


def test_a_reference_scores_zero_and_scale_does_not_count():
    normal, test = tokens(0, 4), tokens(1, 4)
    assert maps(normal, normal).max() < 1e-6
    larger = {"layer2": 50 * test["layer2"]}
    scaled = {"layer2": 0.02 * normal["layer2"]}
    np.testing.assert_allclose(maps(scaled, larger), maps(normal, test), rtol=1e-5, atol=1e-6)


def test_more_references_and_their_rotations_never_raise_a_distance():
    normal, test = tokens(0, 2), tokens(1, 4)
    turned = np.stack([ndimage.rotate(x, 45, reshape=False, order=1, mode="mirror")
                       for x in normal["layer2"]])  # fmt: skip
    both = {"layer2": np.concatenate([normal["layer2"], turned, tokens(2, 1)["layer2"]])}
    few, many = maps(normal, test), maps(both, test)
    assert (many <= few + 1e-6).all()
    assert (many < few - 1e-3).any()


def patches(source, angle=0):
    """Patches of 10 × 10 pixels of a source's pictures as features, (n, 6, 4, 300)."""
    images = np.stack([np.float32(source[i].image) for i in range(len(source))])
    if angle:
        images = ndimage.rotate(images, angle, (2, 1), reshape=False, order=1, mode="mirror")
    cells = images.reshape(len(images), 6, 10, 4, 10, 3).swapaxes(2, 3)
    return {"layer2": np.ascontiguousarray(cells.reshape(len(images), 6, 4, 300))}


def test_rotated_pictures_of_a_support_set_never_raise_a_distance():
    pictures = Planted(noise=60).source("train")
    turned = support.SupportConfig(rotations=8).applied(pictures)
    few, many = (fitted(patches(source)) for source in (pictures, turned))
    assert int(many[1]["rows"]) == 8 * int(few[1]["rows"]) == 8 * 7 * 24
    near = []
    for test in (
        patches(Planted(noise=60).source("test")),
        *(patches(pictures, a) for a in (45, 20)),
    ):
        plain, rotated = (np.asarray(d.score(state, test).map) for d, state in (few, many))
        assert (rotated <= plain + 1e-6).all()
        near.append((plain.mean(), rotated.mean()))
    assert near[0][1] < near[0][0] - 1e-4
    assert near[1][1] < 1e-4 < 1e-3 < near[1][0]  # but for rounding to whole grey values
    assert near[2][1] < near[2][0] - 1e-4


@pytest.mark.parametrize(
    ("cells", "count"),
    [((28, 28), 7), ((32, 32), 10), ((37, 37), 13), ((48, 48), 23), ((256, 256), 655),
     ((672, 672), 4515), ((9, 9), 1)],
)  # fmt: skip
def test_tail_counts_are_rounded_down_to_at_least_one(cells, count):
    values = np.random.default_rng(0).permutation(cells[0] * cells[1]).reshape(1, *cells)
    found = tail_mean(jnp.asarray(values, jnp.float32), 0.01)
    assert found[0] == pytest.approx(np.sort(values.ravel())[-count:].mean(), rel=1e-6)


def test_tail_is_of_cells_inside():
    values = np.arange(200, dtype=np.float32).reshape(1, 10, 20)
    inside = jnp.asarray([[[0.0, 0.5], [0.0, 1.0]]])  # 100 cells, the highest is 99
    assert tail_mean(jnp.asarray(values), 0.03, inside)[0] == 98
    assert tail_mean(jnp.asarray(values), 0.001, inside)[0] == 99


def test_dilation_does_not_leak_into_the_next_row():
    cell = np.zeros(16, bool)
    cell[3] = True
    grown = lambda mask: np.flatnonzero(anomalydino.dilated(jnp.asarray(mask))).tolist()  # noqa: E731
    assert grown(cell.reshape(4, 4)) == [2, 3, 6, 7]
    assert grown(cell.reshape(-1, 1)) == [2, 3, 4]
    for seed in range(5):
        mask = np.random.default_rng(seed).uniform(size=(9, 8)) < 0.2
        once = ndimage.binary_dilation(mask, np.ones((3, 3)))
        expected = ndimage.binary_erosion(once, np.ones((3, 3)), border_value=1)
        np.testing.assert_array_equal(anomalydino.closed(jnp.asarray(mask)), expected)


def scene(sign=1.0, grid=(10, 10), depth=16):
    """An object in the middle of a background, (h, w, d), and where it is."""
    rng = np.random.default_rng(3)
    where = np.zeros(grid, bool)
    where[3:7, 2:8] = True
    axis = rng.standard_normal(depth)
    values = 20 * sign * where[..., None] * axis / np.linalg.norm(axis)
    return (values + 0.5 * rng.standard_normal((*grid, depth))).astype(np.float32), where


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("depth", [16, 150], ids=["covariance", "gram"])
def test_the_object_is_in_the_middle_whatever_the_sign_of_the_axis(sign, depth):
    values, where = scene(sign, depth=depth)
    every = jnp.ones(where.shape, bool)
    found = anomalydino.foreground(values, every, threshold=5.0, rule="grid")
    once = ndimage.binary_dilation(where, np.ones((3, 3)), iterations=2)
    expected = ndimage.binary_erosion(once, np.ones((3, 3)), border_value=1)
    np.testing.assert_array_equal(found, expected)
    for rule in ("grid", "published"):
        found = anomalydino.foreground(values, every, threshold=5.0, rule=rule)
        np.testing.assert_array_equal(found, foreground(np.float64(values), 5.0, rule))


def test_cells_outside_have_no_part_in_the_component():
    values, where = scene()
    wide = np.concatenate([values, np.full((10, 4, 16), 900, np.float32)], axis=1)
    counted = jnp.asarray(np.arange(14) < 10)[None].repeat(10, axis=0)
    found = anomalydino.foreground(wide, counted, threshold=5.0, rule="grid")
    assert found[:, :10][where].all()
    assert not found[:2, :10].any()


def test_an_image_without_an_object_counts_as_a_whole():
    """As published it has no score: nor has any of a network with smaller features."""
    values, where = scene()
    every = jnp.ones(where.shape, bool)
    for threshold, whole in ((5.0, False), (100.0, True)):
        found = anomalydino.foreground(values, every, threshold=threshold, rule="grid")
        assert bool(found.all()) == whole
    assert not anomalydino.foreground(values, every, threshold=100.0, rule="published").any()


def test_masked_cells_are_zero_and_stay_among_the_scores():
    values, _ = scene()
    normal, test = {"layer2": tokens(0, 2, (10, 10), 16)["layer2"]}, {"layer2": values[None]}
    settings = {"threshold": 5.0, "tail": 1.0}
    plain = maps(normal, test, **settings)[0]
    detector, state = fitted(normal, masked=("tiles",), **settings)
    scores = jax.jit(detector.score)(state, test)
    kept = foreground(np.float64(values), 5.0, "grid")
    np.testing.assert_allclose(scores.map[0], np.where(kept, plain, 0), rtol=1e-6)
    assert scores.image[0] == pytest.approx(np.where(kept, plain, 0).mean(), rel=1e-5)
    other = maps(normal, test, masked=("bottle",), **settings)[0]
    np.testing.assert_allclose(other, plain, rtol=1e-6)


class Several:
    """Batches of several categories."""

    categories = ("tiles", "wood")

    def __init__(self, normal, index=None):
        self.normal, self.index = normal, index

    def __iter__(self):
        for name in self.categories:
            for batch in Batches(self.normal):
                index = batch.index if self.index is None else self.index
                yield batch._replace(category=name, index=index)


def test_one_fit_is_masked_as_a_whole():
    normal = tokens(0, 4)
    assert fitted(normal, Several(normal), masked=("*",))[1]["masked"]
    with pytest.raises(ConfigError, match=r"detector\.masked: .*found \['wood'\]"):
        fitted(normal, Several(normal), masked=("wood",))


def alone(values, index, share):
    """Float64: the map of one test image by the tokens of the others."""
    rows = directions(np.float64(values))
    others = np.delete(rows, index, axis=0).reshape(-1, rows.shape[-1])
    gaps = np.sort(1 - rows[index[0]] @ others.T, axis=2)
    return gaps[..., : max(1, int(np.ceil(share * len(others))))].mean(axis=2)


@pytest.mark.parametrize("share", [1e-6, 0.02])
def test_a_test_image_is_compared_with_the_others(share):
    """The smallest of few rows is one, where the published code has none."""
    test = tokens(0, 5)
    found = maps(test, test, fits_on="test", nearest_share=share)
    expected = [alone(test["layer2"], [i], share) for i in range(5)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    order = np.array([3, 0, 4, 2, 1])
    permuted = {"layer2": test["layer2"][order]}
    again = maps(permuted, permuted, fits_on="test", nearest_share=share)
    np.testing.assert_allclose(again, found[order], rtol=1e-5)


def test_test_images_on_several_devices_and_prepared_score_the_same():
    test, mesh = tokens(0, 5), make_mesh(MeshConfig(), jax.devices()[:2])
    detector, state = fitted(test, fits_on="test", nearest_share=0.02)
    expected = jax.jit(detector.score)(state, test).map
    split = jax.jit(functools.partial(detector.score, mesh=mesh))
    np.testing.assert_allclose(split(state, test).map, expected, rtol=1e-6)
    prepared = detector.prepared(state)
    np.testing.assert_allclose(jax.jit(detector.score)(prepared, test).map, expected, rtol=1e-6)


def test_a_copy_among_the_others_counts():
    values = tokens(0, 4)["layer2"]
    twice = {"layer2": np.concatenate([values, values[:1]])}
    found = maps(twice, twice, fits_on="test", nearest_share=1e-6)
    assert found[[0, 4]].max() < 1e-6
    assert found[1:4].min() > 1e-3


def test_windows_of_one_image_do_not_score_each_other():
    test, index = tokens(0, 4), np.array([0, 0, 1, 1])
    detector, state = fitted(test, Several(test, index), fits_on="test", nearest_share=1e-6)
    assert state["image"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    found = jax.jit(detector.score)(state, test).map
    # The other category has copies of all, so take them out: one category has two images.
    assert found.max() < 1e-6
    one = Several(test, index)
    one.categories = ("tiles",)
    detector, state = fitted(test, one, fits_on="test", nearest_share=1e-6)
    found = jax.jit(detector.score)(state, test).map
    expected = [alone(test["layer2"], [i, i ^ 1], 1e-6) for i in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_tokens_of_all_images_are_held_once_more_while_a_batch_is_scored():
    detector, (images, cells, depth) = (
        made("anomalydino", **ONE, fits_on="test", precision="exact"),
        (200, 1024, 384),
    )
    like = lambda shape, kind=jnp.float32: jax.ShapeDtypeStruct(shape, kind)  # noqa: E731
    state = {
        "tokens": like((images * cells, depth)), "counted": like((images, cells), bool),
        "image": like((images,), jnp.int32), "smallest": like((images + 1,), jnp.int32),
        "masked": like((), bool),
    }  # fmt: skip
    program = jax.jit(detector.score).lower(state, {"layer2": like((4, 32, 32, depth))}).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * 4 * images * cells * depth


def test_refusals():
    for config, message in [
        ({"k": 5, "bank_rows": 3}, "bank_rows"),
        ({"fits_on": "test", "bank_rows": 3}, "bank_rows: expected 0 with fits_on"),
        ({"nearest_share": 0.0}, "nearest_share"),
        ({"tail": 1.5}, "tail"),
    ]:
        with pytest.raises(ConfigError, match=message):
            made("anomalydino", **config)
    with pytest.raises(DataError, match="at least 2 test images, found 1"):
        fitted(tokens(0, 1), fits_on="test")
    with pytest.raises(DataError, match=r"at least k = 40.*found 30"):
        fitted(tokens(0, 1), k=40)
    assert made("anomalydino", fits_on="test").traits.fits_on == "test"
