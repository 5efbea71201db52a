"""The nearest-neighbour detector's own options; the contract has the rest."""

import jax
import numpy as np
import pytest

from dsad.core.errors import ConfigError, DataError
from dsad.core.mesh import MeshConfig, make_mesh
from tests.contracts.detectors.common import ALONE, KEY, Batches, close, kept_rows, made, maps_of


def test_knn_subset_is_uniform_and_independent_of_the_order():
    normal = maps_of(0, 9)
    every = kept_rows(made("knn").fit(Batches(normal), **ALONE))
    assert every.shape == (9 * 30, 11)
    fit = lambda order, size, key: kept_rows(  # noqa: E731
        made("knn", bank_rows=50).fit(Batches(normal, order, size), **ALONE | {"key": key})
    )
    subset = fit(None, 4, KEY)
    assert subset.shape == (50, 11)
    assert len(np.unique(subset, axis=0)) == 50
    assert {r.tobytes() for r in subset} <= {r.tobytes() for r in every}
    np.testing.assert_allclose(fit(np.arange(9)[::-1], 3, KEY), subset, rtol=1e-6)
    assert not np.array_equal(fit(None, 4, jax.random.key(1)), subset)
    place = {r.tobytes(): i for i, r in enumerate(every)}
    drawn = [fit(None, 4, jax.random.key(s)) for s in range(20)]
    hits = np.bincount([place[r.tobytes()] for b in drawn for r in b], minlength=270)
    # 20 draws of 50 of 270: 3.7 ± 1.7 per row, 111 ± 9.5 per image of 30 rows.
    assert hits.max() <= 12
    assert (abs(hits.reshape(9, 30).sum(axis=1) - 1000 / 9) < 5 * 9.5).all()
    np.testing.assert_array_equal(
        kept_rows(made("knn", bank_rows=1000).fit(Batches(normal), **ALONE)), every
    )


def test_knn_search_split_over_a_mesh(devices):
    detector, test = made("knn"), maps_of(1, 8)
    state = detector.fit(Batches(maps_of(0, 6)), **ALONE)
    mesh = make_mesh(MeshConfig(), devices)
    close(detector.score(state, test, mesh=mesh), jax.jit(detector.score)(state, test))


def test_knn_of_its_own_normals_is_zero():
    normal, detector = maps_of(0, 6), made("knn")
    state = detector.fit(Batches(normal), **ALONE)
    eight = {n: np.concatenate([m, m[:2]]) for n, m in normal.items()}
    np.testing.assert_allclose(jax.jit(detector.score)(state, eight).map, 0.0, atol=1e-5)


def test_knn_refuses_bad_configurations():
    for config, message in [
        ({"layers": ()}, "layers"),
        ({"neighbourhood": 2}, "neighbourhood: expected an integer >= 1, odd, found 2"),
        ({"k": 0}, r"detector\.k"),
        ({"k": 5, "bank_rows": 3}, "bank_rows"),
        ({"bank_rows": -1}, "bank_rows"),
    ]:
        with pytest.raises(ConfigError, match=message):
            made("knn", **config)
    with pytest.raises(DataError, match=r"at least k = 40.*found 30"):
        made("knn", k=40).fit(Batches(maps_of(0, 1)), **ALONE)
    with pytest.raises(ConfigError, match="nothing to train"):
        made("knn").fit(Batches(maps_of(0, 1)), **ALONE, trained={})
