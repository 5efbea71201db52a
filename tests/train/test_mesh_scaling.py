"""Collectives of a step at a fixed batch per device: their list does not grow with the devices."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dsad.core.mesh import MeshConfig, batch_sharding, make_mesh
from dsad.plan.hlo import collectives, summary, wire_bytes
from dsad.train.state import abstract_state
from dsad.train.step import abstract_key, make_step
from tests.contracts.objectives.common import batch, build, cases
from tests.train.equality import MIN_SIZE, QUICK, keep_gradients

PER_DEVICE = 2
SLOW = {"marks": pytest.mark.slow}
#: Those that gather samples (a queue's) move more with every device.
REDUCING = [n for n, _, case in cases().values() if case.collectives == {"all-reduce"}]
#: Objective, and whether its parameters are split over all devices or none.
CASES = [("mae", True), *((n, False) for n in REDUCING)]


@functools.cache
def moved(name, devices, split):
    """Collectives of the step, and its gradients' bytes on each device without any split."""
    mesh = make_mesh(MeshConfig(fsdp=devices if split else 1), jax.devices()[:devices])
    objective, tx = build(name), keep_gradients()
    abstract = abstract_state(objective, tx, mesh, MIN_SIZE)
    step = make_step(objective, tx, lambda n: jnp.float32(0), abstract, mesh=mesh)

    def shape(x):
        dims = (PER_DEVICE * devices, *x.shape[1:])
        return jax.ShapeDtypeStruct(dims, x.dtype, sharding=batch_sharding(mesh))

    inputs = jax.tree.map(shape, batch(name))
    compiled = step.lower(abstract, inputs, None, abstract_key(mesh)).compile(QUICK)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract.params))
    return collectives(compiled.as_text()), size


def table(name, split, counts):
    """For readers, with -s."""
    print(f"\n{name}, parameters {'split over all' if split else 'whole'}")
    for devices in counts:
        found, size = moved(name, devices, split)
        sent = sum(c.count * wire_bytes(c) for c in found)
        print(
            f"  {devices} devices: {len(found)} collectives, {sum(c.count for c in found)} "
            f"executions, {sent:,.0f} bytes sent per device; gradients {size:,} bytes"
        )
    for kind, shapes, _, count, sent in summary(moved(name, counts[-1], split)[0]):
        shapes = shapes if len(shapes) < 60 else f"{shapes[:56]} ..."
        print(f"    {kind:15} {count:3} × {shapes:60} {sent:12,.0f}")


@pytest.mark.parametrize(
    ("name", "split", "counts"),
    [
        pytest.param("mae", True, (2, 8), id="mae-split", **SLOW),
        pytest.param("mae", False, (2, 8), id="mae", **SLOW),
        *(pytest.param(*case, (2, 4, 8), **SLOW) for case in CASES),
    ],
)
def test_the_list_does_not_grow_and_bytes_follow_the_ring(name, split, counts):
    table(name, split, counts)
    lists, sent = {}, {}
    for devices in counts:
        found, _ = moved(name, devices, split)
        assert all(c.exact for c in found)
        assert {c.group_size for c in found} == {devices}
        lists[devices] = [r[:2] + r[3:4] for r in sorted(summary(found))]
        sent[devices] = sum(c.count * wire_bytes(c) for c in found)
    first = counts[0]
    for devices in counts[1:]:
        assert lists[devices] == lists[first]
        # Equal shapes, so that bytes may grow with (n − 1) / n only: never above twice those of 2.
        ratio = (devices - 1) / devices / ((first - 1) / first)
        assert sent[devices] == pytest.approx(sent[first] * ratio, rel=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        n if n == "mae" else pytest.param(n, **SLOW)
        for n, _, case in cases().values()
        if case.collectives is not None
    ],
)
@pytest.mark.slow
def test_each_gradient_is_summed_once(name):
    """All-reduces are the gradients, statistics and scalars: no samples, and none of them twice."""
    found, size = moved(name, 8, False)
    case = cases()[name].case
    assert {c.kind for c in found} <= case.collectives
    total = sum(c.count * c.result_bytes for c in found if c.kind == "all-reduce")
    assert size <= total < (1 + case.summed) * size


@pytest.mark.slow
def test_split_weights_are_gathered_for_the_forward_and_the_backward_pass():
    found, size = moved("mae", 8, True)
    gathered = sum(c.count * c.result_bytes for c in found if c.kind == "all-gather")
    assert 1.5 * size < gathered < 2.1 * size
    assert {c.kind for c in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert max(c.result_bytes for c in found if c.kind == "all-gather") < size / 4


@pytest.mark.parametrize("name", cases())
@pytest.mark.slow
def test_no_collective_waits_in_a_branch(name):
    """Where one does, XLA's CPU devices may come to it and to another in unlike order, and hang."""
    found, _ = moved(name, 2, False)
    assert found  # the gradients' at least
    assert all(c.exact for c in found)
