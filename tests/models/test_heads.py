"""Heads against a float64 form, with the layouts that SimSiam, MoCo v2 and DS2 publish."""

import math

import jax
import numpy as np
import pytest

from dsad.core.tree import flatten
from dsad.models import heads
from dsad.models.norm import EPSILON, MOMENTUM

#: Widths and settings, then the parameters of each layer, as published.
KINDS = {
    "simsiam_projector": (
        ((12, 10, 8, 6), {"last": "plain"}),
        [{"kernel", "scale", "bias/norm"}, {"kernel", "scale", "bias/norm"}, {"kernel"}],
    ),
    "simsiam_predictor": (
        ((12, 4, 12), {}),
        [{"kernel", "scale", "bias/norm"}, {"kernel", "bias"}],
    ),
    "moco": (((12, 12, 5), {"hidden": "none"}), [{"kernel", "bias"}, {"kernel", "bias"}]),
    "normed_end": (
        ((12, 7), {"last": "affine", "bias": True}),
        [{"kernel", "bias", "scale", "bias/norm"}],
    ),
}
VIEWS = 2


def perturbed(kind):
    """A head whose parameters are random everywhere, scales and biases of norms included."""
    widths, settings = KINDS[kind][0]
    net = heads.mlp(widths, **settings)
    params, extra = net.init(jax.random.key(0))
    g = np.random.default_rng(0)
    noisy = [
        x + 0.3 * g.standard_normal(x.shape).astype(np.float32) for x in jax.tree.leaves(params)
    ]
    return net, jax.tree.unflatten(jax.tree.structure(params), noisy), extra


def inputs(shape):
    """Two views of very different level."""
    x = np.random.default_rng(1).standard_normal((*shape, 12)).astype(np.float32)
    x[1::2] = 3 * x[1::2] + 2
    return x


def head64(kind, params, x):
    """One view through the head, by the textbook, and the batch statistics of its norms."""
    (widths, settings), _ = KINDS[kind]
    depth = len(widths) - 1
    norms = [settings.get("hidden", "affine")] * (depth - 1) + [settings.get("last", "none")]
    x, stats = x.astype(np.float64).reshape(-1, x.shape[-1]), {}
    for i in range(1, depth + 1):
        linear, norm = params[f"conv{i}"], params.get(f"norm{i}", {})
        x = x @ np.float64(linear["kernel"]) + np.float64(linear.get("bias", 0))
        if norms[i - 1] != "none":
            stats[f"norm{i}"] = {"mean": x.mean(0), "var": x.var(0)}
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON)
            x = x * np.float64(norm.get("scale", 1)) + np.float64(norm.get("bias", 0))
        x = np.maximum(x, 0) if i < depth else x
    return x, stats


@pytest.mark.parametrize("shape", [(16,), (8, 2, 3)], ids=["vectors", "maps"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_definition_in_float64_view_by_view(kind, shape):
    net, params, extra = perturbed(kind)
    x = inputs(shape)
    out, new = jax.jit(lambda p, e, x: net.apply(p, e, x, train=True, views=VIEWS))(
        params, extra, x
    )
    widths, running = KINDS[kind][0][0], extra
    assert out.shape == (*x.shape[:-1], widths[-1])
    for view in range(VIEWS):
        want, stats = head64(kind, params, x[view::VIEWS])
        np.testing.assert_allclose(out[view::VIEWS].reshape(want.shape), want, atol=2e-5)
        running = jax.tree.map(
            lambda old, seen: MOMENTUM * old + (1 - MOMENTUM) * seen, running, stats
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new, running)


def test_inference_uses_the_running_statistics():
    net, params, extra = perturbed("simsiam_projector")
    _, trained = net.apply(params, extra, inputs((64,)), train=True)
    x = inputs((6,))
    together, same = net.apply(params, trained, x, train=False)
    alone = [net.apply(params, trained, x[i : i + 1], train=False)[0][0] for i in range(6)]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, same, trained)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_published(kind):
    (widths, settings), layers = KINDS[kind]
    params, _ = heads.mlp(widths, **settings).shapes()
    found = [set() for _ in layers]
    for path in flatten(params):
        module, leaf = path.split("/")
        in_norm = module.startswith("norm") and leaf == "bias"
        found[int(module[-1]) - 1].add("bias/norm" if in_norm else leaf)
    assert found == layers


def test_initial_weights_fill_their_bounds():
    """PyTorch's rule, U(−1/√fan_in, 1/√fan_in), whose standard deviation is bound / √3."""
    params, _ = heads.mlp((400, 100, 400), bias=True).init(jax.random.key(1))
    for name, fan_in in (("conv1", 400), ("conv2", 100)):
        bound = 1 / math.sqrt(fan_in)
        for leaf in params[name].values():
            assert bound * 0.95 < np.abs(leaf).max() <= bound
            assert np.std(leaf) == pytest.approx(bound / math.sqrt(3), rel=0.15)
    np.testing.assert_array_equal(params["norm1"]["scale"], 1)
    np.testing.assert_array_equal(params["norm1"]["bias"], 0)


def test_pixpro_s_projector_keeps_its_names():
    """They are those of runs that were stored."""
    params, extra = heads.projector(6, 8, 4).shapes()
    assert {n: x.shape for n, x in flatten(params).items()} == {
        "conv1/kernel": (6, 8), "conv1/bias": (8,), "norm1/scale": (8,), "norm1/bias": (8,),
        "conv2/kernel": (8, 4), "conv2/bias": (4,),
    }  # fmt: skip
    assert set(flatten(extra)) == {"norm1/mean", "norm1/var"}


def test_a_single_width_is_refused():
    with pytest.raises(ValueError, match=r"at least two widths, found \(8,\)"):
        heads.mlp((8,))
