"""Mutual scores against every distance in float64, on any mesh, in any blocks."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.ops import mutual
from dsad.ops.mutual import mutual_scores


def tokens_of(images=6, tokens=9, depth=5, seed=0):
    made = np.random.default_rng(seed).standard_normal((images, tokens, depth))
    return np.float32(made / np.linalg.norm(made, axis=-1, keepdims=True))


def oracle(tokens, kept):
    """Every difference of every two tokens, in float64."""
    tokens = np.float64(tokens)
    gaps = np.linalg.norm(tokens[:, :, None, None] - tokens[None, None], axis=-1).min(-1)
    for image, found in enumerate(gaps):
        found[:, image] = np.inf
    return np.sort(gaps, axis=-1)[..., :kept].mean(-1)


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_equals_float64(kept):
    tokens = tokens_of()
    found = mutual_scores(tokens, kept)
    assert (found.shape, found.dtype) == ((6, 9), np.float32)
    np.testing.assert_allclose(found, oracle(tokens, kept), rtol=2e-6)
    np.testing.assert_array_equal(mutual_scores(jnp.asarray(tokens), kept), found)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("block", [None, 9, 20])
@pytest.mark.parametrize("table", [mutual.TABLE, 1500])
def test_blocks_devices_and_turns_change_rounding_alone(devices, block, table):
    """11 images: every mesh but one pads. 1500 bytes hold one row of blocks or a few."""
    tokens = tokens_of(11)
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    seen = []
    found = mutual_scores(
        tokens, 4, mesh=mesh, block=block, table=table, progress=lambda *said: seen.append(said)
    )
    np.testing.assert_allclose(found, oracle(tokens, 4), rtol=2e-6)
    assert [done for done, _, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] == seen[-1][1]


def test_products_serve_both_sides_where_the_table_fits(monkeypatch):
    """Of 8 blocks 36 pairs, not 64; on 8 devices 4 + 1 steps instead of 8."""
    pairs, plain = [], mutual._nearest
    monkeypatch.setattr(mutual, "_nearest", lambda *x: jax.debug.callback(
        lambda: pairs.append(0)) or plain(*x))  # fmt: skip
    tokens = tokens_of(8, 7, 6)
    for table, expected in ((mutual.TABLE, 36), (500, 64)):
        pairs.clear()
        jax.block_until_ready(mutual_scores(tokens, 2, block=7, table=table))
        jax.effects_barrier()
        assert len(pairs) == expected
    plan = mutual._plan(8, 7, 2, make_mesh(MeshConfig(), jax.devices()[:8]), 7, mutual.TABLE)
    assert (plan.steps, plan.blocks, plan.symmetric) == (5, 1, True)


def test_permuting_images_permutes_scores():
    tokens = tokens_of(7)
    order = np.random.default_rng(1).permutation(7)
    np.testing.assert_allclose(
        mutual_scores(tokens[order], 2), mutual_scores(tokens, 2)[order], rtol=1e-6
    )


def test_an_image_with_copies_among_the_others_scores_zero():
    tokens = tokens_of(6)
    tokens[[2, 5]] = tokens[0]
    found = mutual_scores(tokens, 2)
    np.testing.assert_allclose(found[[0, 2, 5]], 0, atol=1e-3)
    assert found[[1, 3, 4]].min() > 0.05
    assert mutual_scores(tokens, 3)[0].min() > 0.01  # two copies are no three


@pytest.mark.parametrize("gap", [0, 1e-4, 1e-3, 1e-2, 1])
@pytest.mark.parametrize("depth", [64, 384, 1024])
def test_distances_from_cosines_are_those_from_differences(gap, depth):
    """Near 0, where a cosine of float32 says least, the less the longer a sum is."""
    first = tokens_of(1, 40, depth)
    second = first + np.float32(gap) * tokens_of(1, 40, depth, 1)
    second /= np.linalg.norm(second, axis=-1, keepdims=True)
    found = mutual_scores(np.concatenate([first, second]), 1)
    nearest = np.linalg.norm(np.float64(first)[0] - np.float64(second)[0], axis=-1)
    np.testing.assert_allclose(found[0], nearest, rtol=1e-5, atol=1e-3)


def test_the_root_comes_before_the_mean():
    """One image at distance 0, one at √2: their mean is √½, not 1."""
    unit = np.eye(2, dtype=np.float32)
    tokens = np.stack([unit[0], unit[0], unit[1]])[:, None]
    assert mutual_scores(tokens, 2)[0, 0] == pytest.approx(np.sqrt(0.5), abs=1e-3)


def test_a_broken_token_is_no_silent_zero():
    tokens = tokens_of(3)
    tokens[1, 2, 3] = np.nan
    found = np.isnan(mutual_scores(tokens, 1))
    assert found[[0, 2]].all()
    assert found[1].tolist() == [number == 2 for number in range(9)]


def test_tokens_are_let_go_once_they_are_placed():
    given, held = [tokens_of(11)], []
    known = weakref.ref(given[0])
    tell = lambda *_: held.append(known() is not None)  # noqa: E731
    mutual_scores(given.pop(), 4, block=20, progress=tell)
    assert held
    assert not any(held)


def test_bytes_of_a_thousand_images_stay_below_the_limit():
    plan = mutual._plan(1000, 1369, 299, None, None, mutual.TABLE)
    assert plan.symmetric
    assert 4 * plan.rows * plan.blocks * plan.group**2 * plan.tokens == 4 * 1000**2 * 1369
    for count in (2000, 5000):
        plan = mutual._plan(count, 1369, 299, None, None, mutual.TABLE)
        assert not plan.symmetric
        table = 4 * plan.rows * plan.blocks * plan.group**2 * plan.tokens
        assert mutual.TABLE / 2 < table <= mutual.TABLE


@pytest.mark.parametrize(("shape", "kept", "message"), [
    ((3, 4), 1, r"expected tokens \(N, T, C\)"), ((1, 4, 2), 1, "at least 2 are needed"),
    ((3, 4, 2), 3, "expected 1 <= kept < 3"), ((3, 4, 2), 0, "found kept = 0"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused(shape, kept, message):
    with pytest.raises(ConfigError, match=message):
        mutual_scores(np.ones(shape, np.float32), kept)
