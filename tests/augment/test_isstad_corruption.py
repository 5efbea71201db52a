"""The corruption as a whole: what is labelled, what stays, and on what the draws depend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dsad.augment import _isstad_patches, _isstad_regions
from dsad.augment.isstad_corruption import CorruptionConfig, corrupt, drawn
from dsad.core.config import build_dataclass
from dsad.core.errors import ConfigError, DataError
from dsad.core.mesh import MeshConfig, make_mesh, place_batch
from dsad.data.facts import FACTS

SIDE, COUNT = 40, 48
REGION = CorruptionConfig(most_draw=5)
PATCH = CorruptionConfig(kind="patch")
PUBLISHED = dataclasses.replace(REGION, label="mask")
KINDS = pytest.mark.parametrize("config", [REGION, PATCH], ids=["region", "patch"])


@functools.lru_cache
def jitted(config):
    return jax.jit(functools.partial(corrupt, config=config))


def keys(count=COUNT, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def inputs(count=COUNT, seed=0):
    """Byte images and the originals' sizes and boxes."""
    rng = np.random.default_rng(seed)
    size = rng.integers(150, 400, (count, 2)).astype(np.int32)
    near = np.stack([size[:, 1] // 5, size[:, 0] // 4], 1)
    far = np.stack([size[:, 1] * 9 // 10, size[:, 0] * 4 // 5], 1)
    return {
        "images": rng.integers(0, 256, (count, SIDE, SIDE, 3)) / np.float32(255),
        "keys": keys(count),
        "size": size,
        "box": np.concatenate([near, far], 1).astype(np.int32),
    }


def run(config, given):
    given = {**given, "images": np.asarray(given["images"], np.float32)}
    return tuple(map(np.asarray, jitted(config)(**given)))


@pytest.mark.parametrize(
    "config",
    [REGION, PATCH, PUBLISHED],
    ids=["region", "patch", "region-mask"],
)
def test_outside_the_label_the_image_is_the_original(config):
    given = inputs()
    images = given["images"].astype(np.float32)
    found, labels = run(config, given)
    assert (found.shape, found.dtype) == (images.shape, np.float32)
    assert (labels.shape, labels.dtype) == (images.shape[:3], bool)
    assert found.min() >= 0
    assert found.max() <= 1
    np.testing.assert_array_equal(found[~labels], images[~labels])
    chosen = np.asarray(drawn(given["keys"], config.most_draw))
    np.testing.assert_array_equal(labels.any((1, 2)), chosen)
    assert not chosen.all()
    assert (found != images).any(-1)[labels].mean() > 0.9


@pytest.mark.parametrize("most_draw", [2, 5])
def test_share_of_clean_images(most_draw):
    """Fact sheet, check 10: 1/3 and 1/6 over 10^4 draws."""
    clean = ~np.asarray(drawn(keys(10000, 7), most_draw))
    assert stats.binomtest(int(clean.sum()), 10000, 1 / (most_draw + 1)).pvalue > 1e-3
    assert clean.mean() == pytest.approx(1 / (most_draw + 1), abs=0.015)


def parts(given, config):
    """Masks of the shapes and the changed image, from the same draws."""
    k, images = given["keys"], jnp.asarray(given["images"], jnp.float32)
    shapes = _isstad_regions.draw_shapes(k, jnp.asarray(given["box"]), config.n_max)
    masks = _isstad_regions.shape_masks(shapes, jnp.asarray(given["size"]), SIDE)
    masks = masks & drawn(k, config.most_draw)[:, None, None, None]
    change = _isstad_regions.draw_change(k)
    source = _isstad_regions.without_background(images) if config.remove_background else images
    changed = _isstad_regions.apply_change(source, change, jnp.asarray(given["size"]))
    return masks, changed, change._replace(noise_key=None)


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_shape_counts_if_one_byte_in_it_changed(background):
    """The rule in whole bytes; half of the images are grey, some are symmetric (quirk 11)."""
    given = inputs(seed=1)
    images = np.asarray(given["images"], np.float32)
    images[::2] = images[::2, ..., :1]
    images[1::4] = np.maximum(images[1::4], images[1::4, :, ::-1])
    images[3::8, :, : SIDE // 2] = np.float32(55 / 255)
    given["images"] = images
    config = dataclasses.replace(REGION, remove_background=background)
    made = jax.jit(functools.partial(parts, config=config))(given)
    masks, changed, change = jax.tree.map(np.asarray, made)
    differs = (np.rint(255 * changed) != np.rint(255 * images)).any(-1)
    expected = np.zeros_like(masks[:, 0])
    for i, shapes in enumerate(masks):
        for mask in shapes:
            if differs[i][mask].any():
                expected[i] |= mask
    found, labels = run(config, given)
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_allclose(found, np.where(labels[..., None], changed, images), atol=2e-6)
    if background:
        return
    published, everywhere = run(PUBLISHED, given)
    np.testing.assert_array_equal(everywhere, masks.any(1))
    np.testing.assert_allclose(
        published, np.where(everywhere[..., None], changed, images), atol=2e-6
    )
    only_grey = change.grey & ~change.blur & ~change.jitter.apply
    idle = only_grey[::2] & everywhere[::2].any((1, 2))
    assert idle.any()
    assert not labels[::2][idle].any()
    assert (everywhere & ~labels).sum() > (everywhere & ~labels)[::2][idle].sum()


def test_the_box_limits_the_shapes():
    given = inputs()
    for limit_box in (True, False):
        _, labels = run(dataclasses.replace(PUBLISHED, limit_box=limit_box), given)
        at = (np.arange(SIDE) + 0.5) / SIDE
        outside = 0
        for label, (height, width), (x1, y1, x2, y2) in zip(
            labels, given["size"], given["box"], strict=True
        ):
            columns, rows = at * width, at * height
            beyond = (columns < x1) | (columns >= x2 + 1), (rows < y1) | (rows >= y2 + 1)
            outside += label[beyond[1]].sum() + label[:, beyond[0]].sum()
        assert (outside == 0) == limit_box


def test_reduced_copies_are_corrupted_like_the_original():
    """A quarter of the size with ``original_side`` of the whole: the same image comes out."""
    given = inputs()
    given["size"] = np.tile(np.array([[640, 400]], np.int32), (COUNT, 1))
    given["box"] = np.tile(np.array([[40, 80, 320, 600]], np.int32), (COUNT, 1))
    small = {**given, "size": given["size"] // 4, "box": given["box"] // 4}
    expected = run(REGION, given)
    found = run(dataclasses.replace(REGION, original_side=640.0), small)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(run(REGION, small)[1], expected[1])


@KINDS
def test_company_and_place_in_the_batch_do_not_matter(config):
    given = inputs()
    found, labels = run(config, given)
    order = np.random.default_rng(1).permutation(COUNT)
    moved = {k: v[order] for k, v in given.items()}
    again, again_labels = run(config, moved)
    np.testing.assert_array_equal(again_labels, labels[order])
    np.testing.assert_allclose(again, found[order], rtol=0, atol=1e-6)
    other, other_labels = run(config, {**given, "keys": keys(seed=1)})
    assert not np.array_equal(other_labels, labels)
    assert not np.array_equal(other, found)


@KINDS
@pytest.mark.slow
def test_one_device_equals_eight(config):
    """And no device asks another for anything."""
    given = inputs()
    given["images"] = given["images"].astype(np.float32)
    found, labels = run(config, given)
    mesh = make_mesh(MeshConfig())
    placed = place_batch({k: v for k, v in given.items() if k != "keys"}, mesh)
    sharding = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp")))
    compiled = (
        jitted(config).lower(**placed, keys=jax.device_put(given["keys"], sharding)).compile()
    )
    assert "all-" not in compiled.as_text()
    split, split_labels = compiled(**placed, keys=jax.device_put(given["keys"], sharding))
    np.testing.assert_array_equal(split_labels, labels)
    np.testing.assert_allclose(split, found, rtol=0, atol=1e-6)


def test_the_window_of_a_patch_is_little_more_than_an_eighth_of_the_side():
    assert _isstad_patches.window(224) == 36
    assert _isstad_patches.window(448) == 64


@KINDS
def test_facts_are_those_the_function_needs(config):
    assert set(config.facts) <= set(FACTS)
    assert ("foreground_box" in config.facts) == (config.kind == "region")
    given = inputs()
    given["images"] = given["images"].astype(np.float32)
    if "foreground_box" not in config.facts:
        given.pop("box")
    _, labels = jax.eval_shape(functools.partial(corrupt, config=config), **given)
    assert labels.shape == (COUNT, SIDE, SIDE)


def test_the_box_is_the_one_that_is_asked_for():
    published = dataclasses.replace(REGION, box="published")
    assert REGION.facts == ("original_size", "foreground_box")
    assert published.facts == ("original_size", "foreground_box_published")
    for config in (REGION, published):
        assert config.box_fact == config.facts[1]
        free = dataclasses.replace(config, limit_box=False)
        assert (free.facts, free.box_fact) == (("original_size",), None)
    with pytest.raises(ConfigError, match="fact foreground_box_published"):
        corrupt(**{**inputs(2), "images": jnp.zeros((2, 40, 40, 3)), "box": None}, config=published)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "old"}, r"corruption\.kind: expected one of 'region', 'patch'"),
        ({"label": "all"}, r"corruption\.label: expected one of"),
        ({"box": "both"}, r"corruption\.box: expected one of 'padded', 'published'"),
        ({"most_draw": 0}, r"corruption\.most_draw: expected an integer >= 1, found 0"),
        ({"n_max": 0}, r"corruption\.n_max: expected an integer >= 1, found 0"),
        ({"original_side": 3.0}, r"corruption\.original_side: expected 0 or at least 16"),
        ({"original_side": float("inf")}, r"corruption\.original_side"),
        ({"original_side": float("nan")}, r"corruption\.original_side"),
    ],
)
def test_settings_without_a_meaning_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        CorruptionConfig(**values)
    with pytest.raises(ConfigError):
        build_dataclass(CorruptionConfig, values)


def test_wrong_images_are_refused():
    given = inputs(2)
    with pytest.raises(ConfigError, match=r"corruption.limit_box: needs the foreground box"):
        corrupt(**{**given, "images": jnp.zeros((2, 40, 40, 3)), "box": None}, config=REGION)
    for images in (
        jnp.zeros((2, 48, 48, 3), jnp.uint8),
        jnp.zeros((2, 48, 40, 3)),
        jnp.zeros((2, 8, 8, 3)),
        jnp.zeros((48, 48, 3)),
    ):
        with pytest.raises(DataError, match=r"corrupt: expected float32 images \(b, S, S, 3\)"):
            corrupt(**{**given, "images": images}, config=REGION)
