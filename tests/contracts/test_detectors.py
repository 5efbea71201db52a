"""What every detector must satisfy; the members of dsad.detectors are discovered."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from dsad.core.config import members
from dsad.core.errors import ConfigError, DataError
from dsad.core.mesh import MeshConfig, batch_sharding, make_mesh
from dsad.core.types import Detector, FeatureBatch, Scores

KEY = jax.random.key(0)


def maps_of(seed, count, shift=0.0):
    """Two layers of features on grids 6 × 5 and 3 × 3, far from the origin."""
    rng = np.random.default_rng(seed)
    make = lambda h, w, d: (8 + shift + rng.standard_normal((count, h, w, d))).astype(np.float32)  # noqa: E731
    return {"layer2": make(6, 5, 7), "layer3": make(3, 3, 4), "unused": make(2, 2, 3)}


class Batches:
    """A re-iterable feature source over ``maps``, in ``order``, the last batch padded."""

    def __init__(self, maps, order=None, size=4):
        self.maps, self.size = maps, size
        self.order = np.arange(len(maps["layer2"])) if order is None else order

    def __iter__(self):
        for at in range(0, len(self.order), self.size):
            picked = self.order[at : at + self.size]
            padding = self.size - len(picked)
            maps = {
                n: jnp.asarray(np.concatenate([m[picked], np.full((padding, *m.shape[1:]), 1e6)]))
                for n, m in self.maps.items()
            }
            index = np.concatenate([picked, np.full(padding, -1)])
            yield FeatureBatch(maps, np.arange(self.size) < len(picked), "tiles", index)


def knn_embedding(maps):
    """Neighbourhood means and half-pixel bilinear resampling by scipy, in float64."""
    window, grids = (1, 3, 3, 1), []
    for name in ("layer2", "layer3"):
        values = np.float64(maps[name])
        mean = ndimage.uniform_filter(values, window, mode="constant")
        grids.append(mean / ndimage.uniform_filter(np.ones_like(values), window, mode="constant"))
    height, width = grids[0].shape[1:3]
    deep = grids[1]
    at = [
        np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
        for n, m in zip(deep.shape[1:3], (height, width), strict=True)
    ]
    points = np.meshgrid(*at, indexing="ij")
    up = np.stack(
        [[ndimage.map_coordinates(c, points, order=1) for c in np.moveaxis(m, 2, 0)] for m in deep]
    )
    return np.concatenate([grids[0], np.moveaxis(up, 1, 3)], axis=3)


def knn_oracle(config, normal, test):
    bank = knn_embedding(normal).reshape(-1, 11)
    cells = knn_embedding(test)
    gaps = np.linalg.norm(cells.reshape(-1, 1, 11) - bank[None], axis=2)
    maps = np.sort(gaps, axis=1)[:, : config.get("k", 1)].mean(axis=1).reshape(cells.shape[:3])
    return maps, maps.max(axis=(1, 2))


#: Per detector: its float64 oracle and the configurations to run. A new member must be added.
CASES = {"knn": (knn_oracle, [{}, {"k": 3}])}
PARAMS = [(name, config) for name in members("detectors") for config in CASES[name][1]]


def made(name, **config):
    module = importlib.import_module(f"dsad.detectors.{name}")
    return module.build(module.Config(**config))


@functools.lru_cache
def jitted(detector):
    """One compiled score per detector for all tests; they score 8 images against 6."""
    return jax.jit(detector.score)


@pytest.fixture(params=members("detectors"))
def case(request):
    detector = made(request.param, **CASES[request.param][1][0])
    return detector, jitted(detector)


def close(found, expected, rtol=1e-6):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol)


@pytest.mark.parametrize(("name", "config"), PARAMS)
def test_equals_its_oracle(name, config):
    detector = made(name, **config)
    assert isinstance(detector, Detector)
    normal, test = maps_of(0, 6), maps_of(1, 8)
    state = detector.fit(Batches(normal), mesh=None, key=KEY)
    scores = jitted(detector)(state, test)
    assert isinstance(scores, Scores)
    assert (scores.map.shape, scores.image.shape) == ((8, 6, 5), (8,))
    assert scores.map.dtype == scores.image.dtype == jnp.float32
    close(scores, CASES[name][0](config, normal, test), 1e-5)


def test_order_padding_and_batch_size_change_nothing(case):
    detector, score = case
    normal, test = maps_of(0, 6), maps_of(1, 8)
    expected = score(detector.fit(Batches(normal), mesh=None, key=KEY), test)
    # Batches of 4 leave two rows of padding; batches of 3 leave none.
    other = Batches(normal, order=np.random.default_rng(0).permutation(6), size=3)
    state = detector.fit(other, mesh=None, key=KEY)
    close(score(state, test), expected)
    one = score(state, {n: m[1:2] for n, m in test.items()})
    close(one, jax.tree.map(lambda x: x[1:2], expected))


def test_same_on_one_and_eight_devices(case, devices):
    detector, score = case
    normal, test = maps_of(0, 6), maps_of(1, 8)
    expected = score(detector.fit(Batches(normal), mesh=None, key=KEY), test)
    mesh = make_mesh(MeshConfig(), devices)
    state = detector.fit(Batches(normal), mesh=mesh, key=KEY)
    placed = jax.device_put(test, batch_sharding(mesh))
    close(score(state, placed), expected)


def test_state_is_arrays_that_survive_a_file(case, tmp_path):
    detector, score = case
    test = maps_of(1, 8)
    state = detector.fit(Batches(maps_of(0, 6)), mesh=None, key=KEY)
    leaves, structure = jax.tree.flatten(state)
    assert all(isinstance(x, jax.Array) and not x.weak_type for x in leaves)
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as file:
        loaded = jax.tree.unflatten(structure, [file[n] for n in file.files])
    expected = score(state, test)
    jax.tree.map(np.testing.assert_array_equal, score(loaded, test), expected)


def test_normal_scores_lie_below_corrupted_ones(case):
    detector, score = case
    state = detector.fit(Batches(maps_of(0, 6)), mesh=None, key=KEY)
    test = maps_of(1, 8)
    corrupt = {n: m.copy() for n, m in test.items()}
    corrupt["layer2"][:, 2:4, 1:3] += 4
    normal, broken = score(state, test), score(state, corrupt)
    assert normal.image.max() < broken.image.min()
    peak = np.asarray(broken.map).reshape(8, -1).argmax(axis=1)
    rows, columns = np.unravel_index(peak, (6, 5))
    assert ((rows >= 1) & (rows <= 4)).all()
    assert (columns <= 3).all()


def test_missing_layer_lists_what_exists(case):
    detector = case[0]
    source = Batches({"layer2": maps_of(0, 4)["layer2"]})
    with pytest.raises(ConfigError, match=r"no feature map named layer3.*gives: layer2"):
        detector.fit(source, mesh=None, key=KEY)


def test_empty_and_broken_sources_are_errors(case):
    detector = case[0]
    empty = {n: m[:0] for n, m in maps_of(0, 1).items()}
    with pytest.raises(DataError, match="found 0"):
        detector.fit(Batches(empty), mesh=None, key=KEY)
    normal = maps_of(0, 6)
    normal["layer3"][4, 1, 1, 2] = np.nan
    with pytest.raises(DataError, match=r"NaN or infinite features of tiles samples \[4\]"):
        detector.fit(Batches(normal), mesh=None, key=KEY)


# The nearest-neighbour detector's own options.


def test_knn_subset_is_uniform_and_independent_of_the_order():
    normal = maps_of(0, 9)
    every = np.asarray(made("knn").fit(Batches(normal), mesh=None, key=KEY)["bank"])
    assert every.shape == (9 * 30, 11)
    fit = lambda order, size, key: np.asarray(  # noqa: E731
        made("knn", bank_rows=50).fit(Batches(normal, order, size), mesh=None, key=key)["bank"]
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
        made("knn", bank_rows=1000).fit(Batches(normal), mesh=None, key=KEY)["bank"], every
    )


def test_knn_search_split_over_a_mesh(devices):
    detector, test = made("knn"), maps_of(1, 8)
    state = detector.fit(Batches(maps_of(0, 6)), mesh=None, key=KEY)
    mesh = make_mesh(MeshConfig(), devices)
    close(detector.score(state, test, mesh=mesh), jitted(detector)(state, test))


def test_knn_of_its_own_normals_is_zero():
    normal, detector = maps_of(0, 6), made("knn")
    state = detector.fit(Batches(normal), mesh=None, key=KEY)
    eight = {n: np.concatenate([m, m[:2]]) for n, m in normal.items()}
    np.testing.assert_allclose(jitted(detector)(state, eight).map, 0.0, atol=1e-5)


def test_knn_refuses_bad_configurations():
    for config, message in [
        ({"layers": ()}, "layers"),
        ({"neighbourhood": 2}, "odd number"),
        ({"k": 0}, r"detector\.k"),
        ({"k": 5, "bank_rows": 3}, "bank_rows"),
        ({"bank_rows": -1}, "bank_rows"),
    ]:
        with pytest.raises(ConfigError, match=message):
            made("knn", **config)
    with pytest.raises(DataError, match=r"at least k = 40.*found 30"):
        made("knn", k=40).fit(Batches(maps_of(0, 1)), mesh=None, key=KEY)
    with pytest.raises(ConfigError, match="nothing to train"):
        made("knn").fit(Batches(maps_of(0, 1)), mesh=None, key=KEY, trained={})
