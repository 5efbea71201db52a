"""Batch statistics of frozen networks against sums over the network's own layers in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad import models
from dsad.models import statistics, wrappers
from dsad.models.family import Encoder
from dsad.models.norm import EPSILON
from dsad.models.weights import export, pretrained
from tests.helpers import real_data

IMAGES = np.random.default_rng(0).normal(0.3, 1.2, (5, 48, 48, 3)).astype(np.float32)


def encoder(network):
    return Encoder(
        network.arch, dict(network.options), network.params, network.extra, preprocessing=None
    )


def folded_state(seed=0):
    """A folded ResNet-18 of two stages under published names."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, x in export.as_weights(models.backbone("resnet18")).items():
        if ".conv" in f".{name}" or "downsample.0" in name:
            state[name] = np.asarray(x, np.float32)
            bias = name.replace("weight", "bias")
            state[bias] = rng.normal(0, 0.3, x.shape[0]).astype(np.float32)
    return {n: x for n, x in state.items() if not n.startswith(("layer3", "layer4", "fc"))}


def folded():
    return models.backbone("resnet18", folded_state())


def in_training(network, params, extra, images):
    """Maps and running statistics of a pass that normalises by the batch."""
    family = models.registry.family_of(network.arch)
    function = family.network(network.arch, **dict(network.options))

    @jax.jit
    def run(params, extra, images):
        maps, *_, running = family.run(function, params, extra, images, train=True)
        return maps, running

    return run(params, extra, images)


def first_convolution(network, images=IMAGES):
    """What comes into the first norm, in float64."""
    kernel = np.asarray(network.params["conv1"]["kernel"], np.float64)
    padded = np.pad(np.asarray(images, np.float64), ((0, 0), (3, 3), (3, 3), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), axis=(1, 2))[:, ::2, ::2]
    return np.einsum("nhwcij,ijcd->nhwd", windows, kernel)


def test_each_norm_gets_the_moments_of_its_own_input():
    network = models.backbone("resnet18")
    got = network.measured(jnp.asarray(IMAGES))
    direct = first_convolution(network)
    np.testing.assert_allclose(got["norm1"]["mean"], direct.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(got["norm1"]["var"], direct.var((0, 1, 2)), rtol=1e-4)
    # As in training, every norm passes on what it normalised: its running statistics, started at
    # zero, are a tenth of it.
    zeros = jax.tree.map(jnp.zeros_like, network.extra)
    maps, running = in_training(network, network.params, zeros, jnp.asarray(IMAGES))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 10 * b, rtol=2e-3, atol=1e-4), got, running
    )
    # With them, inference gives what training gives for this batch.
    again = network.with_statistics(got)
    np.testing.assert_allclose(
        again(jnp.asarray(IMAGES))["layer2"], maps["layer2"], rtol=1e-3, atol=1e-3
    )


def test_moments_are_those_of_the_union():
    rows = [np.random.default_rng(i).normal(i, 1 + i, (n, 4)) for i, n in enumerate((6, 2, 7))]
    moments = statistics.Moments()
    for x in rows:
        moments.add({"a": {"mean": x.mean(0), "var": x.var(0)}}, len(x))
    whole, found = np.concatenate(rows), moments.statistics()["a"]
    np.testing.assert_allclose(found["mean"], whole.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["var"], whole.var(0), rtol=1e-6)


@pytest.mark.slow
def test_patches_are_measured_in_rows():
    inner = models.backbone("resnet18")
    outer = wrappers.Patches(encoder=inner, size=32, stride=8)
    rows = outer.measured(jnp.asarray(IMAGES))
    band = np.concatenate([IMAGES[:, 16:48, x : x + 32] for x in (0, 8, 16)])
    got = jax.tree.map(lambda x: x[2], rows)
    expected = inner.measured(jnp.asarray(band))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, expected)
    changed = outer.with_statistics(expected)
    assert changed.encoder.extra is expected
    assert outer.statistics is inner.extra


def test_a_transformer_has_none():
    network = models.backbone("vit_tiny_patch16_224")
    assert statistics.present(network.extra) == {}
    assert network.statistics == {}
    assert not statistics.is_folded(network.statistics)


def test_folded_networks_are_told_from_untrained_ones():
    plain = models.backbone("resnet18")
    assert not statistics.is_folded(plain.statistics)
    assert statistics.is_folded(folded().statistics)


def check_unfolding(network, images, layer):
    """Same function, true statistics, and on batch statistics still the same function."""
    before = network(images)[layer]
    measured = statistics.measured(encoder(network), images, applied=False)
    params, extra = statistics.unfolded(network.params, network.extra, measured)
    after = dataclasses.replace(network, params=params, extra=extra)
    assert not statistics.is_folded(after.statistics)
    scale = float(jnp.std(before))
    np.testing.assert_allclose(after(images)[layer], before, atol=2e-4 * scale, rtol=1e-4)
    trained, _ = in_training(network, params, extra, images)
    # On batch statistics it computes the same on the images that were measured.
    np.testing.assert_allclose(trained[layer], before, atol=2e-2 * scale, rtol=1e-2)
    broken, _ = in_training(network, network.params, network.extra, images)
    assert float(jnp.mean(jnp.abs(broken[layer] - before))) > 0.1 * scale
    return measured


def test_unfolding_changes_nothing_but_the_norms():
    network = folded()
    measured = check_unfolding(network, jnp.asarray(IMAGES), "layer2")
    direct = first_convolution(network)
    np.testing.assert_allclose(measured["norm1"]["mean"], direct.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(measured["norm1"]["var"], direct.var((0, 1, 2)), rtol=1e-4)


def test_any_norm_can_be_put_around_other_statistics():
    network = models.backbone("resnet18")
    rng = np.random.default_rng(3)

    def drawn(x):
        return jnp.asarray(rng.uniform(0.5, 2, x.shape), jnp.float32)

    params, old, new = (jax.tree.map(drawn, x) for x in (network.params, *[network.extra] * 2))
    moved, _ = statistics.unfolded(params, old, new)
    x = rng.normal(0, 1, 64)

    def line(params, extra):
        p, s = (jax.tree.map(lambda a: np.float64(a), t["norm1"]) for t in (params, extra))
        return (x - s["mean"]) / np.sqrt(s["var"] + EPSILON) * p["scale"] + p["bias"]

    np.testing.assert_allclose(line(moved, new), line(params, old), rtol=1e-5, atol=1e-5)


def test_the_real_folded_weights_keep_their_function():
    path = real_data("weights", "resnet18_in1k_folded_l1l3_fp16.npz")
    network = models.backbone("resnet18", pretrained.read(str(path)))
    images = np.random.default_rng(1).normal(0, 1, (4, 96, 96, 3)).astype(np.float32)
    check_unfolding(network, jnp.asarray(images), "layer3")
