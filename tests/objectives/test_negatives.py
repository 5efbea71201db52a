"""Dense InfoNCE against loops in float64 and by hand, and DenseCL from separate passes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsad.augment.views import ViewConfig
from dsad.core.config import build_dataclass
from dsad.core.errors import ConfigError
from dsad.core.mesh import BATCH_SPEC
from dsad.objectives import ds2
from dsad.objectives._dense import Negatives, nce_loss, positive_pairs
from dsad.ops.geometry import cell_distances
from tests.objectives.test_ds2 import DISJOINT, FULL, RUN, random_case, shifted
from tests.ops.test_contrast import placed

BATCH = Negatives(source="batch")


def distance(qbox, kbox, s, a, c):
    """Of query cell a and key cell c, (row, column) each, in diagonals of the larger cell."""
    centres, diagonals = [], []
    for box, (row, column) in ((qbox, a), (kbox, c)):
        width, height = (box[2] - box[0]) / s, (box[3] - box[1]) / s
        centres.append((box[0] + (column + 0.5) * width, box[1] + (row + 0.5) * height))
        diagonals.append(np.hypot(width, height))
    (x1, y1), (x2, y2) = centres
    return np.hypot(x1 - x2, y1 - y2) / max(diagonals)


def oracle(q, k, qbox, kbox, *, threshold, far, temperature, queue=None):
    """Loss, its gradient by the queries, and the positive (row, column) of every cell or None."""
    b, s = q.shape[:2]
    cells = [(r, c) for r in range(s) for c in range(s)]
    terms, positives, gradient = [], {}, np.zeros_like(q)
    for i in range(b):
        for a in cells:
            away = {c: distance(qbox[i], kbox[i], s, a, c) for c in cells}
            nearest = min(away, key=away.get)
            positives[i, a] = nearest if away[nearest] < threshold else None
            if positives[i, a] is None:
                continue
            others = list(queue) if queue is not None else []
            if queue is None:
                others += [k[j][c] for j in range(b) for c in cells if j != i]
                others += [k[i][c] for c in cells if away[c] > far and c != nearest]
            keys = np.stack([k[i][nearest], *others])
            logits = keys @ q[i][a] / temperature
            p = np.exp(logits - logits.max())
            p /= p.sum()
            terms.append(-np.log(p[0]))
            gradient[i][a] = (p @ keys - keys[0]) / temperature
    return np.mean(terms), gradient / len(terms), positives


def loss_of(settings, threshold=0.5):
    def loss(q, k, qbox, kbox, queue=None):
        maps = jnp.ones(q.shape)
        pairs, _ = positive_pairs(
            maps, maps, qbox, kbox, threshold=threshold, top1="off", nearest=True
        )
        return nce_loss(q, k, pairs, (qbox, kbox), settings, queue)

    return jax.jit(loss)


@pytest.mark.parametrize(("source", "far"), [("batch", 1.2), ("batch", 0.1), ("queue", 1.2)])
@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (8, 2)])
def test_loss_and_gradient_against_float64(devices, fsdp, source, far):
    """Eight images, one or all of them on a device: the negatives are those of the global batch.

    A positive is no negative, though some are farther than 0.1.
    """
    q, k, _, _, qbox, kbox = random_case(4, b=8, s=4)
    settings = Negatives(source=source, temperature=0.3, distance=far)
    queue = random_case(5, b=1, s=5)[0].reshape(-1, q.shape[-1]) if source == "queue" else None
    want, gradient, positives = oracle(
        q, k, qbox, kbox, threshold=0.5, far=far, temperature=0.3, queue=queue
    )
    assert 0 < sum(p is None for p in positives.values()) < len(positives)
    arrays = [(x.astype(np.float32), BATCH_SPEC) for x in (q, k, qbox, kbox)]
    arrays += [(queue.astype(np.float32), P())] if queue is not None else []
    value, (by_query, by_key) = placed(
        jax.value_and_grad(loss_of(settings), argnums=(0, 1)), devices, fsdp, *arrays
    )
    assert value == pytest.approx(want, rel=1e-6)
    np.testing.assert_allclose(by_query, gradient, rtol=0, atol=2e-6 * np.abs(gradient).max())
    assert not by_key.any()


@pytest.mark.parametrize(("far", "own"), [(1.5, 0), (0.9, 1), (0.5, 3)])
def test_losses_by_hand(far, own):
    """Of 2 × 2 cells the neighbours are 0.71 and the opposite one is 1 diagonal away."""
    q = jnp.eye(8, dtype=jnp.float32).reshape(2, 2, 2, 8)
    same = np.repeat(FULL, 2, axis=0)
    found = loss_of(Negatives(source="batch", distance=far))(q, q, same, same)
    assert found == pytest.approx(math.log(1 + (4 + own) * math.exp(-5)), rel=1e-5)


def test_without_positives_there_is_no_loss_and_no_gradient():
    q = jnp.eye(4, dtype=jnp.float32).reshape(1, 2, 2, 4)
    loss = functools.partial(loss_of(BATCH), k=q, qbox=FULL, kbox=DISJOINT)
    value, gradient = jax.value_and_grad(loss)(q)
    assert value == 0
    assert not np.any(gradient)


@pytest.mark.parametrize(("cells", "moved"), [(0.3, 0), (0.8, 1)])
def test_the_positive_is_the_nearest_cell(cells, moved):
    """Of a view moved by 0.8 cells the first column's nearest cell is 0.57 diagonals away."""
    maps = jnp.ones((1, 7, 7, 2))
    boxes = jnp.asarray(FULL), jnp.asarray(shifted(cells, 7))
    pairs, spatial = positive_pairs(maps, maps, *boxes, threshold=0.5, top1="off", nearest=True)
    want = np.zeros((49, 49), bool)
    for row in range(7):
        for column in range(moved, 7):
            want[row * 7 + column, row * 7 + column - moved] = True
    np.testing.assert_array_equal(pairs[0], want)
    np.testing.assert_array_equal(spatial[0], want)


def test_distances_are_in_diagonals_of_the_larger_cell():
    _, _, _, _, qbox, kbox = random_case(9)
    found = cell_distances(jnp.asarray(qbox, jnp.float32), jnp.asarray(kbox, jnp.float32), 3)
    for a in range(9):
        for c in range(9):
            want = distance(qbox[1], kbox[1], 3, divmod(a, 3), divmod(c, 3))
            assert found[1, a, c] == pytest.approx(want, abs=1e-6)


# --- within the objective


VIEW = ViewConfig(side=32)
SMALL = {"layers": ("layer1",), "hidden": 8, "out": 6, "view1": VIEW, "view2": VIEW}
DENSECL = {
    "threshold": 0.0, "top1": "cell", "top1_similarity": "cosine", "propagation": False,
    "hidden_norm": False, "momentum": 0.999, "momentum_end": 0.999,
    "negatives": Negatives(source="queue", queue=10, whole=0.5),
}  # fmt: skip


def info_nce(q, k, others):
    logits = np.concatenate([np.sum(q * k, axis=1, keepdims=True), q @ others.T], axis=1) / 0.2
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[:, 0])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.slow
def test_densecl_is_half_of_cells_and_half_of_whole_images():
    """From one pass of each network and view; then four of the ten keys are new, in their order."""
    objective = ds2.build(ds2.Config(**SMALL, **DENSECL), RUN)
    params, extra = jax.jit(objective.init)(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), params)
    g = np.random.default_rng(2)
    images = [g.standard_normal((2, 32, 32, 3)).astype("f4") for _ in range(2)]
    views = {f"view{i + 1}": {"image": x, "box": FULL.repeat(2, 0)} for i, x in enumerate(images)}

    @jax.jit
    def run(params, extra):
        weights = ((params, extra["stats"]), (extra["teacher"], extra["teacher_stats"]))
        passes = [
            [
                objective.nets["encoder"].apply(w["encoder"], s["encoder"], x, train=True)[0]
                for x in images
            ]
            for w, s in weights
        ]
        found = objective.loss(params, extra, views, key=jax.random.key(0), step=jnp.int32(0))
        return passes, found

    passes, (found, (new, scalars)) = jax.device_get(run(params, extra))

    def head(weights, name, x):
        w = jax.tree.map(lambda a: np.asarray(a, np.float64), weights[f"projector_{name}"])
        hidden = np.maximum(x @ w["conv1"]["kernel"] + w["conv1"]["bias"], 0)
        return hidden @ w["conv2"]["kernel"] + w["conv2"]["bias"]

    maps = np.asarray([[m["layer1"] for m in side] for side in passes], np.float64)
    maps = maps.reshape(2, 2, 2, -1, 64)  # network, view, image, cell, channel
    cells = [head(w, "layer1", m) for w, m in zip((params, extra["teacher"]), maps, strict=True)]
    means = maps.mean(axis=3)
    wholes = [head(w, "whole", m) for w, m in zip((params, extra["teacher"]), means, strict=True)]
    queues = {n: np.asarray(q["keys"], np.float64) for n, q in extra["queue"].items()}
    dense = whole = 0.0
    for q, k in ((0, 1), (1, 0)):
        for i in range(2):
            best = np.argmax(unit(maps[0, q, i]) @ unit(maps[1, k, i]).T, axis=1)
            positive = unit(cells[1][k, i])[best]
            dense += info_nce(unit(cells[0][q, i]), positive, queues["layer1"]) / 4
        whole += info_nce(unit(wholes[0][q]), unit(wholes[1][k]), queues["whole"]) / 2
    assert scalars["loss_layer1"] == pytest.approx(dense, rel=1e-4)
    assert scalars["loss_whole"] == pytest.approx(whole, rel=1e-4)
    assert found == pytest.approx((dense + whole) / 2, rel=1e-4)

    keys = {"layer1": cells[1].mean(axis=2), "whole": wholes[1]}
    for name, queue in new["queue"].items():
        fresh = unit(keys[name]).transpose(1, 0, 2).reshape(4, -1)  # both views of an image
        np.testing.assert_allclose(queue["keys"][:4], fresh, atol=1e-4)
        np.testing.assert_array_equal(queue["keys"][4:], extra["queue"][name]["keys"][4:])
        assert queue["pointer"] == 4
    teacher = objective.after_update(params, {"teacher": extra["teacher"]}, jnp.int32(9))["teacher"]
    name = "projector_whole"
    a, b, m = (t[name]["conv1"]["kernel"] for t in (extra["teacher"], params, teacher))
    np.testing.assert_allclose(m, 0.999 * a + 0.001 * b, rtol=1e-5)


def test_uniform_similarities_cost_the_logarithm_of_all():
    zeros = jnp.zeros((2, 2, 2, 3))
    boxes, pairs = (FULL.repeat(2, 0),) * 2, jnp.tile(jnp.eye(4, dtype=bool), (2, 1, 1))
    queued = Negatives(source="queue")
    found = nce_loss(zeros, zeros, pairs, boxes, queued, jnp.zeros((1024, 3)))
    assert found == pytest.approx(math.log(1025), rel=1e-6)


def test_settings_of_negatives_that_are_off_change_nothing():
    """The program of the published loss is the same to the letter."""

    def program(**settings):
        objective = ds2.build(ds2.Config(**SMALL, negatives=Negatives(**settings)), RUN)
        state = jax.eval_shape(objective.init, jax.random.key(0))
        image, box = jnp.zeros((2, 32, 32, 3)), jnp.zeros((2, 4))
        views = {n: {"image": image, "box": box} for n in ("view1", "view2")}
        loss = functools.partial(objective.loss, key=jax.random.key(0), step=jnp.int32(0))
        return str(jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))(*state, views))

    off = program()
    assert program(distance=9.0, temperature=1.0, queue=7) == off
    assert "log" not in off


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "objective.top1: expected 'off' or 'cell' with negatives"),
        ({"top1": "cell"}, "objective.threshold: expected 0 with negatives"),
        ({"negatives": {"whole": 0.5}}, "negatives.whole: expected 0 unless source is 'queue'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        build_dataclass(ds2.Config, {"negatives": {"source": "batch"}, **values}, "objective")
