"""Every objective, on 1 and on 8 devices: the promises of ``core.types.Objective``.

A member ``dsad/objectives/NAME.py`` needs ``tests/contracts/objectives/NAME.py`` with ``CASE``;
a file of ``tests/seams/objectives`` is a miniature method together with its ``CASE``.
"""

import functools
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core import types as seams
from dsad.core.errors import ConfigError
from dsad.core.mesh import place_batch
from dsad.core.tree import flatten
from dsad.core.types import Objective, PerSample
from dsad.objectives.encoder import EncoderObjective
from tests.contracts.objectives.common import SIDE, batch, cases, perturbed
from tests.train.equality import (
    MIN_SIZE,
    assert_equal,
    mesh_of,
    one_step,
    parts,
    recorded,
    stepped,
    training,
)

#: What an objective may offer besides.
OFFERS = (
    seams.HasEncoder, seams.ReadsTensors, seams.Embeds, seams.PerSample,
    seams.HasParts, seams.HasPictures, seams.HasProjectors, seams.KnowsFlops,
)  # fmt: skip


@functools.cache
def program(name):
    """Views, compiled."""
    return jax.jit(perturbed(name)[0].views)


def views_on(name, devices=1, epoch=0, key=5):
    mesh = mesh_of(devices)
    with jax.set_mesh(mesh):
        views = program(name)(place_batch(batch(name, epoch), mesh), jax.random.key(key))
    return flatten(jax.device_get(views))


#: "steady" is "queue" and a term, MoCo v2 "queue" in large; SimCLR is "simsiam" with a loss that is
#: tested on one and eight devices, "infonce" and "densecl" are DS2 with such a one; ISSTAD,
#: CutPaste and RotPred have oracles of their own, and are an MAE and DS2s to the mesh.
LATER = ("steady", "isstad", "cutpaste", "infonce", "densecl", "mocov2", "simclr", "rotpred")


def later(name):
    return name in LATER or name.endswith("+spd")


NAMES = [pytest.param(n, marks=pytest.mark.slow) if later(n) else n for n in cases()]


@pytest.mark.parametrize("name", NAMES)
class TestObjective:
    def test_satisfies_the_protocol(self, name):
        assert isinstance(perturbed(name)[0], Objective)

    def test_offers_nothing_that_no_seam_declares(self, name):
        """A public member that nobody declared would be a hook that nobody can know of."""
        objective, case = perturbed(name)[0], cases()[name].case
        known = {m for seam in (Objective, *OFFERS) for m in dir(seam) if m[0] != "_"}
        known |= {*typing.get_type_hints(Objective), *vars(EncoderObjective), *case.own}
        methods = {m for m in dir(type(objective)) if m[0] != "_"}
        assert methods <= known, methods - known

    def test_what_is_computed_per_sample_does_not_change_in_training(self, name):
        objective = perturbed(name)[0]
        if not isinstance(objective, PerSample):
            pytest.skip("computes nothing per sample")
        state, step, key, mesh = training(name)
        compute = jax.jit(objective.per_sample)
        before = jax.device_get(compute(state.params, state.extra, batch(name)))
        with jax.set_mesh(mesh):
            for _ in range(3):
                state, _ = step(state, place_batch(batch(name), mesh), None, key)
        after = compute(state.params, state.extra, batch(name))
        jax.tree.map(np.testing.assert_array_equal, before, after)

    def test_an_embedding_leaves_extra_as_it_was_but_for_statistics(self, name):
        objective, params, extra = perturbed(name)
        if not isinstance(objective, seams.Embeds):
            pytest.skip("embeds nothing")
        images = jnp.asarray(np.random.default_rng(0).normal(size=(4, SIDE, SIDE, 3)), jnp.float32)
        maps = jax.eval_shape(objective.features, params, extra, images)
        asked = next(name for name in maps if name.startswith(("layer", "block")))
        embed = functools.partial(objective.embed, train=True, views=2, layers=(asked,))
        vectors, after = jax.eval_shape(embed, params, extra, images)
        assert vectors.keys() & maps.keys() == {asked}
        assert vectors[asked].shape == maps[asked].shape
        assert vectors["pooled"].dtype == np.float32
        assert vectors["pooled"].shape[:-1] == (4,)
        like = jax.eval_shape(lambda: extra)
        assert jax.tree.structure(after) == jax.tree.structure(like)
        jax.tree.map(
            lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)),
            after,
            like,
        )

    def test_loss_is_a_finite_f32_scalar(self, name):
        loss = stepped(name, 1).loss
        assert loss.shape == ()
        assert loss.dtype == np.float32
        assert np.isfinite(loss)

    def test_every_parameter_gets_a_gradient(self, name):
        for path, grad in stepped(name, 1).grads.items():
            assert np.isfinite(grad).all(), path
            if not re.search(cases()[name].case.no_gradient, path):
                assert np.abs(grad).max() > 0, path

    def test_one_device_equals_eight(self, name):
        """Also where parameters are split: the real step, whose hard choices came out equal."""
        assert_equal(stepped(name, 1), stepped(name, 8, 2))

    def test_the_comparison_is_of_split_parameters(self, name):
        _, abstract, _ = parts(name, mesh_of(8, 8))
        large = [x for x in jax.tree.leaves(abstract.params) if x.size >= MIN_SIZE]
        split = [x for x in large if not x.sharding.is_fully_replicated]
        assert sum(x.size for x in split) >= 0.9 * sum(x.size for x in large)

    def test_accumulation_is_exact_or_refused(self, name):
        mesh = mesh_of(2)
        if recorded(name)[0].traits.couples_batch:
            with pytest.raises(ConfigError, match=r"config\.accumulate=4"):
                parts(name, mesh, accumulate=4)
        else:
            found = one_step(name, mesh, accumulate=4)
            assert_equal(stepped(name, 1), found, loss=1e-6, gradient=1e-6)

    def test_same_key_same_draws_on_any_devices(self, name):
        one, eight = views_on(name), views_on(name, devices=8)
        for path, values in one.items():
            if path.endswith("box"):
                np.testing.assert_array_equal(values, eight[path])
            else:
                atol = 1e-6 * max(1, np.ptp(np.float64(values)))  # of the full scale
                np.testing.assert_allclose(values, eight[path], atol=atol)

    def test_views_depend_on_key_and_epoch(self, name):
        first, again = views_on(name), views_on(name)
        other_key, other_epoch = views_on(name, key=6), views_on(name, epoch=1)
        for path in first:
            np.testing.assert_array_equal(first[path], again[path])
            if path in cases()[name].case.fixed_views:
                continue
            assert not np.array_equal(first[path], other_key[path])
            assert not np.array_equal(first[path], other_epoch[path])

    def test_step_maps_its_state_to_itself_and_traces_once(self, name):
        """Also weak types: a leaf that changes its type would compile the step again."""
        state, step, key, mesh = training(name)
        with jax.set_mesh(mesh):
            shapes = jax.eval_shape(step, state, place_batch(batch(name), mesh), None, key)[0]
            for path, leaf in flatten(state).items():
                found = flatten(shapes)[path]
                assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype), path
                assert found.weak_type == leaf.weak_type, path
            for epoch in range(3):
                state, _ = step(state, place_batch(batch(name, epoch), mesh), None, key)
        assert step._cache_size() == 1

    def test_training_reduces_the_loss(self, name):
        state, step, key, mesh = training(name)
        losses, first = [], cases()[name].case.warm_up
        with jax.set_mesh(mesh):
            for _ in range(first + 30):
                state, scalars = step(state, place_batch(batch(name), mesh), None, key)
                losses.append(float(scalars["loss"]))
        assert np.mean(losses[-3:]) < np.mean(losses[first : first + 3]) - 0.05

    def test_features_are_maps_in_inference_mode(self, name):
        objective, params, extra = perturbed(name)
        images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
        features = jax.jit(objective.features)
        maps, beside = features(params, extra, images), features(params, extra, images[[0, 0]])
        for key, value in maps.items():
            assert value.ndim == 4
            np.testing.assert_allclose(value[:1], beside[key][:1], atol=1e-4)


def test_the_comparison_is_of_real_choices():
    """Every image has a pair, in both directions and at both stages, and by far not all."""
    for pairs in stepped("ds2", 1).choices.values():
        assert (pairs.sum(axis=(2, 3)) >= 1).all()
        assert pairs.mean() < 0.1
