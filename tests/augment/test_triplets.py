"""SPD's triplets: no shortcut from the change as a whole, and one local change, in the negative."""

import dataclasses
import functools

import jax
import numpy as np
from scipy import stats

from dsad.augment.blur import draw_blur
from dsad.augment.color import draw_jitter
from dsad.augment.recipes import WEAK
from dsad.augment.smooth_blend import SmoothBlendConfig, draw_pieces, smooth_blend
from dsad.augment.triplets import TripletConfig, make_triplet
from dsad.augment.views import JITTERED, ViewConfig, draw_crops, make_view
from dsad.core.rng import named, sample_keys

SIDE, CANVAS, KEY = 56, 80, jax.random.key(7)
BARE = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
BLEND = SmoothBlendConfig(area=(0.03, 0.08), sigma_side=0, sigma=1.5)
PAIR = ("positive", "negative")
CONFIG = TripletConfig(view=dataclasses.replace(WEAK, side=SIDE), blend=BLEND)
#: A view that leaves the image as it is.
STILL = ViewConfig(
    side=SIDE, area=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0, jitter_probability=0.0,
    blur_probability=0.0, **BARE,
)  # fmt: skip


def make_batch(count=8, size=(64, 72)):
    pixels = np.random.default_rng(0).integers(0, 256, (count, CANVAS, CANVAS, 3), dtype=np.uint8)
    return {
        "image": pixels,
        "size": np.tile(np.array([size], np.int32), (count, 1)),
        "index": np.arange(100, 100 + count, dtype=np.int32),
        "epoch": np.arange(count, dtype=np.int32) % 3,
    }


def by_parts(batch, config):
    """The two views as their names have them, the negative's blended, and its matte."""
    bare = dataclasses.replace(config.view, **BARE)
    views = {name: make_view(batch, named(KEY, name), bare)["image"] for name in PAIR}
    keys = sample_keys(named(KEY, "blend"), batch["epoch"], batch["index"])
    pieces = draw_pieces(keys, SIDE, config.blend)
    views["negative"], alpha = smooth_blend(views["negative"], pieces, config.blend)
    return {**views, "alpha": alpha}


@functools.cache
def jitted(config):
    return jax.jit(lambda batch: (make_triplet(batch, KEY, config), by_parts(batch, config)))


def both(batch, config=CONFIG):
    return jax.device_get(jitted(config)(batch))


def triplet(batch):
    return both(batch)[0]


def test_the_anchor_is_the_centre_alone():
    """Seven eighths of the shorter side: here pixels of the view are pixels of the image."""
    batch = make_batch()
    anchor = triplet(batch)["anchor"]
    expected = batch["image"][:, 4 : 4 + SIDE, 8 : 8 + SIDE] / 255
    np.testing.assert_allclose(anchor * WEAK.std + np.array(WEAK.mean), expected, atol=1e-6)


def test_positives_and_negatives_change_alike_as_a_whole():
    """Two-sample tests, at 0.01 together, of everything that views draw; and it is drawn anew."""
    count, view = 2000, WEAK
    batch = {**make_batch(count, (256, 256)), "image": None}

    @functools.partial(jax.jit, static_argnums=1)
    def draws(batch, name):
        key = named(KEY, name)

        def keys(purpose):
            return sample_keys(named(key, purpose), batch["epoch"], batch["index"])

        boxes, flips = draw_crops(batch, key, view)
        amounts = dict(zip(JITTERED, view.jitter, strict=True))
        jitter = draw_jitter(keys("jitter"), **amounts, probability=view.jitter_probability)
        sigma, blurred = draw_blur(keys("blur"), sigma=view.blur, probability=0.5)
        return {
            "area": boxes[:, 2] * boxes[:, 3], "aspect": boxes[:, 3] / boxes[:, 2],
            "top": boxes[:, 0], "left": boxes[:, 1], "hue": jitter.shift, "sigma": sigma,
            **{name: jitter.factors[:, i] for i, name in enumerate(JITTERED[:3])},
        }, {"flip": flips, "jitter": jitter.apply, "blur": blurred}  # fmt: skip

    positive, negative = (jax.device_get(draws(batch, name)) for name in PAIR)
    least = 0.01 / sum(map(len, positive))
    for name, values in positive[0].items():
        assert stats.ks_2samp(values, negative[0][name]).pvalue > least, name
        assert abs(np.corrcoef(values, negative[0][name])[0, 1]) < 0.08, name
    for name, coins in positive[1].items():
        other = negative[1][name]
        table = [[coins.sum(), count - coins.sum()], [other.sum(), count - other.sum()]]
        assert stats.fisher_exact(table).pvalue > least, name
        assert abs(np.corrcoef(coins, other)[0, 1]) < 0.08, name


def test_the_views_are_those_of_their_names_and_the_negative_s_is_then_blended():
    made, parts = both(make_batch())
    for name in PAIR:
        pixels = made[name] * WEAK.std + np.array(WEAK.mean)
        np.testing.assert_allclose(pixels, parts[name], atol=2e-6)
    np.testing.assert_array_equal(made["peak"], parts["alpha"].max(axis=(1, 2)))


def test_with_still_views_only_the_negative_differs_and_only_inside_its_matte():
    config = TripletConfig(anchor=1.0, view=STILL, blend=BLEND)
    made, parts = both(make_batch(size=(SIDE, SIDE)), config)
    alpha = parts["alpha"]
    np.testing.assert_array_equal(made["positive"], made["anchor"])
    differs = (made["negative"] != made["positive"]).any(axis=-1)
    assert not differs[alpha == 0].any()
    assert differs[alpha > 0.1].mean() > 0.99
    assert (differs.sum(axis=(1, 2)) > 60).all()


def test_an_image_s_draws_do_not_depend_on_the_others():
    batch, turned = make_batch(), np.array([5, 2, 7, 0, 1, 3, 4, 6])
    made, other = triplet(batch), triplet({n: v[turned] for n, v in batch.items()})
    for name, values in made.items():
        np.testing.assert_array_equal(values[turned], other[name])


def test_every_epoch_has_draws_of_its_own():
    batch = make_batch()
    made, later = triplet(batch), triplet({**batch, "epoch": batch["epoch"] + 1})
    np.testing.assert_array_equal(made["anchor"], later["anchor"])
    for name in PAIR:
        assert (made[name] != later[name]).any(axis=(1, 2, 3)).all(), name
