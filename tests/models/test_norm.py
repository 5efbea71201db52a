"""Batch norm over the global batch, against float64, on 1, 2, 4 and 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsad.core.mesh import BATCH_SPEC, MeshConfig, make_mesh, replicated
from dsad.models.norm import EPSILON, MOMENTUM, BatchNorm

IMAGES, VIEWS, SIDE, CHANNELS = 8, 2, 3, 5


def inputs():
    """Samples of very different means, so that statistics of a part would be far off."""
    g = np.random.default_rng(0)
    shape = (IMAGES * VIEWS, SIDE, SIDE, CHANNELS)
    x = g.standard_normal(shape) * 2 + np.arange(IMAGES * VIEWS)[:, None, None, None]
    weights = g.standard_normal(shape)  # of the outputs in the loss
    scale, bias = g.uniform(0.5, 2, CHANNELS), g.standard_normal(CHANNELS)
    return [v.astype(np.float32) for v in (x, weights, scale, bias)]


def oracle(views):
    """Loss, gradients of x, scale and bias, and running statistics; all by the textbook."""
    x, weights, scale, bias = (v.astype(np.float64) for v in inputs())
    loss, dx, dscale, dbias = 0.0, np.zeros_like(x), np.zeros(CHANNELS), np.zeros(CHANNELS)
    mean_run, var_run = np.zeros(CHANNELS), np.ones(CHANNELS)
    for view in range(views):
        part, w = x[view::views], weights[view::views]
        count = part.size / CHANNELS
        mean, var = part.mean(axis=(0, 1, 2)), part.var(axis=(0, 1, 2))
        sigma = np.sqrt(var + EPSILON)
        unit = (part - mean) / sigma
        loss += np.sum(w * (unit * scale + bias))
        dscale += np.sum(w * unit, axis=(0, 1, 2))
        dbias += np.sum(w, axis=(0, 1, 2))
        du = w * scale
        along = np.sum(du * unit, axis=(0, 1, 2))
        dx[view::views] = (du - (np.sum(du, axis=(0, 1, 2)) + unit * along) / count) / sigma
        mean_run = MOMENTUM * mean_run + (1 - MOMENTUM) * mean
        var_run = MOMENTUM * var_run + (1 - MOMENTUM) * var
    return loss, (dx, dscale, dbias), (mean_run, var_run)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_statistics_and_gradients_are_those_of_the_global_batch(devices, views):
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    graph, start = nnx.split(BatchNorm(CHANNELS, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    split = jax.sharding.NamedSharding(mesh, BATCH_SPEC)
    x, weights, scale, bias = inputs()

    def loss(x, scale, bias, weights):
        layer = nnx.merge(graph, start, copy=True)
        layer.scale[...], layer.bias[...] = scale, bias
        y = layer(x, train=True, views=views)
        return jnp.sum(y * weights), (layer.mean[...], layer.var[...])

    whole = replicated(mesh)
    outs = ((whole, whole), (split, whole, whole))
    (value, stats), grads = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True),
        in_shardings=(split, whole, whole, split),
        out_shardings=outs,
    )(x, scale, bias, weights)
    assert len(grads[0].addressable_shards) == devices
    expected, gradients, running = oracle(views)
    assert value == pytest.approx(expected, rel=1e-5, abs=1e-4)
    for a, b in zip((*grads, *stats), (*gradients, *running), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())
