"""SimCLR's loss in float64 from its vectors, its joint statistics, and turned views."""

import jax
import numpy as np
import pytest

from dsad.objectives import simclr
from dsad.objectives.teacher import interleaved
from tests.contracts.objectives.common import drawn
from tests.objectives.test_mocov2 import KEY, PLAIN, RUN, N, squares, unit

SMALL = {"arch": "resnet18", "last": "layer1", "hidden": (16,), "out": 5}


def test_loss_is_of_joint_batches_against_float64():
    """Which view of an image is the first does not matter, as batch norms do not know views."""
    objective = simclr.SimCLR(simclr.Config(**SMALL), RUN)
    params, extra = drawn(objective)
    g = np.random.default_rng(6)
    one, two = (g.standard_normal((N, 16, 16, 3)).astype("f4") + 0.5 * i for i in range(2))

    @jax.jit
    def run(one, two):
        loss, (new, _) = objective.loss(params, extra, {"view1": one, "view2": two}, **KEY)
        both = interleaved(one, two)
        joint = objective.embed(params, extra, both, train=True)[0]["z"]
        separate = objective.embed(params, extra, both, train=True, views=2)[0]["z"]
        return loss, new, joint, separate

    def oracle(z):
        z = unit(np.asarray(z, np.float64))
        alike = z @ z.T / 0.1
        np.fill_diagonal(alike, -np.inf)
        partner = np.arange(2 * N) ^ 1  # views of an image lie next to each other
        return np.mean(np.log(np.exp(alike).sum(axis=1)) - alike[np.arange(2 * N), partner])

    loss, new, joint, separate = jax.device_get(run(one, two))
    assert loss == pytest.approx(oracle(joint), rel=1e-5)
    assert abs(loss - oracle(separate)) > 1e-3
    swapped = (np.arange(N) % 2 == 0)[:, None, None, None]
    assert run(np.where(swapped, two, one), np.where(swapped, one, two))[0] == pytest.approx(
        loss, rel=1e-5
    )
    assert jax.tree.structure(new) == jax.tree.structure(extra)


@pytest.mark.slow
def test_both_views_are_of_the_same_turn():
    batch = squares()
    cfg = simclr.Config(**SMALL, turned=True, view1=PLAIN, view2=PLAIN)
    made = jax.device_get(jax.jit(simclr.SimCLR(cfg, RUN).views)(batch, jax.random.key(1)))
    np.testing.assert_array_equal(made["view1"], made["view2"])
    turns = []
    for image, view in zip(batch["image"] / 255, made["view1"], strict=True):
        fits = [np.allclose(np.rot90(image, t), view, atol=1e-6) for t in range(4)]
        assert sum(fits) == 1
        turns.append(fits.index(True))
    assert len(set(turns)) > 2


def test_the_published_projection_has_a_norm_behind_each_layer():
    objective = simclr.SimCLR(simclr.Config(), RUN)
    params, stats = jax.eval_shape(objective.heads["z"].init, jax.random.key(0))
    assert {name: leaf.shape for name, leaf in stats["norm2"].items()} == {
        "mean": (128,), "var": (128,),
    }  # fmt: skip
    assert params["conv1"]["kernel"].shape == (2048, 2048)
    assert params["norm1"].keys() == params["norm2"].keys() == {"scale", "bias"}
    assert params["conv1"].keys() == params["conv2"].keys() == {"kernel"}
    assert params["conv2"]["kernel"].shape == (2048, 128)
