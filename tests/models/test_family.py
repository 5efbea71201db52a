"""The training forward that all families share: maps, one vector an image, new statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.models import registry, resnet, vit
from dsad.models.norm import MOMENTUM

SMALL = vit.Arch(width=24, depth=2, heads=4, patch=4, image=16, registers=2)
VITS = {
    "class": SMALL,
    "distilled": dataclasses.replace(SMALL, distilled=True),
    "mean": dataclasses.replace(SMALL, cls=False),
}
VIEWS = 2
VIT, RESNET = map(registry.family_of, ("vit_tiny_patch16_224", "resnet18"))


def images(side, count=4):
    """Two views of very different level, next to each other."""
    x = np.random.default_rng(0).standard_normal((count, side, side, 3)).astype(np.float32)
    x[1::2] = 2 * x[1::2] + 1
    return x


def noisy(tree, seed=2):
    g = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * g.standard_normal(x.shape).astype(np.float32), tree)


def fresh(net):
    params, extra = jax.jit(net.init)(jax.random.key(0))
    return noisy(params), extra


def trained(family, net, params, extra, x, **settings):
    def forward(params, extra, x):
        return family.run(net, params, extra, x, train=True, **settings)

    return jax.jit(forward)(params, extra, x)


@pytest.mark.parametrize("name", VITS)
def test_vector_of_a_transformer_follows_its_final_norm(name):
    net, x = vit.ViT(VITS[name]), images(16)
    params, extra = fresh(net)
    maps, pooled, same = trained(VIT, net, params, extra, x, views=VIEWS)
    tokens = jax.jit(lambda p, e, x: net.encode(p, e, net.embed(p, e, x)))(params, extra, x)
    tokens = np.asarray(tokens)
    want = tokens[:, 0] if net.spec.cls else tokens[:, 2:].mean(1)  # behind two registers
    np.testing.assert_allclose(pooled, want, atol=1e-5)
    assert np.abs(want - tokens.mean(1)).max() > 1e-2  # so the choice of tokens is visible
    assert jax.tree.structure(same) == jax.tree.structure(extra)
    inference = VIT.maps(net, params, extra, x, None)
    assert list(maps) == list(inference) == ["block0", "block1"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), maps, inference)


def test_the_vector_does_not_depend_on_the_maps_asked_for():
    net, x = vit.ViT(SMALL), images(16)
    params, extra = fresh(net)
    maps, pooled, _ = trained(VIT, net, params, extra, x)
    asked, vector, _ = trained(VIT, net, params, extra, x, layers=("block0",))
    assert list(asked) == ["block0"]
    np.testing.assert_allclose(asked["block0"], maps["block0"], atol=1e-5)
    np.testing.assert_allclose(vector, pooled, atol=1e-5)


def test_a_narrow_transformer_has_wide_vectors():
    net = vit.ViT(SMALL, dtype="bfloat16")
    shapes = (*net.shapes(), jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32))
    maps, pooled, _ = jax.eval_shape(
        lambda *a: VIT.run(net, *a, train=True, layers=("block1",)), *shapes
    )
    assert {n: (m.shape, m.dtype) for n, m in maps.items()} == {
        "block1": ((2, 4, 4, 24), "bfloat16")
    }
    assert (pooled.shape, pooled.dtype) == ((2, 24), np.float32)


def test_views_and_training_change_nothing_in_a_transformer():
    net = vit.ViT(SMALL)
    params, extra = fresh(net)
    plain, _ = net.apply(params, extra, images(16))
    both, _ = net.apply(params, extra, images(16), train=True, views=VIEWS)
    jax.tree.map(np.testing.assert_array_equal, both, plain)


def test_vector_and_statistics_of_a_residual_network():
    net, x = resnet.resnet("resnet18", stages=2), images(32)
    params, extra = fresh(net)
    maps, pooled, new = trained(RESNET, net, params, extra, x, views=VIEWS)
    np.testing.assert_allclose(pooled, np.asarray(maps["layer2"]).mean((1, 2)), atol=1e-5)
    assert (pooled.shape, pooled.dtype) == ((4, 128), np.float32)
    # The first norm's statistics, those of one view after the other.
    first = jax.lax.conv_general_dilated(
        x, params["conv1"]["kernel"], (2, 2), ((3, 3), (3, 3)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    running = np.zeros(64)
    for view in range(VIEWS):
        running = MOMENTUM * running + (1 - MOMENTUM) * np.asarray(first[view::VIEWS]).mean(
            (0, 1, 2)
        )
    np.testing.assert_allclose(new["norm1"]["mean"], running, atol=1e-5)
    # Inference keeps to what was collected, and to the layers asked for.
    inference = RESNET.maps(net, params, new, x, ("layer1",))
    alone = RESNET.maps(net, params, new, x[:1], ("layer1",))
    assert list(alone) == ["layer1"]
    np.testing.assert_allclose(alone["layer1"], inference["layer1"][:1], atol=1e-4)
    assert np.abs(np.asarray(alone["layer1"] - maps["layer1"][:1])).max() > 0.1


def test_vectors_carry_gradients_to_every_parameter_of_a_residual_network():
    net = resnet.resnet("resnet18", stages=1)
    params, extra = fresh(net)
    weights = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)

    def loss(params):
        maps, pooled, _ = RESNET.run(
            net, params, extra, images(16), train=True, views=VIEWS, layers=()
        )
        assert maps == {}
        return jnp.sum(pooled * weights)

    for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0


@pytest.mark.parametrize(("arch", "side"), [("mobilenet_v2", 32), ("squeezenet1_1", 32)])
def test_networks_without_norms_have_vectors_too(arch, side):
    family = registry.family_of(arch)
    net = family.network(arch)
    shapes = (*net.shapes(), jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32))
    maps, pooled, _ = jax.eval_shape(lambda *given: family.run(net, *given, train=True), *shapes)
    assert list(maps) == list(family.strides(arch))
    assert pooled.shape == (2, family.channels(arch))
