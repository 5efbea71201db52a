"""DS2 against hand-computed values and an independent float64 implementation of the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.augment.views import ViewConfig
from dsad.core.errors import ConfigError
from dsad.core.tree import count, flatten
from dsad.core.types import RunInfo
from dsad.objectives import ds2, teacher
from dsad.ops.geometry import spatial_positives
from dsad.ops.similarity import self_attention, unit
from tests.helpers import earlier_weights

FULL = np.array([[0.0, 0.0, 1.0, 1.0]], np.float32)
FLIPPED = np.array([[1.0, 0.0, 0.0, 1.0]], np.float32)
DISJOINT = np.array([[5.0, 5.0, 6.0, 6.0]], np.float32)
RUN = RunInfo(total_steps=5670, batch_size=256, samples=3629, classes=15)


def shifted(cells: float, grid: int) -> np.ndarray:
    return FULL + np.array([[cells / grid, 0, cells / grid, 0]], np.float32)


# --- an independent implementation, float64, loops over cells


def oracle_loss(q, k, fq, fk, qbox, kbox, *, threshold, top1, similarity="dot"):
    b, s, _, _ = q.shape
    total = 0.0
    for i in range(b):
        pairs = set()
        cells = [(r, c) for r in range(s) for c in range(s)]

        def centre(box, cell):
            bw, bh = (box[2] - box[0]) / s, (box[3] - box[1]) / s
            return box[0] + (cell[1] + 0.5) * bw, box[1] + (cell[0] + 0.5) * bh

        def diagonal(box):
            return np.hypot((box[2] - box[0]) / s, (box[3] - box[1]) / s)

        largest = max(diagonal(qbox[i]), diagonal(kbox[i]))
        alike = {}
        for a in cells:
            for c in cells:
                (x1, y1), (x2, y2) = centre(qbox[i], a), centre(kbox[i], c)
                if np.hypot(x1 - x2, y1 - y2) / largest < threshold:
                    pairs.add((a, c))
                u, v = fq[i][a], fk[i][c]
                alike[a, c] = u @ v / len(u)
                if similarity == "cosine":
                    alike[a, c] = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
        if top1 == "image":
            pairs.add(max(alike, key=alike.get))  # first of equals, row-major
        elif top1 == "cell":
            pairs |= {(a, max(cells, key=lambda c, a=a: alike[a, c])) for a in cells}
        total += sum(q[i][a] @ k[i][c] for a, c in pairs) / (len(pairs) + 1e-6)
    return -2 * total / b


def random_case(seed, b=3, s=5, c=6, d=7):
    g = np.random.default_rng(seed)
    q, k = (g.standard_normal((b, s, s, c)) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    fq, fk = (g.standard_normal((b, s, s, d)) for _ in range(2))
    low = g.uniform(0, 0.4, (2, b, 2))
    boxes = np.concatenate([low, low + g.uniform(0.3, 0.6, (2, b, 2))], axis=-1)
    boxes[1, ::2] = boxes[1, ::2][:, [2, 1, 0, 3]]  # some flipped
    return q, k, fq, fk, boxes[0], boxes[1]


@pytest.mark.parametrize("top1", ["image", "cell", "off"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("threshold", [0.1, 0.7])
def test_loss_equals_the_oracle(top1, similarity, threshold):
    case = random_case(3)
    want = oracle_loss(*case, threshold=threshold, top1=top1, similarity=similarity)
    got = ds2.dense_loss(
        *(x.astype(np.float32) for x in case), threshold=threshold, top1=top1,
        similarity=similarity,
    )  # fmt: skip
    assert float(got) == pytest.approx(want, abs=1e-6)


# --- positives


@pytest.mark.parametrize(("grid", "same", "moved"), [(7, 49, 42), (14, 196, 182)])
def test_numbers_of_spatial_positives(grid, same, moved):
    def positives(query, key):
        return np.asarray(spatial_positives(jnp.asarray(query), jnp.asarray(key), grid, 0.1))[0]

    np.testing.assert_array_equal(positives(FULL, FULL), np.eye(grid**2, dtype=bool))
    flipped = positives(FULL, FLIPPED)
    assert flipped.sum() == same
    for row, column in np.argwhere(flipped):
        assert (row // grid, row % grid) == (column // grid, grid - 1 - column % grid)
    assert positives(FULL, shifted(1.0, grid)).sum() == moved
    assert positives(FULL, DISJOINT).sum() == 0


def test_the_threshold_is_strict_and_in_cell_diagonals():
    def number(cells):
        return int(
            spatial_positives(jnp.asarray(FULL), jnp.asarray(shifted(cells, 7)), 7, 0.1).sum()
        )

    assert number(0.14) == 49
    assert number(0.15) == 0


# --- losses by hand


def one_hot_case():
    q = np.eye(4, dtype=np.float32).reshape(1, 2, 2, 4)
    fq, fk = np.zeros((2, 1, 2, 2, 3), np.float32)
    fq[0, 0, 1], fk[0, 1, 0] = 2.0, 3.0  # query cell 1, key cell 2
    return q, q.copy(), fq, fk


def test_losses_by_hand():
    q, k, fq, fk = one_hot_case()
    assert float(ds2.dense_loss(q, k, fq, fk, FULL, FULL)) == pytest.approx(-1.6, abs=1e-5)
    assert float(ds2.dense_loss(q, k, fq, fk, FULL, DISJOINT)) == pytest.approx(0.0, abs=1e-6)
    k[0, 1, 0] = [0, 1, 0, 0]
    assert float(ds2.dense_loss(q, k, fq, fk, FULL, DISJOINT)) == pytest.approx(-2.0, abs=1e-5)
    same = np.full((1, 2, 2, 4), 0.5, np.float32)
    assert float(ds2.dense_loss(same, same, fq, fk, FULL, FULL)) == pytest.approx(-2.0, abs=1e-5)


def test_ties_go_to_the_first_pair():
    q = np.eye(49, dtype=np.float32).reshape(1, 7, 7, 49)
    tied = np.ones((1, 7, 7, 8), np.float32)
    assert float(ds2.dense_loss(q, q, tied, tied, FULL, FULL)) == pytest.approx(-2.0, abs=1e-5)
    flipped = ds2.dense_loss(q, q, tied, tied, FULL, FLIPPED)
    assert float(flipped) == pytest.approx(-2 * 8 / 50, abs=1e-5)


def test_symmetries():
    q, k, fq, fk, qbox, kbox = (x.astype(np.float32) for x in random_case(11))
    base = float(ds2.dense_loss(q, k, fq, fk, qbox, kbox))
    assert float(ds2.dense_loss(k, q, fk, fq, kbox, qbox)) == pytest.approx(base, abs=1e-6)
    mirror = [x[:, :, ::-1] for x in (q, k, fq, fk)]
    swapped = [b[:, [2, 1, 0, 3]] for b in (qbox, kbox)]
    assert float(ds2.dense_loss(*mirror, *swapped)) == pytest.approx(base, abs=1e-6)
    assert float(ds2.dense_loss(q, k, 3 * fq, 0.1 * fk, qbox, kbox)) == pytest.approx(
        base, abs=1e-6
    )


def test_no_gradient_into_keys_and_backbone_maps():
    q, k, fq, fk, qbox, kbox = (jnp.asarray(x, jnp.float32) for x in random_case(5))
    grads = jax.grad(ds2.dense_loss, argnums=(0, 1, 2, 3))(q, k, fq, fk, qbox, kbox)
    assert np.abs(grads[0]).max() > 0
    for zero in grads[1:]:
        assert not np.any(zero)


# --- propagation, momentum


def test_propagation_by_hand():
    def propagate(columns):
        z = jnp.asarray(columns, jnp.float32)[None]
        return np.asarray(self_attention(z, unit(z)))[0]

    half = np.sqrt(3) / 2
    want = [[1.125, 0.21651], [0.75, 0.86603]]
    np.testing.assert_allclose(propagate([[1, 0], [0.5, half]]), want, atol=1e-5)
    np.testing.assert_allclose(propagate([[3, 0], [0, 0.5]]), np.eye(2), atol=1e-6)
    np.testing.assert_allclose(propagate([[1, 0], [-2, 0]]), [[1, 0], [-1, 0]], atol=1e-6)
    np.testing.assert_allclose(propagate([[3, 4]] * 9), [[9 * 0.6, 9 * 0.8]] * 9, rtol=1e-6)


def test_the_gradient_at_zero_vectors_is_finite():
    z = jnp.zeros((1, 4, 3))
    grad = jax.grad(lambda z: jnp.sum(self_attention(z, unit(z))))(z)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize(("step", "want"), [(0, 0.99), (2835, 0.995), (5670, 1.0), (9999, 1.0)])
def test_momentum(step, want):
    assert float(teacher.momentum_at(jnp.int32(step), 0.99, 5670)) == pytest.approx(want, abs=1e-6)
    level = teacher.momentum_at(jnp.int32(step), 0.999, 5670, 0.999)
    assert float(level) == pytest.approx(0.999, abs=1e-6)


# --- shapes and counts


def test_parameter_counts_and_maps():
    objective = ds2.build(ds2.Config(), RUN)
    params, extra = jax.eval_shape(objective.init, jax.random.key(0))
    counts = {name: count(tree) for name, tree in params.items()}
    assert counts == {
        "encoder": 11_176_512,
        "projector_layer3": 2_109_696,
        "projector_layer4": 3_158_272,
        "value": 65_792,
    }
    assert count(params) == 16_510_272
    assert count(extra["teacher"]) == 16_444_480
    maps = jax.eval_shape(
        objective.features, params, extra, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    )
    assert maps["layer3"].shape == (1, 14, 14, 256)
    assert maps["layer4"].shape == (1, 7, 7, 512)


def test_exempt_parameters_are_the_published_49():
    objective = ds2.build(ds2.Config(), RUN)
    params, _ = jax.eval_shape(objective.init, jax.random.key(0))
    vectors = {n: x.size for n, x in flatten(params).items() if n.endswith(("bias", "scale"))}
    assert (len(vectors), sum(vectors.values())) == (49, 34_944)
    assert len(flatten(params)) - len(vectors) == 25


def test_wider_networks_get_heads_of_their_own_width():
    objective = ds2.build(ds2.Config(arch="resnet50", hidden=8, out=4), RUN)
    params, _ = objective.nets["projector_layer3"].shapes()
    assert params["conv1"]["kernel"].shape == (1024, 8)


def test_the_teacher_moves_as_the_equation_says():
    objective = ds2.build(ds2.Config(hidden=4, out=4), RUN)
    extra = {"teacher": {"encoder": {"w": jnp.float32(1.0)}}}
    params = {"encoder": {"w": jnp.float32(3.0)}, "value": {}}
    moved = objective.after_update(params, extra, jnp.int32(2835))
    assert float(moved["teacher"]["encoder"]["w"]) == pytest.approx(0.995 + 3 * 0.005, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"layers": ("layer9",)}, "objective.layers"),
        ({"threshold": 0.0, "top1": "off"}, "objective.threshold"),
        ({"arch": "resnet19"}, "resnet19"),
    ],
)
def test_unusable_settings_are_refused(values, key):
    with pytest.raises(ConfigError, match=key):
        ds2.build(ds2.Config(**values), RUN)


# --- the whole loss, from separate passes


SMALL = {"hidden": 8, "out": 6, "view1": ViewConfig(side=64), "view2": ViewConfig(side=64)}
VARIANTS = {
    "default": {},
    "pixpro": {"layers": ("layer4",), "threshold": 0.7, "top1": "off", "average_directions": False},
    "bare": {"teacher": "none", "propagation": False, "layers": ("layer3",)},
    "identity": {"value_transform": "identity", "top1": "cell", "top1_similarity": "cosine"},
}


@pytest.mark.parametrize(
    "name",
    ["default", *(pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS if n != "default")],
)
def test_the_objective_is_the_sum_of_its_directions(name):
    """One forward pass per view and network, then the public loss of every direction and scale."""
    cfg = ds2.Config(**SMALL, **VARIANTS[name])
    objective = ds2.build(cfg, RUN)
    params, extra = jax.jit(objective.init)(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), params)
    g = np.random.default_rng(2)
    boxes = [np.array([[0.0, 0.0, 0.8, 0.8], [0.9, 0.1, 0.2, 0.9]], "f4"),
             np.array([[0.1, 0.1, 0.9, 0.9], [0.0, 0.0, 1.0, 1.0]], "f4")]  # fmt: skip
    images = [g.standard_normal((2, 64, 64, 3)).astype("f4") for _ in range(2)]
    views = {f"view{i + 1}": {"image": images[i], "box": boxes[i]} for i in range(2)}

    def forward(weights, stats, image):
        net = objective.nets
        maps, _ = net["encoder"].apply(weights["encoder"], stats["encoder"], image, train=True)
        heads = {}
        for layer in cfg.layers:
            n = f"projector_{layer}"
            heads[layer], _ = net[n].apply(weights[n], stats[n], maps[layer], train=True)
        return maps, heads

    @jax.jit
    def both(params, extra):
        teacher = extra.get("teacher", params)
        key_stats = extra.get("teacher_stats", extra["stats"])
        online = [forward(params, extra["stats"], x) for x in images]
        return online, [forward(teacher, key_stats, x) for x in images]

    online, keys = both(params, extra)
    want = 0.0
    for layer in cfg.layers:
        for q, k in ((0, 1), (1, 0)):
            z = np.asarray(online[q][1][layer], np.float64)
            query = z
            if cfg.propagation:
                flat = z.reshape(2, -1, cfg.out)
                u = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
                v = u
                if cfg.value_transform == "linear":
                    w = {n: np.asarray(x, np.float64) for n, x in params["value"]["conv"].items()}
                    v = flat @ w["kernel"] + w["bias"]
                    v = v / np.linalg.norm(v, axis=-1, keepdims=True)
                query = (np.maximum(u @ u.transpose(0, 2, 1), 0) ** 2 @ v).reshape(z.shape)
            key = np.asarray(keys[k][1][layer], np.float64)
            query, key = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
            part = oracle_loss(
                query, key, *(np.asarray(m, np.float64) for m in
                              (online[q][0][layer], keys[k][0][layer])),
                boxes[q], boxes[k], threshold=cfg.threshold, top1=cfg.top1,
                similarity=cfg.top1_similarity,
            )  # fmt: skip
            want += part / 2 if cfg.average_directions else part
    got, (new, _) = jax.jit(objective.loss)(
        params, extra, views, key=jax.random.key(0), step=jnp.int32(0)
    )
    assert float(got) == pytest.approx(want, abs=2e-4)
    assert jax.tree.structure(new) == jax.tree.structure(extra)


@pytest.mark.slow
def test_adopt_takes_the_encoder_and_copies_the_teacher_anew():
    objective = ds2.build(ds2.Config(**SMALL), RUN)
    params, extra = jax.jit(objective.init)(jax.random.key(0))
    earlier, old = jax.jit(objective.init)(jax.random.key(1))
    source = earlier_weights(objective, earlier, old)
    new, new_extra, report = objective.adopt(source, params, extra)
    kernel = earlier["encoder"]["conv1"]["kernel"]
    np.testing.assert_array_equal(new["encoder"]["conv1"]["kernel"], kernel)
    np.testing.assert_array_equal(new_extra["teacher"]["encoder"]["conv1"]["kernel"], kernel)
    assert "encoder" in report
    cut = source.encoder._replace(params={"conv1": {"kernel": jnp.zeros((3, 3, 3, 64))}})
    with pytest.raises(ConfigError, match=r"conv1/kernel: expected \(7, 7, 3, 64\)"):
        objective.adopt(source._replace(encoder=cut), params, extra)


@pytest.mark.parametrize("how", [{"top1": "cells"}, {"similarity": "cos"}])
def test_unknown_modes_of_the_loss_are_refused(how):
    q, k, fq, fk = one_hot_case()
    with pytest.raises(ConfigError, match=next(iter(how.values()))):
        ds2.dense_loss(q, k, fq, fk, FULL, FULL, **how)
