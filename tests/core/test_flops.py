"""The FLOP counter against counts made by hand and against published figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.assembly.pretrain import DataFacts, assemble
from dsad.core.chips import CHIPS, chip_of
from dsad.core.flops import model_flops, training_flops_per_image, without_remat
from dsad.core.mesh import BATCH_SPEC, MeshConfig, make_mesh
from dsad.models import resnet
from dsad.terminal import flags


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def conv(stride, groups=1):
    def apply(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((1, 1), (1, 1)), feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    return apply


def test_products():
    assert model_flops(jnp.matmul, f32(3, 5), f32(5, 7)) == 2 * 3 * 5 * 7
    assert model_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), f32(4, 3, 5), f32(4, 5, 7)) \
        == 4 * 2 * 3 * 5 * 7  # fmt: skip
    gradient = jax.grad(lambda a, b: jnp.sum(jnp.sin(a @ b)), argnums=(0, 1))
    assert model_flops(gradient, f32(3, 5), f32(5, 7)) == 3 * 2 * 3 * 5 * 7
    assert model_flops(jnp.sin, f32(100)) == 0


def test_only_what_a_result_needs_is_live():
    def function(a, b):
        unused = a @ b @ b
        return jnp.sin(a) @ b, unused[:0]

    product = 2 * 3 * 5 * 5
    assert model_flops(function, f32(3, 5), f32(5, 5), live=True) == 3 * product
    first = lambda a, b: function(a, b)[0]  # noqa: E731
    assert model_flops(first, f32(3, 5), f32(5, 5)) == 3 * product
    assert model_flops(first, f32(3, 5), f32(5, 5), live=True) == product


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_convolutions(stride, groups):
    x, kernel = f32(2, 8, 8, 12), f32(3, 3, 12 // groups, 16)
    side = 8 // stride
    forward = 2 * (2 * side * side * 16) * (3 * 3 * 12 // groups)
    function = conv(stride, groups)
    assert model_flops(function, x, kernel) == forward
    # The gradients see every pair of tap and output once more; holes of the strided one are none.
    gradient = jax.grad(lambda x, k: jnp.sum(function(x, k)), argnums=(0, 1))
    assert model_flops(gradient, x, kernel) == 3 * forward


def test_control_flow():
    def scanned(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    assert model_flops(scanned, f32(4, 8), f32(6, 8, 8)) == 6 * 2 * 4 * 8 * 8

    def branches(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert model_flops(jax.jit(branches), f32(4, 8), f32(8, 8)) == 2 * 2 * 4 * 8 * 8

    def repeated(x, w):
        return jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ w, x)

    assert model_flops(repeated, f32(4, 8), f32(8, 8)) == 2 * 4 * 8 * 8


def test_every_shard_of_a_shard_map_counts():
    mesh = make_mesh(MeshConfig(data=8))
    product = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(BATCH_SPEC, jax.P()), out_specs=BATCH_SPEC
    )
    assert model_flops(product, f32(16, 4), f32(4, 4)) == 2 * 16 * 4 * 4


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_recomputation_can_be_taken_away(policy):
    def block(x, w):
        hidden = jnp.tanh(x @ w)
        return jnp.tanh(hidden @ w), None

    def loss(x, weights, checkpoint):
        step = jax.checkpoint(block, policy=policy, prevent_cse=False) if checkpoint else block
        run = jax.jit(lambda x: jax.lax.scan(step, x, weights)[0])
        return jnp.sum(run(x) @ weights[0])

    shapes = f32(4, 8), f32(6, 8, 8)
    plain = model_flops(jax.grad(lambda x, w: loss(x, w, False), argnums=1), *shapes)
    inside = 12 * 2 * 4 * 8 * 8  # six blocks of two products
    assert plain == 3 * inside + 3 * 2 * 4 * 8 * 8
    stripped = without_remat(lambda x, w: loss(x, w, True), *shapes)
    assert model_flops(jax.grad(stripped, argnums=1), *shapes) == plain
    if policy is None:
        again = model_flops(jax.grad(lambda x, w: loss(x, w, True), argnums=1), *shapes)
        assert again > plain
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s.shape), jnp.float32) for s in shapes)
    np.testing.assert_allclose(stripped(x, w), loss(x, w, False), rtol=1e-6)


def test_resnet_18_at_224_has_its_published_count():
    net = resnet.resnet("resnet18", stages=4)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    images = f32(2, 224, 224, 3)
    flops = model_flops(lambda p, s, x: net.apply(p, s, x, train=False)[0], params, stats, images)
    # 1.82 G multiply-adds with the classifier, which has half a million of them.
    assert flops / 2 / 2 == pytest.approx(1.8140e9, rel=2e-3)


def shapes(spec, batch_size=8):
    config, _, _ = flags.Command("x", "", config=spec).parse([])
    config.batch_size = batch_size
    run = assemble(config, jax.devices()[:1], DataFacts(samples=8))
    return run.objective, run.abstract.params, run.abstract.extra, run.batch


class Silent:
    """An objective that does not state its FLOPs."""

    def __init__(self, objective):
        self.views, self.loss = objective.views, objective.loss


@pytest.mark.parametrize("spec", ["mae:base", "mae_imagenet:large"])
def test_masked_autoencoder_agrees_with_its_formula(spec):
    objective, params, extra, batch = shapes(spec)
    stated = training_flops_per_image(objective, params, extra, batch)
    assert stated == objective.flops_per_image
    # The formula has the backward pass at twice the forward; no gradient goes to the pixels.
    spec, cells = objective.encoder.spec, objective.encoder.spec.grid**2
    pixels = 2 * cells * 3 * spec.patch**2 * spec.width
    counted = training_flops_per_image(Silent(objective), params, extra, batch)
    assert counted == pytest.approx(stated - pixels, rel=1e-6)


@pytest.mark.slow
def test_ds2_costs_one_training_pass_and_one_of_the_teacher():
    objective, params, extra, batch = shapes("ds2:smoke")
    counted = training_flops_per_image(objective, params, extra, batch)
    views = jax.eval_shape(lambda b: objective.views(b, jax.random.key(0)), batch)
    images = jax.ShapeDtypeStruct((16, *views["view1"]["image"].shape[1:]), jnp.float32)
    branch = model_flops(lambda p, e, x: objective._branch(p, e["stats"], x), params, extra, images)
    # Three passes' worth for the online network, one for the teacher, and the pairs' products.
    assert 3.8 * branch / 8 < counted < 4.3 * branch / 8


def test_chips_are_found_by_the_kind_of_their_device():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    assert chip_of(Device("TPU v5 lite")) is CHIPS["v5e"]
    assert chip_of(Device("TPU v5")) is CHIPS["v5p"]
    assert chip_of(Device("NVIDIA H100 80GB HBM3")) is CHIPS["H100"]
    assert chip_of(Device("NVIDIA H100 PCIe")) is None
    assert chip_of(jax.devices()[0]) is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
