"""UniAD's network and training against the sheet's numbers; the contract has the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core.errors import ConfigError
from dsad.detectors.uniad import Config, Reconstruction, tokens_of
from dsad.models import uniad
from dsad.models.transformer import dropout
from dsad.models.uniad import Spec
from tests.contracts.detectors.common import KEY, made, maps_of
from tests.contracts.detectors.uniad import BASE, rebuilt, windows

SMALL = Spec(
    channels=5, grid=(4, 5), width=8, heads=2, mlp=12, depth=2, neighbourhood=3, dropout=0.1
)


def published(channels, side):
    return Spec(
        channels=channels, grid=(side, side), width=512, heads=8, mlp=2048, depth=4,
        neighbourhood=7, dropout=0.1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("channels", "side", "count"),
    [(4096, 16, 34_158_080), (3072, 16, 33_108_480), (3072, 14, 32_984_576),
     (5120, 16, 35_207_680)],
)  # fmt: skip
def test_parameters_of_published_sizes(channels, side, count):
    shapes = jax.eval_shape(lambda k: uniad.init(k, published(channels, side)), KEY)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(("side", "blocked"), [(16, 10_000), (14, 7_396)])
def test_windows_of_published_sizes(side, blocked):
    mask = uniad.neighbour_mask((side, side), 7)
    assert mask.sum() == blocked
    if side == 16:
        seen = (~mask).sum(axis=1).reshape(16, 16)
        assert (seen[0, 0], seen[8, 8]) == (240, 207)
    np.testing.assert_array_equal(uniad.neighbour_mask((4, 5), 3), windows((4, 5), 3))


def test_attention_does_not_depend_on_the_window():
    """The gradient of a token's output is zero for the memory inside its window, and only there."""
    attend = jax.tree.map(lambda x: x[0], uniad.init(KEY, SMALL)["decoder"]["attend"])
    mask = uniad.neighbour_mask(SMALL.grid, 3)
    q, memory = np.random.default_rng(0).standard_normal((2, 1, 20, 8)).astype(np.float32)

    def out(memory):
        args = (jnp.asarray(q), memory, memory, jnp.asarray(mask), SMALL, None)
        return uniad.attention(attend, *args)[0]

    slopes = jax.jit(jax.jacrev(out))(jnp.asarray(memory))[:, :, 0]
    felt = np.asarray(jnp.any(slopes != 0, axis=(1, 3)))
    np.testing.assert_array_equal(felt, ~mask)


def test_layers_are_drawn_one_by_one():
    params = uniad.init(KEY, SMALL)
    for stack in (params["encoder"]["attend"]["qkv"]["kernel"], params["decoder"]["queries"]):
        assert float(jnp.abs(stack[0] - stack[1]).min()) > 0
    assert 0 <= float(params["rows"].min()) <= float(params["columns"].max()) <= 1


def views(epoch=0, images=8, **config):
    maps = {n: jnp.asarray(m[:images]) for n, m in maps_of(0, 8).items() if n != "unused"}
    batch = {
        "features": maps, "index": jnp.arange(images), "epoch": jnp.full(images, epoch)
    }  # fmt: skip
    objective = Reconstruction(Config(**BASE | config), batch)
    return objective, objective.views(batch, KEY)


def test_jitter_has_the_strength_of_its_key():
    """The noise on a token is as long, on average, as the key's share of the token."""
    strength = 20 / np.sqrt(272)
    assert Config().jitter == pytest.approx(strength, abs=5e-3)
    _, drawn = views()
    noise = np.float64(drawn["noise"])
    assert noise.shape == (8, 30, 11)
    assert np.sqrt(np.mean(np.sum(noise**2, axis=2)) / 11) == pytest.approx(1, abs=0.05)
    assert not np.array_equal(noise, views(epoch=1)[1]["noise"])
    np.testing.assert_array_equal(views(images=3)[1]["noise"], noise[:3])


def test_loss_by_hand():
    """Without dropout, with the published jitter, in float64."""
    objective, drawn = views(dropout=0.0, jitter=1.5, scaled=False)
    params, extra = objective.init(KEY)
    loss, (_, _) = objective.loss(params, extra, drawn, key=KEY, step=jnp.int32(0))
    tokens = np.float64(tokens_of(objective.cfg, extra["squares"], drawn["levels"]))
    length = np.linalg.norm(tokens, axis=2, keepdims=True) / 11  # as published: ‖f‖ / C · scale
    jittered = tokens + 1.5 * np.sqrt(11) * length * np.float64(drawn["noise"])
    found = [rebuilt(params["network"], x, (6, 5), 2, 3) for x in jittered]
    assert float(loss) == pytest.approx(np.mean((np.array(found) - tokens) ** 2), rel=1e-5)


def test_dropout_is_drawn_by_sample():
    keys = jax.random.split(KEY, 6)
    x = jnp.ones((6, 50, 40))
    found = dropout(x, keys, 0.25)
    np.testing.assert_array_equal(np.unique(found), np.float32([0, 4 / 3]))
    assert float(jnp.mean(found == 0)) == pytest.approx(0.25, abs=0.02)
    np.testing.assert_array_equal(dropout(x[2:4], keys[2:4], 0.25), found[2:4])
    assert dropout(x, None, 0.25) is x


def test_scales_are_means_over_the_batches():
    objective, first = views()
    second = {**first, "levels": [2 * level for level in first["levels"]]}
    params, extra = objective.init(KEY)
    loss = jax.jit(lambda e, v, n: objective.loss(params, e, v, key=KEY, step=n))
    for step, seen in enumerate((first, second)):
        extra = loss(extra, seen, jnp.int32(step))[1][0]
    squares = [np.mean(np.float64(x) ** 2) for x in first["levels"]]
    np.testing.assert_allclose(extra["squares"], 2.5 * np.array(squares), rtol=1e-5)
    tokens = np.float64(tokens_of(objective.cfg, extra["squares"], first["levels"]))
    for level in (tokens[..., :7], tokens[..., 7:]):
        assert np.mean(level**2) == pytest.approx(1 / 2.5, rel=1e-5)


def test_a_perfect_reconstruction_scores_zero():
    """A network that gives every token's value back when all tokens are equal."""
    detector, normal = made("uniad", **BASE), maps_of(0, 2)
    flat = {n: np.full_like(m, 2.0) for n, m in normal.items()}
    objective = Reconstruction(
        Config(**BASE), {"features": {n: jnp.asarray(m) for n, m in flat.items()}}
    )
    params, _ = objective.init(KEY)
    network = params["network"]
    head = {"kernel": jnp.zeros_like(network["head"]["kernel"]), "bias": jnp.ones(11)}
    state = {"network": {**network, "head": head}, "squares": jnp.full(2, 4.0)}
    scores = detector.score(state, flat)
    np.testing.assert_allclose(scores.map, 0, atol=1e-6)
    np.testing.assert_allclose(scores.image, 0, atol=1e-6)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match=r"detector\.neighbourhood: .* 6 × 5 cells.*found 11"):
        views(neighbourhood=11)
    with pytest.raises(ConfigError, match=r"detector\.width: .*3 heads.*found 8"):
        made("uniad", width=8, heads=3)
    with pytest.raises(ConfigError, match=r"detector\.neighbourhood: expected .*odd, found 4"):
        made("uniad", neighbourhood=4)
