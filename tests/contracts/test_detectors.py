"""What every detector must satisfy; the members of dsad.detectors are discovered.

So are the miniatures of ``tests/seams/detectors``, each together with its case.

A member ``dsad/detectors/NAME.py`` needs ``tests/contracts/detectors/NAME.py`` with ``CONFIGS``,
the configurations to run, and ``oracle(config, normal, test) -> (maps, image)`` in float64, with
the state instead of the normal maps for one that trains; with ``SYMBOLIC = True`` its score is
exported for any batch size instead of a fixed one. A detector of other maps than those of
``common.maps_of`` brings its own, ``maps_of(seed, count)``, and ``corrupted(maps)``;
``READS_SOURCE = False`` says that its fit looks at no image, ``SCORES_ITS_OWN = True`` that only
images of its fit have scores: its ``maps_of`` gives no others. One that trains on images brings
``network()``, an ``ImageMaps``, and ``images_of(source)``, a pass over the images of a source; one
that trains on labelled images ``network()``, a backbone, and ``labelled_of(source)``.
"""

import dataclasses
import functools
import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from safetensors.numpy import load_file, save_file

from dsad.core.detection import (
    Detector,
    DetectorTraits,
    HasPanels,
    Measures,
    Prepares,
    Scores,
    TrainsOnData,
)
from dsad.core.errors import ConfigError, DataError
from dsad.core.mesh import MeshConfig, batch_sharding, make_mesh
from dsad.core.tree import named_arrays, rebuilt
from dsad.detectors._features import EmbedsCells
from dsad.ops import neighbors
from tests.contracts.detectors import common
from tests.contracts.detectors.common import Batches, close, fitted, made

CASES = {name: member.case for name, member in common.cases().items()}
PARAMS = [(name, config) for name, case in CASES.items() for config in case.CONFIGS]


def maps_of(name, seed, count):
    return getattr(CASES[name], "maps_of", common.maps_of)(seed, count)


@functools.lru_cache
def jitted(detector):
    """One compiled score per detector for all tests; they score 8 images against 6."""
    return jax.jit(detector.score)


@pytest.fixture(params=CASES)
def case(request):
    detector = made(request.param, **CASES[request.param].CONFIGS[0])
    return detector, jitted(detector), functools.partial(maps_of, request.param)


@pytest.fixture
def reader(case, request):
    """A case whose fit reads the images."""
    name = request.node.callspec.params["case"]
    if not getattr(CASES[name], "READS_SOURCE", True):
        pytest.skip(f"{name} learns nothing from images: its fit does not read them")
    return case


@pytest.mark.parametrize(("name", "config"), PARAMS)
def test_equals_its_oracle(name, config):
    detector = made(name, **config)
    assert isinstance(detector, Detector)
    normal, test = maps_of(name, 0, 6), maps_of(name, 1, 8)
    state = fitted(detector, Batches(normal))
    scores = jitted(detector)(state, test)
    assert isinstance(scores, Scores)
    expected = CASES[name].oracle(config, state if detector.traits.trains_on else normal, test)
    assert (scores.map.shape, scores.image.shape) == (expected[0].shape, (8,))
    assert scores.map.dtype == scores.image.dtype == jnp.float32
    close(scores, expected, 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_public_members_are_those_of_the_seam(name):
    detector = made(name)
    known = (Detector, HasPanels, EmbedsCells, Measures, Prepares, TrainsOnData)
    seams = [s for s in known if isinstance(detector, s)]
    public = lambda of: {n for n in dir(of) if not n.startswith("_")}  # noqa: E731
    assert public(detector) == set().union(*map(public, seams))
    assert isinstance(detector.traits, DetectorTraits)
    assert isinstance(detector, TrainsOnData) == bool(detector.traits.trains_on)


def test_a_prepared_state_scores_the_same(case):
    detector, score, maps = case
    if not isinstance(detector, Prepares):
        pytest.skip("it prepares nothing")
    state, test = fitted(detector, Batches(maps(0, 6))), maps(1, 8)
    prepared = detector.prepared(state)
    assert len(jax.tree.leaves(prepared)) > len(jax.tree.leaves(state))
    close(score(prepared, test), score(state, test), 1e-6)


def test_order_padding_and_batch_size_change_nothing(case):
    detector, score, maps = case
    normal, test = maps(0, 6), maps(1, 8)
    expected = score(fitted(detector, Batches(normal)), test)
    # Batches of 4 leave two rows of padding; batches of 3 leave none.
    other = Batches(normal, order=np.random.default_rng(0).permutation(6), size=3)
    state = fitted(detector, other)
    close(score(state, test), expected)
    one = score(state, {n: m[1:2] for n, m in test.items()})
    close(one, jax.tree.map(lambda x: x[1:2], expected))


@pytest.fixture(
    params=[1, pytest.param(2, marks=pytest.mark.slow), 8],
    ids=["1-device", "2-devices", "8-devices"],
)
def devices(request):
    return jax.devices()[: request.param]


def test_same_on_one_two_and_eight_devices(case, devices):
    """One that trains after one step: rounding grows from step to step."""
    detector, score, maps = case
    if isinstance(detector, TrainsOnData):
        recipe = dataclasses.replace(detector.recipe, steps=1)
        detector = type(detector)(dataclasses.replace(detector.config, recipe=recipe))
    normal, test = maps(0, 6), maps(1, 8)
    expected = score(fitted(detector, Batches(normal)), test)
    mesh = make_mesh(MeshConfig(), devices)
    state = fitted(detector, Batches(normal), mesh)
    placed = jax.device_put(test, batch_sharding(mesh))
    tolerance = 1e-5 if isinstance(detector, TrainsOnData) else 1e-6  # of sums over the batch
    close(jax.jit(functools.partial(detector.score, mesh=mesh))(state, placed), expected, tolerance)


def test_state_is_arrays_that_survive_a_file(case, tmp_path):
    detector, score, maps = case
    test = maps(1, 8)
    state = fitted(detector, Batches(maps(0, 6)))
    leaves, structure = jax.tree.flatten(state)
    assert all(isinstance(x, jax.Array) and not x.weak_type for x in leaves)
    outline, arrays = named_arrays(jax.device_get(state))
    save_file(arrays, tmp_path / "state.safetensors")
    loaded = rebuilt(json.loads(json.dumps(outline)), load_file(tmp_path / "state.safetensors"))
    assert jax.tree.structure(loaded) == structure
    expected = score(state, test)
    jax.tree.map(np.testing.assert_array_equal, score(loaded, test), expected)


def test_same_for_any_tile_of_the_search(case, monkeypatch):
    detector, score, maps = case
    test = maps(1, 8)
    state = fitted(detector, Batches(maps(0, 6)))
    expected = score(state, test)
    for name in [n for n in vars(neighbors) if n.endswith("TILE")]:
        monkeypatch.setattr(neighbors, name, 8)
    close(jax.jit(lambda s, f: detector.score(s, f))(state, test), expected)


def test_exported_program_equals_the_live_one(case, request):
    detector, score, maps = case
    test = maps(1, 8)
    state = fitted(detector, Batches(maps(0, 6)))
    symbolic = getattr(CASES[request.node.callspec.params["case"]], "SYMBOLIC", False)
    batch = export.symbolic_shape("b")[0] if symbolic else 8
    spec = lambda x, *lead: jax.ShapeDtypeStruct((*lead, *x.shape[len(lead) :]), x.dtype)  # noqa: E731
    specs = jax.tree.map(spec, state), {n: spec(m, batch) for n, m in test.items()}
    program = jax.jit(lambda s, f: tuple(detector.score(s, f)))
    read = export.deserialize(bytearray(export.export(program)(*specs).serialize()))
    close(jax.jit(read.call)(state, test), score(state, test))
    if symbolic:
        three = jax.tree.map(lambda x: x[:3], test)
        close(jax.jit(read.call)(state, three), jax.tree.map(lambda x: x[:3], score(state, test)))


def test_normal_scores_lie_below_corrupted_ones(case, request):
    detector, score, maps = case
    if getattr(CASES[request.node.callspec.params["case"]], "SCORES_ITS_OWN", False):
        pytest.skip("it scores no image that its fit has not seen; see its own tests")
    state = fitted(detector, Batches(maps(0, 6)))
    test = maps(1, 8)
    corrupt = getattr(CASES[request.node.callspec.params["case"]], "corrupted", common.corrupted)
    corrupt = corrupt({n: m.copy() for n, m in test.items()})
    normal, broken = score(state, test), score(state, corrupt)
    assert normal.image.max() < broken.image.min()
    peak = np.asarray(broken.map).reshape(8, -1).argmax(axis=1)
    height, width = broken.map.shape[1:]  # any grid: evaluation resizes it to the image
    rows, columns = np.unravel_index(peak, (height, width))
    rows, columns = (rows + 0.5) * 6 // height, (columns + 0.5) * 5 // width
    assert ((rows >= 1) & (rows <= 4)).all()
    assert (columns <= 3).all()


@pytest.mark.parametrize("name", CASES)
def test_layers_are_named_once(name):
    with pytest.raises(ConfigError, match=r"detector\.layers: .* each once .*found .*2.*3.*2"):
        made(name, layers=("layer2", "layer3", "layer2"))


OPTIONS = [
    (name, field)
    for name in CASES
    for field, hint in typing.get_type_hints(made(name).config.__class__).items()
    if typing.get_origin(hint) is typing.Literal
]


@pytest.mark.parametrize(("name", "field"), OPTIONS)
def test_options_that_do_not_exist_are_refused(name, field):
    with pytest.raises(ConfigError, match=rf"detector\.{field}: expected one of .*'typo'"):
        made(name, **{field: "typo"})


def test_missing_layer_lists_what_exists(reader):
    detector, _, maps = reader
    source = Batches({"layer2": maps(0, 4)["layer2"]})
    with pytest.raises(ConfigError, match=r"no feature map named layer3.*gives: layer2"):
        fitted(detector, source)


def test_empty_and_broken_sources_are_errors(reader):
    detector, _, maps = reader
    empty = {n: m[:0] for n, m in maps(0, 1).items()}
    with pytest.raises(DataError, match="found 0"):
        fitted(detector, Batches(empty))
    normal = maps(0, 6)
    normal["layer3"][4, 1, 1, 2] = np.nan
    with pytest.raises(DataError, match=r"NaN or infinite features of tiles samples \[4\]"):
        fitted(detector, Batches(normal))


@pytest.mark.parametrize(("name", "config"), PARAMS)
def test_what_does_not_count_is_left_out_as_the_traits_say(name, config):
    """Rows 3 to 5 of the grid lie outside, and the last one, which row 4 sees, changes."""
    detector = made(name, **config)
    if not detector.traits.leaves_out:
        pytest.skip("does not claim it")

    class Bordered(Batches):
        def __iter__(self):
            inside = np.tile(np.float32([[0, 0.5], [0, 1]]), (self.size, 1, 1))
            yield from (batch._replace(inside=inside) for batch in super().__iter__())

    def changed(maps):
        last = np.float32(50 * (np.arange(6) == 5))[:, None, None]
        return {**maps, "layer2": maps["layer2"] + last}

    inside = jnp.tile(jnp.float32([[0, 0.5], [0, 1]]), (8, 1, 1))
    found = []
    for change in (lambda maps: maps, changed):
        state = detector.fit(Bordered(change(maps_of(name, 0, 6))), **common.ALONE)
        scores = jitted(detector)(state, change(maps_of(name, 1, 8)), inside=inside)
        # That of test images holds what they are known again by, whole.
        own = jax.tree.leaves(state) if detector.traits.fits_on == "normals" else []
        found.append([*own, scores.image])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "config"), PARAMS)
def test_a_fit_without_seeds_is_the_same_with_any_key(name, config):
    detector = made(name, **config)
    if detector.traits.seeded:
        pytest.skip("does not claim it")
    source = Batches(maps_of(name, 0, 6))
    states = [detector.fit(source, **common.ALONE | {"key": jax.random.key(k)}) for k in (3, 81)]
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, other)
