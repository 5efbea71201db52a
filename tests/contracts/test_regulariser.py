"""A regulariser of any host: with weight 0 the host is left as it is, to the last bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core.types import Embeds
from tests.contracts.objectives import common
from tests.helpers import optimised
from tests.seams.objectives import steady


def stepped(objective, name, bitwise=True):
    """Views, loss, gradients, extra and scalars from one state and batch."""
    params, extra = jax.jit(objective.init)(jax.random.key(0))

    def run(params, extra, batch):
        views = objective.views(batch, jax.random.key(5))
        loss = jax.value_and_grad(objective.loss, has_aux=True)
        return views, loss(params, extra, views, key=jax.random.key(6), step=jnp.int32(0))

    call = functools.partial(optimised, jax.jit(run)) if bitwise else jax.jit(run)
    return jax.device_get(call(params, extra, common.batch(name)))


@pytest.mark.parametrize(
    "name", ["queue", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ds2", "mae"))]
)
def test_weight_0_leaves_any_host_bitwise(name):
    host = common.build(name)
    assert isinstance(host, Embeds)
    silent = steady.build(steady.Config(weight=0.0), common.RUN, host)
    alone, within = stepped(host, name), stepped(silent, name)
    assert jax.tree.structure(alone) == jax.tree.structure(within)
    jax.tree.map(np.testing.assert_array_equal, alone, within)


@pytest.mark.slow
def test_a_weight_adds_its_term_and_leaves_the_host_s_views():
    host = common.build("queue")
    views, ((loss, (_, scalars)), grads) = stepped(host, "queue", bitwise=False)
    regulariser = steady.build(steady.Config(weight=0.5), common.RUN, host)
    with_term, ((total, (_, more)), other) = stepped(regulariser, "queue", bitwise=False)
    for name, values in views.items():
        np.testing.assert_array_equal(values, with_term[name])
    assert more["steady"] > 0
    assert total == pytest.approx(loss + 0.5 * more["steady"], rel=1e-6)
    assert scalars.keys() < more.keys()
    kernels = grads["encoder"]["conv1"]["kernel"], other["encoder"]["conv1"]["kernel"]
    assert np.abs(kernels[0] - kernels[1]).max() > 0
