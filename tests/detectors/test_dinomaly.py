"""Dinomaly's loss, attention and ramp against their definitions; the contract has the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core.errors import ConfigError
from dsad.detectors.dinomaly import Config, Decoder, distance, hard_only
from dsad.models.transformer import linear_attention
from tests.contracts.detectors import common
from tests.contracts.detectors.common import KEY, Batches, fitted, made
from tests.contracts.detectors.dinomaly import BASE, attended, cosine, decoder, maps_of


def pair(seed=0, shape=(3, 10, 4)):
    return np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)


@pytest.mark.parametrize("easy", [0.0, 0.5, 0.9])
def test_gradients_of_easy_cells_are_weakened(easy):
    """As a gradient whose rows of easy cells are multiplied by the factor; values stay."""
    target, rebuilt = pair()

    def loss(x, weaken):
        x = hard_only(x, jnp.asarray(target), jnp.float32(easy), 0.1) if weaken else x
        return jnp.mean(distance(x.reshape(3, -1), jnp.asarray(target).reshape(3, -1)))

    value, found = jax.value_and_grad(loss)(jnp.asarray(rebuilt), True)
    plain, whole = jax.value_and_grad(loss)(jnp.asarray(rebuilt), False)
    assert float(value) == pytest.approx(float(plain), rel=1e-6)
    gaps = 1 - cosine(np.float64(target), np.float64(rebuilt))
    hardest = np.sort(gaps.ravel())[::-1][: int(30 * (1 - easy) + 1e-6)]
    factors = np.where(gaps < hardest[-1], 0.1, 1)
    assert (factors == 1).sum() == round(30 * (1 - easy))
    np.testing.assert_allclose(found, np.float64(whole) * factors[..., None], atol=1e-7)


def test_distance_is_one_minus_the_cosine():
    a, b = pair(1)
    expected = 1 - cosine(np.float64(a), np.float64(b))
    np.testing.assert_allclose(distance(a, b), expected, rtol=1e-5)
    near = np.float32(a + 1e-4 * b)
    expected = 1 - cosine(np.float64(a), np.float64(near))
    np.testing.assert_allclose(distance(a, near), expected, rtol=1e-2)
    assert float(distance(a, 3 * a).max()) < 1e-12


def test_linear_attention_equals_its_explicit_form():
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 7, 3, 4)).astype(np.float32)
    found = linear_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
    for b, h in np.ndindex(2, 3):
        parts = (np.float64(x[b, :, h]) for x in (q, k, v))
        np.testing.assert_allclose(found[b, :, h], attended(*parts), rtol=1e-5, atol=1e-6)


def training(step=0, images=4, epoch=0, **config):
    maps = {n: jnp.asarray(m[:images]) for n, m in maps_of(0, 8).items()}
    batch = {
        "features": maps, "index": jnp.arange(images), "epoch": jnp.full(images, epoch)
    }  # fmt: skip
    objective = Decoder(Config(**BASE | config), batch)
    views = objective.views(batch, KEY)
    params, extra = objective.init(KEY)
    loss, (_, scalars) = objective.loss(params, extra, views, key=KEY, step=jnp.int32(step))
    return params, loss, scalars, maps


@pytest.mark.parametrize("groups", [1, 2])
def test_loss_by_hand(groups):
    """Without dropout, in float64: cosines of whole maps."""
    params, loss, scalars, maps = training(step=500, dropout=0.0, groups=groups)
    assert float(scalars["easy"]) == pytest.approx(0.45)
    layers = [np.float64(maps[n]).reshape(4, 30, 8) for n in BASE["layers"]]
    rebuilt = [decoder(params, x, 2)[::-1] for x in np.mean(layers, axis=0)]
    rebuilt = np.moveaxis(np.array(rebuilt), 1, 0)
    if groups == 1:
        layers, rebuilt = (np.mean(x, axis=0, keepdims=True) for x in (layers, rebuilt))
    losses = [
        1 - cosine(a.reshape(4, -1), b.reshape(4, -1)) for a, b in zip(layers, rebuilt, strict=True)
    ]
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_ramp_ends_at_its_step():
    easy = lambda step: float(training(step=step)[2]["easy"])  # noqa: E731
    assert [easy(0), easy(1000), easy(5000)] == pytest.approx([0, 0.9, 0.9])


def test_dropout_follows_key_epoch_and_sample():
    losses = [float(training(epoch=e)[1]) for e in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] != float(training(dropout=0.0)[1])


def test_a_perfect_reconstruction_costs_nothing():
    """A decoder whose blocks add nothing gives back what the bottleneck does."""
    detector, flat = (
        made("dinomaly", **BASE),
        {n: np.ones_like(m) for n, m in maps_of(0, 2).items()},
    )
    state = fitted(detector, Batches(maps_of(0, 6)))
    assert set(state) == {"bottleneck", "blocks"}  # no weight of the encoder
    still = jax.tree.map(jnp.zeros_like, state)
    still["bottleneck"]["fc2"]["bias"] = jnp.full(8, 0.5)
    np.testing.assert_allclose(detector.score(still, flat).map, 0, atol=1e-6)


def test_initial_weights():
    """Truncated at three standard deviations."""
    kernel = training()[0]["bottleneck"]["fc1"]["kernel"]
    wide = Decoder(
        Config(**BASE), {"features": {n: jnp.ones((1, 2, 2, 64)) for n in BASE["layers"]}}
    ).init(KEY)[0]
    values = np.asarray(wide["blocks"]["qkv"]["kernel"])
    assert kernel.shape == (8, 16)
    assert np.abs(values).max() <= 0.03
    assert values.std() == pytest.approx(0.00986, rel=0.02)  # of a normal number cut at three
    assert not np.asarray(wide["blocks"]["qkv"]["bias"]).any()


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match=r"detector\.groups: .*divides the 8 layers, found 3"):
        made("dinomaly", groups=3)
    mixed = {n: jnp.asarray(m) for n, m in common.maps_of(0, 2).items()}
    with pytest.raises(ConfigError, match=r"maps of one size.*layer2 \(6, 5, 7\), layer3 \(3, 3,"):
        made("dinomaly", **BASE).objective({"features": mixed}, None)
    with pytest.raises(ConfigError, match=r"detector\.heads: .*the 8 channels, found 3"):
        training(heads=3)
