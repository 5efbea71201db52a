"""What every detector must satisfy; the members of dsad.detectors are discovered.

A member ``dsad/detectors/NAME.py`` needs ``tests/contracts/detectors/NAME.py`` with ``CONFIGS``,
the configurations to run, and ``oracle(config, normal, test) -> (maps, image)`` in float64.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core.config import members
from dsad.core.errors import ConfigError, DataError
from dsad.core.mesh import MeshConfig, batch_sharding, make_mesh
from dsad.core.types import Detector, Scores
from tests.contracts.detectors.common import KEY, Batches, close, made, maps_of

CASES = {n: importlib.import_module(f"tests.contracts.detectors.{n}") for n in members("detectors")}
PARAMS = [(name, config) for name, case in CASES.items() for config in case.CONFIGS]


@functools.lru_cache
def jitted(detector):
    """One compiled score per detector for all tests; they score 8 images against 6."""
    return jax.jit(detector.score)


@pytest.fixture(params=members("detectors"))
def case(request):
    detector = made(request.param, **CASES[request.param].CONFIGS[0])
    return detector, jitted(detector)


@pytest.mark.parametrize(("name", "config"), PARAMS)
def test_equals_its_oracle(name, config):
    detector = made(name, **config)
    assert isinstance(detector, Detector)
    normal, test = maps_of(0, 6), maps_of(1, 8)
    state = detector.fit(Batches(normal), mesh=None, key=KEY)
    scores = jitted(detector)(state, test)
    assert isinstance(scores, Scores)
    expected = CASES[name].oracle(config, normal, test)
    assert (scores.map.shape, scores.image.shape) == (expected[0].shape, (8,))
    assert scores.map.dtype == scores.image.dtype == jnp.float32
    close(scores, expected, 1e-5)


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
    height, width = broken.map.shape[1:]  # any grid: evaluation resizes it to the image
    rows, columns = np.unravel_index(peak, (height, width))
    rows, columns = (rows + 0.5) * 6 // height, (columns + 0.5) * 5 // width
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
