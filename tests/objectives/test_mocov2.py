"""MoCo v2 from linear encoders in float64, its queue whole and split, what keys depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsad.augment.views import ViewConfig
from dsad.core.errors import ConfigError
from dsad.core.mesh import BATCH_SPEC, place_batch
from dsad.core.tree import count, flatten
from dsad.core.types import RunInfo
from dsad.objectives import mocov2
from dsad.objectives._spd import SPDConfig, SPDTerm
from dsad.objectives._term import WithTerm
from dsad.train.state import TrainState, abstract_state
from dsad.train.step import make_step, placed_key
from tests.contracts.objectives import common
from tests.contracts.objectives.mocov2 import CASE
from tests.helpers import earlier_weights
from tests.ops.test_contrast import placed
from tests.train import equality

SMALL = {"arch": "resnet18", "last": "layer1", "hidden": (16,), "out": 5, "queue": 16}
RUN = RunInfo(total_steps=30, batch_size=8, samples=8, classes=3)
N, T = 8, 0.2
KEY = {"key": jax.random.key(0), "step": jnp.int32(0)}


class Linear(mocov2.MoCoV2):
    """MoCo v2 with a linear map for each network."""

    def embed(self, params, extra, images, *, train, views=1, layers=()):
        pooled = images.reshape(len(images), -1) @ params["encoder"]["w"]
        return {"pooled": pooled, "z": pooled @ params["z"]["w"]}, extra


def linear(**changes):
    """The objective and its state, the teacher another one than the encoder."""
    g = np.random.default_rng(0)
    draws = [g.standard_normal(shape).astype("f4") for shape in ((12, 7), (7, 5)) * 2]
    params, other = ({"encoder": {"w": a}, "z": {"w": b}} for a, b in (draws[:2], draws[2:]))
    keys = g.standard_normal((16, 5))
    queue = {
        "keys": unit(keys).astype("f4"), "labels": np.full(16, -1, np.int32),
        "pointer": np.int32(12),
    }  # fmt: skip
    teacher = {"params": other, "encoder": {}, "z": {}}
    extra = {"encoder": {}, "z": {}, "teacher": teacher, "queue": queue}
    return Linear(mocov2.Config(**{**SMALL, **changes}), RUN), params, extra


def views(seed=1):
    g = np.random.default_rng(seed)
    images = {f"view{i}": g.standard_normal((N, 2, 2, 3)).astype("f4") for i in (1, 2)}
    return {**images, "label": g.integers(0, 3, N).astype("i4")}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def vectors(weights, images):
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), weights)
    return unit(images.reshape(N, -1).astype(np.float64) @ w["encoder"]["w"] @ w["z"]["w"])


def direction(params, teacher, query, key, queue, excluded):
    q, k = vectors(params, query), vectors(teacher, key)
    logits = np.where(excluded, -np.inf, q @ np.asarray(queue, np.float64).T / T)
    logits = np.concatenate([np.sum(q * k, axis=1, keepdims=True) / T, logits], axis=1)
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[:, 0])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("aware", [False, True])
def test_loss_gradient_and_queue_against_float64(symmetric, aware):
    """Two steps: in the second the keys of the first, which wrapped around the end, are told."""
    objective, params, extra = linear(symmetric=symmetric, class_aware=aware)
    run = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    rows, marks, at = extra["queue"]["keys"].copy(), np.full(16, -1), 12
    teacher = extra["teacher"]["params"]
    for seed in (1, 2):
        inputs = views(seed)
        label, one, two = inputs["label"], inputs["view1"], inputs["view2"]
        if not aware:
            del inputs["label"]
        excluded = label[:, None] == marks[None] if aware else np.zeros((N, 16), bool)
        assert excluded.any() == (aware and seed == 2)

        before = rows.copy()

        def loss(w, one=one, two=two, rows=before, excluded=excluded):
            value = direction(w, teacher, one, two, rows, excluded)
            return value + symmetric * direction(w, teacher, two, one, rows, excluded)

        (value, (extra, _)), grads = jax.device_get(run(params, extra, inputs, **KEY))
        assert value == pytest.approx(loss(params), rel=1e-5)
        for name, place in (("encoder", (3, 2)), ("z", (1, 4))):
            ends = []
            for sign in (1, -1):
                moved = jax.tree.map(np.float64, params)
                moved[name]["w"][place] += sign * 1e-5
                ends.append(loss(moved))
            slope = (ends[0] - ends[1]) / 2e-5
            assert grads[name]["w"][place] == pytest.approx(slope, rel=1e-3, abs=1e-5)
        fresh = vectors(teacher, one if symmetric else two)
        for row, mark in zip(fresh, label, strict=True):
            rows[at], marks[at] = row, mark if aware else -1
            at = (at + 1) % 16
        np.testing.assert_allclose(extra["queue"]["keys"], rows, atol=1e-5)
        np.testing.assert_array_equal(extra["queue"]["labels"], marks)
        assert extra["queue"]["pointer"] == at


def test_a_split_queue_gives_what_a_whole_one_does():
    found = []
    for split, devices in ((False, 1), (True, 8)):
        objective, params, extra = linear(split_queue=split, class_aware=True)
        extra["queue"]["labels"] = np.arange(16, dtype=np.int32) % 4
        inputs, spec = views(), BATCH_SPEC if split else P()

        def loss(keys, *rows, objective=objective, params=params, extra=extra, names=inputs):
            state = {**extra, "queue": {**extra["queue"], "keys": keys}}
            run = jax.value_and_grad(objective.loss, has_aux=True)
            return run(params, state, dict(zip(names, rows, strict=True)), **KEY)

        arrays = [(extra["queue"]["keys"], spec), *((x, BATCH_SPEC) for x in inputs.values())]
        found.append(flatten(placed(loss, devices, 1 + split, *arrays)))
    for path, values in found[0].items():
        np.testing.assert_allclose(found[1][path], values, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_a_rule_splits_the_queue_of_a_real_step():
    objective = mocov2.build(mocov2.Config(**CASE.config, split_queue=True), common.RUN)
    mesh, tx = equality.mesh_of(8, 2), equality.keep_gradients()
    rules = (("queue/keys$", "data+fsdp,-"),)
    abstract = abstract_state(objective, tx, mesh, equality.MIN_SIZE, rules)
    step = make_step(objective, tx, lambda n: jnp.float32(0), abstract, mesh=mesh)
    params, extra = common.perturbed("mocov2")[1:]
    state = TrainState(
        step=np.int32(3), params=params, extra=extra, opt_state=jax.device_get(tx.init(params))
    )
    inputs = place_batch(common.batch("mocov2"), mesh)
    with jax.set_mesh(mesh):
        key = placed_key(jax.random.key(5), mesh)
        state, scalars = step(equality.placed(state, abstract), inputs, None, key)
    assert {s.data.shape for s in state.extra["queue"]["keys"].addressable_shards} == {(4, 16)}
    found = jax.device_get((scalars["loss"], state.opt_state["kept"], state.extra))
    found = equality.Found(found[0], flatten(found[1]), flatten(found[2]), {})
    equality.assert_equal(equality.stepped("mocov2", 1), found)


def test_the_key_encoder_follows_by_a_thousandth():
    """Its projection too; what a term has in ``params`` has no part in it."""
    objective, params, extra = linear()
    there = {**params, "spd_head": {"w": np.ones(3)}}
    moved = objective.after_update(there, extra, jnp.int32(1))["teacher"]["params"]
    assert moved.keys() == params.keys()
    for name, now in moved.items():
        k, q = extra["teacher"]["params"][name]["w"], params[name]["w"]
        np.testing.assert_allclose(now["w"], 0.999 * k.astype("f8") + 0.001 * q, rtol=1e-5)


def test_vectors_of_spd_never_enter_the_queue():
    objective, params, extra = linear()
    both = WithTerm(objective, SPDTerm(objective, SPDConfig(weight=0.5)), 0.5)
    inputs, triplet = views(), views(3)
    del inputs["label"]
    images = {n: triplet[v] for n, v in (("anchor", "view1"), ("positive", "view2"))}
    spd = {**images, "negative": images["anchor"][::-1], "peak": np.ones(N, np.float32)}
    alone, (before, _) = jax.jit(objective.loss)(params, extra, inputs, **KEY)
    total, (after, scalars) = jax.jit(both.loss)(params, extra, {**inputs, "spd": spd}, **KEY)
    jax.tree.map(np.testing.assert_array_equal, before["queue"], after["queue"])
    assert scalars["spd_loss"] != 0
    assert total == pytest.approx(float(alone + 0.5 * scalars["spd_loss"]), rel=1e-5)


def test_keys_depend_on_the_keys_of_the_batch_alone():
    """Not on their order, so on no device either, nor on the queries; in other batches they do."""
    objective = mocov2.MoCoV2(mocov2.Config(**SMALL), RUN)
    params, extra = common.drawn(objective)
    g = np.random.default_rng(4)
    one, two, other = (g.standard_normal((N, 16, 16, 3)).astype("f4") for _ in range(3))
    order = g.permutation(N)

    @jax.jit
    def after(one, two):
        return objective.loss(params, extra, {"view1": one, "view2": two}, **KEY)[1][0]

    new = jax.device_get(after(one, two))
    keys = new["queue"]["keys"][:N]
    permuted = after(one[order], two[order])["queue"]["keys"][:N]
    np.testing.assert_allclose(permuted, keys[order], atol=1e-5)
    np.testing.assert_allclose(after(other, two)["queue"]["keys"][:N], keys, atol=1e-6)
    mixed = np.concatenate([two[:4], other[4:]])
    assert np.abs(after(one, mixed)["queue"]["keys"][:4] - keys[:4]).max() > 1e-3
    # Statistics of queries are not those of keys, which the teacher keeps.
    mean, theirs = (s["encoder"]["norm1"]["mean"] for s in (new, new["teacher"]))
    assert np.abs(mean - theirs).max() > 1e-3
    assert new["teacher"].keys() == extra["teacher"].keys()


PLAIN = ViewConfig(
    side=8, area=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0, jitter_probability=0.0,
    blur_probability=0.0, mean=(0.0,) * 3, std=(1.0,) * 3,
)  # fmt: skip


def squares():
    """A batch whose views, but for turns, are the images."""
    n = np.arange(N, dtype=np.int32)
    image = np.random.default_rng(5).integers(0, 256, (N, 8, 8, 3), np.uint8)
    return {
        "image": image, "size": np.full((N, 2), 8, np.int32), "index": n, "epoch": 0 * n,
        "category": n % 3,
    }  # fmt: skip


def test_both_views_are_of_the_same_turn_and_turns_are_classes():
    cfg = mocov2.Config(**SMALL, turned=True, class_aware=True, view1=PLAIN, view2=PLAIN)
    batch = squares()
    made = jax.jit(mocov2.MoCoV2(cfg, RUN).views)(batch, jax.random.key(1))
    turns, category = np.divmod(made["label"], RUN.classes)
    np.testing.assert_array_equal(category, batch["category"])
    assert len(set(turns)) > 2
    want = [np.rot90(x, t) for x, t in zip(batch["image"] / 255, turns, strict=True)]
    for name in ("view1", "view2"):
        np.testing.assert_allclose(made[name], want, atol=1e-6)


def test_the_published_projection_has_no_norm():
    head = mocov2.MoCoV2(mocov2.Config(), RUN).heads["z"]
    params, stats = jax.eval_shape(head.init, jax.random.key(0))
    assert count(params) == 2048 * 2048 + 2048 + 2048 * 128 + 128
    assert not jax.tree.leaves(stats)


def test_adoption_copies_the_key_encoder_again():
    objective = mocov2.MoCoV2(mocov2.Config(**SMALL), RUN)
    earlier, params = common.drawn(objective), common.drawn(objective)
    params = jax.tree.map(np.zeros_like, params)
    taken, held, report = objective.adopt(earlier_weights(objective, *earlier), *params)
    for tree in (taken, held["teacher"]["params"]):
        np.testing.assert_array_equal(
            tree["encoder"]["conv1"]["kernel"], earlier[0]["encoder"]["conv1"]["kernel"]
        )
    mean = earlier[1]["encoder"]["norm1"]["mean"]
    np.testing.assert_array_equal(held["teacher"]["encoder"]["norm1"]["mean"], mean)
    assert not np.any(held["teacher"]["params"]["z"]["conv1"]["kernel"])
    assert report.endswith("heads start anew")


def test_a_queue_holds_a_batch():
    with pytest.raises(ConfigError, match=r"objective\.queue: expected at least .*8, found 7"):
        mocov2.build(mocov2.Config(**{**SMALL, "queue": 7}), RUN)


def test_classes_are_needed_where_they_are_told_apart():
    one = dataclasses.replace(RUN, classes=1)
    with pytest.raises(ConfigError, match="at least 2 categories with class_aware.*found 1"):
        mocov2.build(mocov2.Config(**SMALL, class_aware=True), one)
    mocov2.build(mocov2.Config(**SMALL, class_aware=True, turned=True), one)
