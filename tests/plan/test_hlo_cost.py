"""What compiled programs cost: against counts by hand, and XLA's own where it has no loops."""

import jax
import jax.numpy as jnp
import pytest

from dsad.plan.hlo_cost import cost


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def compiled(function, *shapes):
    return jax.jit(function).lower(*shapes).compile()


def analysed(program):
    found = program.cost_analysis()
    return found["flops"], found["bytes accessed"]


def test_a_loop_counts_as_often_as_it_runs():
    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    program = compiled(run, f32(64, 128), f32(6, 128, 128))
    one = 2 * 64 * 128 * 128
    assert cost(program.as_text()).flops == 6 * one
    assert analysed(program)[0] < 2 * one  # which is why XLA's own count is not used
    # Every pass reads its own matrix and not the stack of all of them.
    whole = 4 * 6 * 128 * 128
    assert 6 * 4 * 128 * 128 <= cost(program.as_text()).bytes < 2.5 * whole + 6 * 8 * 4 * 64 * 128


def test_results_that_are_stacked_by_a_loop_are_written_once():
    def run(x):
        return jax.lax.scan(lambda x, _: (x * 1.5, x + 1.0), x, None, length=50)[1]

    program = compiled(run, f32(256, 256))
    row = 4 * 256 * 256
    assert cost(program.as_text()).bytes < 50 * 12 * row  # and not 50 times all 50 rows


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_and_their_gradients(stride):
    def loss(x, kernel):
        y = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.sin(y))

    side = {1: 14, 2: 7}[stride]
    one = 2 * 4 * side * side * 16 * 9 * 8
    program = compiled(jax.grad(loss, argnums=(0, 1)), f32(4, 16, 16, 8), f32(3, 3, 8, 16))
    assert cost(program.as_text()).flops == 3 * one


def test_agrees_with_xla_without_loops():
    def loss(weights, x):
        for w in weights:
            x = jax.nn.gelu(x @ w)
        return jnp.mean(jnp.square(x))

    program = compiled(jax.grad(loss), [f32(256, 256)] * 4, f32(512, 256))
    flops, moved = analysed(program)
    found = cost(program.as_text())
    # XLA counts elementwise work as well.
    assert found.flops == (3 * 4 - 1) * 2 * 512 * 256 * 256
    assert found.flops == pytest.approx(flops, rel=0.05)
    assert found.bytes == pytest.approx(moved, rel=0.25)


def module(*lines):
    """A module whose entry has these instructions."""
    return "\n".join(
        ["HloModule m, num_partitions=1", "", "ENTRY %main () -> f32[] {", *lines, "}"]
    )


def test_products_of_a_tpu_are_convolutions_over_holes():
    """A product with a batch axis of 16, as libtpu 0.0.42 writes it: 15 of 16 taps meet nothing."""
    text = module(
        "  %a = bf16[16,50,64]{2,1,0} parameter(0)",
        "  %b = bf16[16,64,50]{2,1,0} parameter(1)",
        "  ROOT %c = bf16[16,50,50]{2,1,0} convolution(%a, %b), "
        "window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf",
    )
    assert cost(text).flops == 16 * 2 * 50 * 50 * 64


def test_precise_products_take_several_passes():
    text = module(
        "  %a = f32[8,16]{1,0} parameter(0)",
        "  %b = f32[16,4]{1,0} parameter(1)",
        "  ROOT %c = f32[8,4]{1,0} convolution(%a, %b), dim_labels=bf_io->bf, "
        "operand_precision={highest,highest}",
    )
    found = cost(text)
    assert found.flops == 2 * 8 * 16 * 4
    assert found.bf16_flops == 6 * found.flops


def test_what_lies_on_the_chip_is_no_traffic():
    line = "  ROOT %c = f32[1024]{0} add(%a, %a)"
    for layout, read in (("{0}", 4096), ("{0:T(1024)S(1)}", 0)):
        text = module(f"  %a = f32[1024]{layout} parameter(0)", line)
        assert cost(text).bytes == 2 * read + 4096


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="HLO"):
        cost("nothing of the kind")
