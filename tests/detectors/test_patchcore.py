"""PatchCore's own options and the published numbers of its parts; the contract has the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core.errors import ConfigError, DataError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.detectors import _patches, patchcore
from tests.contracts.detectors.common import ALONE, KEY, Batches, close, kept_rows, made, maps_of


@pytest.mark.parametrize(
    ("length", "size", "edges"),
    [
        (6912, 1024, [(0, 7), (6, 14), (13, 21), (20, 27)]),
        (9216, 1024, [(0, 9), (9, 18)]),
        (11520, 1024, [(0, 12), (11, 23), (22, 34)]),
        (9216, 1536, [(0, 6), (6, 12)]),
        (3072, 1024, [(0, 3), (3, 6)]),
    ],
)
def test_adaptive_bins(length, size, edges):
    values = np.random.default_rng(0).standard_normal((2, length)).astype(np.float32)
    found = _patches.adaptive_mean(values, size)
    assert found.shape == (2, size)
    expected = [values[:, a:b].mean(axis=1, dtype=np.float64) for a, b in edges]
    np.testing.assert_allclose(found[:, : len(edges)], np.stack(expected, 1), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(_patches.adaptive_mean(np.ones((1, length)), size), 1.0)


def test_a_constant_map_dims_at_zero_borders_only():
    maps = jnp.full((1, 5, 4, 1024), 9.0)
    zeros = _patches.pooled_neighbourhoods(maps, 3, 1024, count_normalised=False)
    np.testing.assert_allclose(zeros[0, 1:-1, 1:-1], 9.0, rtol=1e-6)
    np.testing.assert_allclose(zeros[0, 0, 1:-1], 6.0, rtol=1e-6)
    np.testing.assert_allclose(zeros[0, [0, 0, 4, 4], [0, 3, 0, 3]], 4.0, rtol=1e-6)
    normal = _patches.pooled_neighbourhoods(maps, 3, 1024)
    np.testing.assert_allclose(normal, 9.0, rtol=1e-6)


def test_reweighting_with_equal_distances():
    # The cell at the origin is at distance 2 of every row: s = s* (1 - 1/b).
    bank = jnp.asarray(np.concatenate([2 * np.eye(5), -2 * np.eye(5)]), jnp.float32)
    state = {"bank": bank, "rows": jnp.int32(10)}
    weight = patchcore._weight(jnp.zeros((1, 5)), state, jnp.array([3]), 9)
    np.testing.assert_allclose(weight, 1 - 1 / 9, rtol=1e-6)
    # Distances too large for a plain exponential.
    far = patchcore._weight(jnp.full((1, 5), 1e3), state, jnp.array([3]), 9)
    assert np.isfinite(far).all()


@pytest.mark.parametrize("bank", ["coreset", "random", "all"])
def test_memory_rows_score_zero_and_keep_their_values(bank):
    normal, detector = maps_of(0, 6), made("patchcore", bank=bank, bank_fraction=0.25)
    state = detector.fit(Batches(normal), **ALONE)
    rows = {r.tobytes() for r in kept_rows(state)}
    assert len(rows) == (180 if bank == "all" else 45)
    eight = {n: np.concatenate([m, m[:2]]) for n, m in normal.items()}
    maps = np.asarray(jax.jit(detector.score)(state, eight).map)[:6]
    assert (maps < 1e-5).sum() == len(rows)


def test_the_bank_depends_on_the_key_and_the_size_on_the_budget():
    normal = maps_of(0, 6)
    fit = lambda key=KEY, **config: np.asarray(  # noqa: E731
        kept_rows(made("patchcore", **config).fit(Batches(normal), **ALONE | {"key": key}))
    )
    assert not np.array_equal(fit(), fit(jax.random.key(1)))
    np.testing.assert_array_equal(fit(bank_rows=18), fit(bank_bytes=18 * 44 + 43))
    assert fit(bank_rows=1000, bank="random").shape == (180, 11)


def test_search_split_over_a_mesh(devices):
    detector, test = made("patchcore", bank="random", reweighted=True), maps_of(1, 8)
    mesh = make_mesh(MeshConfig(), devices)
    state = detector.fit(Batches(maps_of(0, 6)), **ALONE | {"mesh": mesh})
    alone = detector.fit(Batches(maps_of(0, 6)), **ALONE)
    close(detector.score(state, test, mesh=mesh), jax.jit(detector.score)(alone, test))


def test_fit_tells_its_progress():
    calls = []
    made("patchcore").fit(
        Batches(maps_of(0, 6)), **ALONE | {"progress": lambda *call: calls.append(call)}
    )
    assert calls[-1][:2] == (18, 18)


def test_refuses_bad_configurations():
    for config, message in [
        ({"layers": ()}, "layers"),
        ({"neighbourhood": 2}, "neighbourhood: expected an integer >= 1, odd, found 2"),
        ({"bank_fraction": 0.0}, "bank_fraction"),
        ({"bank_rows": -1}, "bank_rows"),
        ({"bank_rows": 5, "bank_bytes": 9}, "bank_bytes: expected 0 with .*bank_rows .*found 9"),
        ({"projection_dim": -1}, "projection_dim"),
        ({"neighbours": 1}, "neighbours"),
    ]:
        with pytest.raises(ConfigError, match=message):
            made("patchcore", **config)
    small = made("patchcore", bank="random", bank_rows=4, reweighted=True)
    with pytest.raises(DataError, match="at least 9 feature rows.*found 4 of 180"):
        small.fit(Batches(maps_of(0, 6)), **ALONE)
    with pytest.raises(ConfigError, match="nothing to train"):
        made("patchcore").fit(Batches(maps_of(0, 1)), **ALONE, trained={})
