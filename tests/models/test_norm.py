"""Batch norm over the global batch, against float64, on 1, 2, 4 and 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsad.core.mesh import BATCH_SPEC, MeshConfig, make_mesh, replicated
from dsad.models.functional import Functional
from dsad.models.norm import EPSILON, MOMENTUM, BatchNorm

IMAGES, VIEWS, SIDE, CHANNELS = 8, 2, 3, 5


def inputs(level=0):
    """Samples of very different means, so that statistics of a part would be far off.

    With a ``level`` all samples lie so many deviations from zero instead.
    """
    g = np.random.default_rng(0)
    shape = (IMAGES * VIEWS, SIDE, SIDE, CHANNELS)
    x = g.standard_normal(shape) * 2 + np.arange(IMAGES * VIEWS)[:, None, None, None]
    x = level + g.standard_normal(shape) if level else x
    weights = g.standard_normal(shape)  # of the outputs in the loss
    scale, bias = g.uniform(0.5, 2, CHANNELS), g.standard_normal(CHANNELS)
    return [v.astype(np.float32) for v in (x, weights, scale, bias)]


def oracle(views, level=0):
    """Outputs, gradients of x, scale and bias, and running statistics; all by the textbook."""
    x, weights, scale, bias = (v.astype(np.float64) for v in inputs(level))
    out, dx = np.zeros_like(x), np.zeros_like(x)
    dscale, dbias = np.zeros(CHANNELS), np.zeros(CHANNELS)
    mean_run, var_run = np.zeros(CHANNELS), np.ones(CHANNELS)
    for view in range(views):
        part, w = x[view::views], weights[view::views]
        count = part.size / CHANNELS
        mean, var = part.mean(axis=(0, 1, 2)), part.var(axis=(0, 1, 2))
        sigma = np.sqrt(var + EPSILON)
        unit = (part - mean) / sigma
        out[view::views] = unit * scale + bias
        dscale += np.sum(w * unit, axis=(0, 1, 2))
        dbias += np.sum(w, axis=(0, 1, 2))
        du = w * scale
        along = np.sum(du * unit, axis=(0, 1, 2))
        dx[view::views] = (du - (np.sum(du, axis=(0, 1, 2)) + unit * along) / count) / sigma
        mean_run = MOMENTUM * mean_run + (1 - MOMENTUM) * mean
        var_run = MOMENTUM * var_run + (1 - MOMENTUM) * var
    return out, (dx, dscale, dbias), (mean_run, var_run)


def trained(devices, views, level=0):
    """The same three from the layer on a mesh, each gradient of x on its samples' device."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    graph, start = nnx.split(BatchNorm(CHANNELS, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    split = jax.sharding.NamedSharding(mesh, BATCH_SPEC)

    def loss(x, scale, bias, weights):
        layer = nnx.merge(graph, start, copy=True)
        layer.scale[...], layer.bias[...] = scale, bias
        y = layer(x, train=True, views=views)
        return jnp.sum(y * weights), (y, (layer.mean[...], layer.var[...]))

    whole = replicated(mesh)
    (_, (out, stats)), grads = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True),
        in_shardings=(split, whole, whole, split),
        out_shardings=((whole, (split, whole)), (split, whole, whole)),
    )(*(inputs(level)[i] for i in (0, 2, 3, 1)))
    assert len(grads[0].addressable_shards) == devices
    return out, grads, stats


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_statistics_and_gradients_are_those_of_the_global_batch(devices, views):
    out, gradients, running = oracle(views)
    found, grads, stats = trained(devices, views)
    for a, b in zip((found, *grads, *stats), (out, *gradients, *running), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("devices", [1, 8])
def test_a_mean_of_a_thousand_deviations_leaves_the_statistics_exact(devices):
    """What is lost is the rounding of the mean, 6e-5 at 1,000; E[x²] − mean² would be noise."""
    out, gradients, running = oracle(VIEWS, level=1000)
    found, grads, stats = trained(devices, VIEWS, level=1000)
    for a, b in zip((found, *grads), (out, *gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max())
    np.testing.assert_allclose(stats[0], running[0], rtol=1e-6)
    np.testing.assert_allclose(stats[1], running[1], rtol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_without_affine_it_is_the_norm_of_unit_scale(train):
    def applied(affine):
        net = Functional(
            lambda rngs: BatchNorm(CHANNELS, dtype=jnp.float32, rngs=rngs, affine=affine)
        )
        params, extra = jax.jit(net.init)(jax.random.key(0))
        return params, net.apply(params, extra, inputs()[0], train=train, views=VIEWS)

    params, found = applied(affine=False)
    assert params == {}
    _, expected = applied(affine=True)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_zero_scale_needs_a_scale():
    with pytest.raises(ValueError, match="affine=True"):
        BatchNorm(CHANNELS, dtype=jnp.float32, rngs=nnx.Rngs(0), zero=True, affine=False)
