"""Contrastive losses and the queue on 1, 2, 4 and 8 devices, against float64 and by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsad.core.errors import ConfigError
from dsad.core.mesh import BATCH_SPEC, MeshConfig, make_mesh
from dsad.ops import contrast
from dsad.ops.contrast import enqueue, make_queue
from dsad.plan.hlo import collectives

info_nce = jax.jit(contrast.info_nce, static_argnames="split")
nt_xent = jax.jit(contrast.nt_xent)
N, D, K = 16, 12, 40
MESHES = [(1, 1), (2, 1), (4, 2), (8, 8)]


def units(seed, *shape):
    x = np.random.default_rng(seed).standard_normal(shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def placed(function, devices, fsdp, *arrays_and_specs):
    """What a function gives under one jit, its arguments lying on a mesh as told."""
    mesh = make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:devices])
    arguments = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in arrays_and_specs]

    @jax.jit
    def run(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return jax.device_get(run(*arguments))


def softmax(s):
    e = np.exp(s - s.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def check(found, loss, *gradients):
    value, made = found
    assert value == pytest.approx(loss, rel=1e-6)
    largest = max(np.abs(g).max() for g in gradients)
    for a, b in zip(made, gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * largest)


@pytest.mark.parametrize(("devices", "fsdp"), MESHES)
def test_two_views_against_float64(devices, fsdp):
    first, second, t = units(0, N, D), units(1, N, D), 0.1
    z = np.concatenate([first, second]).astype(np.float64)
    s = z @ z.T / t
    np.fill_diagonal(s, -np.inf)
    partner = (np.arange(2 * N) + N) % (2 * N)
    p = softmax(s)
    loss = -np.mean(np.log(p[np.arange(2 * N), partner]))
    p[np.arange(2 * N), partner] -= 1
    gradient = (p + p.T) @ z / t / (2 * N)
    found = placed(
        jax.value_and_grad(functools.partial(nt_xent, temperature=t), argnums=(0, 1)),
        devices, fsdp, (first, BATCH_SPEC), (second, BATCH_SPEC),
    )  # fmt: skip
    check(found, loss, gradient[:N], gradient[N:])


@pytest.mark.parametrize(("devices", "fsdp"), MESHES)
def test_other_keys_of_the_batch_against_float64(devices, fsdp):
    query, key, t = units(2, N, D), units(3, N, D), 0.2
    q, k = query.astype(np.float64), key.astype(np.float64)
    p = softmax(q @ k.T / t)
    loss = -np.mean(np.log(np.diag(p)))
    p -= np.eye(N)
    found = placed(
        jax.value_and_grad(functools.partial(info_nce, temperature=t), argnums=(0, 1)),
        devices, fsdp, (query, BATCH_SPEC), (key, BATCH_SPEC),
    )  # fmt: skip
    check(found, loss, p @ k / t / N, p.T @ q / t / N)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize(("devices", "fsdp"), MESHES)
def test_a_queue_against_float64(devices, fsdp, split):
    query, key, queue = units(4, N, D), units(5, N, D), units(6, K, D)
    excluded = np.random.default_rng(7).random((N, K)) < 0.3
    t = 0.2
    q, k, other = (x.astype(np.float64) for x in (query, key, queue))
    away = np.where(excluded, -np.inf, q @ other.T / t)
    p = softmax(np.concatenate([np.sum(q * k, axis=1, keepdims=True) / t, away], axis=1))
    loss = -np.mean(np.log(p[:, 0]))
    gradient = (p[:, 1:] @ other + (p[:, :1] - 1) * k) / t / N

    def function(query, key, queue, excluded):
        return info_nce(query, key, temperature=t, negatives=queue, excluded=excluded, split=split)

    found = placed(
        jax.value_and_grad(function, argnums=(0, 1, 2)), devices, fsdp, (query, BATCH_SPEC),
        (key, BATCH_SPEC), (queue, BATCH_SPEC if split else P()), (excluded, P()),
    )  # fmt: skip
    zeros = np.zeros_like(k), np.zeros_like(other)  # a teacher's keys get no gradient
    check(found, loss, gradient, *zeros)


def test_published_values():
    same = jnp.ones((4, 3)) / math.sqrt(3)
    assert nt_xent(same, same) == pytest.approx(math.log(7), rel=1e-6)
    pair = jnp.eye(2)
    assert nt_xent(pair, pair, temperature=0.2) == pytest.approx(0.0133859, abs=2e-7)
    zeros = jnp.zeros((2, 8))
    assert info_nce(zeros, zeros, negatives=jnp.zeros((65536, 8))) == pytest.approx(11.090370)
    one, two = jnp.eye(3)[:1], jnp.eye(3)[1:]
    assert info_nce(one, one, negatives=two) == pytest.approx(0.0133859, abs=2e-7)
    masked = info_nce(one, one, negatives=two, excluded=jnp.array([[True, False]]))
    assert masked == pytest.approx(0.0067153, abs=2e-7)
    nothing = info_nce(one, one, negatives=two, excluded=jnp.ones((1, 2), bool))
    assert nothing == pytest.approx(0, abs=1e-7)


def test_queries_that_are_not_counted_leave_the_mean():
    query, key, queue = units(4, N, D), units(5, N, D), units(6, K, D)
    counted = np.arange(N) % 3 == 0
    found = jax.value_and_grad(info_nce)(query, key, negatives=queue, counted=jnp.asarray(counted))
    loss, gradient = jax.value_and_grad(info_nce)(query[counted], key[counted], negatives=queue)
    assert found[0] == pytest.approx(float(loss), rel=1e-6)
    np.testing.assert_allclose(found[1][counted], gradient, rtol=1e-5, atol=1e-7)
    assert not found[1][~counted].any()
    assert info_nce(query, key, negatives=queue, counted=jnp.zeros(N, bool)) == 0


def test_large_similarities_do_not_overflow():
    query = 100 * jnp.eye(4, 8)
    loss, gradient = jax.value_and_grad(info_nce)(query, -query, negatives=100 * jnp.eye(8)[4:])
    assert loss == pytest.approx(1e4 / 0.2 + math.log(4), abs=0.01)  # four logits of 0
    assert np.isfinite(gradient).all()


def filled(devices, fsdp, spec, batches):
    """A queue after some batches, and where its keys lie."""
    mesh = make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:devices])
    queue = {"keys": units(8, K, D), "labels": np.full(K, -1, np.int32), "pointer": np.int32(0)}
    places = {"keys": spec, "labels": P(*spec[:1]), "pointer": P()}
    shardings = {k: NamedSharding(mesh, s) for k, s in places.items()}
    queue = {k: jax.device_put(v, shardings[k]) for k, v in queue.items()}

    @functools.partial(jax.jit, out_shardings=shardings)
    def step(queue, keys, labels):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return enqueue(queue, keys, labels)

    batch = NamedSharding(mesh, BATCH_SPEC)
    for keys, labels in batches:
        queue = step(queue, jax.device_put(keys, batch), jax.device_put(labels, batch))
    return queue


@pytest.mark.parametrize("spec", [P(), BATCH_SPEC], ids=["whole", "split"])
@pytest.mark.parametrize(("devices", "fsdp"), MESHES)
def test_the_oldest_keys_make_way_in_order(devices, fsdp, spec):
    """40 rows and batches of 16: the third wraps around the end."""
    batches = [(units(i, N, D), np.arange(N, dtype=np.int32) + 100 * i) for i in range(20, 25)]
    keys, labels, at = units(8, K, D), np.full(K, -1, np.int32), 0
    for new, marks in batches:
        for row, mark in zip(new, marks, strict=True):
            keys[at], labels[at] = row, mark
            at = (at + 1) % K
    found = filled(devices, fsdp, spec, batches)
    np.testing.assert_array_equal(found["keys"], keys)
    np.testing.assert_array_equal(found["labels"], labels)
    assert found["pointer"] == at
    assert found["pointer"].dtype == jnp.int32
    part = K // (devices if spec == BATCH_SPEC else 1)
    assert {s.data.shape for s in found["keys"].addressable_shards} == {(part, D)}


def test_a_split_queue_is_never_whole_on_a_device():
    """Of a loss with gradient and the update: neither moved whole, nor whole in memory."""
    mesh, size, dim, n = make_mesh(MeshConfig(fsdp=2)), 2**16, 128, 64
    split = NamedSharding(mesh, BATCH_SPEC)

    def step(query, key, queue):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            loss = functools.partial(info_nce, negatives=queue["keys"], split=True)
            return jax.value_and_grad(loss)(query, key), enqueue(queue, key)

    def shape(*dims, dtype=jnp.float32):
        sharding = split if dims else NamedSharding(mesh, P())
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    queue = {"keys": shape(size, dim), "labels": shape(size, dtype=jnp.int32),
             "pointer": shape(dtype=jnp.int32)}  # fmt: skip
    rows = shape(n, dim)
    compiled = jax.jit(step, donate_argnums=2).lower(rows, rows, queue).compile()
    moved = collectives(compiled.as_text())
    assert moved
    assert max(c.result_bytes for c in moved) < 2 * n * dim * 4 < size * dim * 4 / 8
    whole = size * dim * 4
    memory = compiled.memory_analysis()
    # A part of the queue and of the similarities with it, in a few copies.
    part = (size * dim + n * size) * 4 / 8
    assert memory.argument_size_in_bytes < 1.1 * whole / 8
    assert memory.temp_size_in_bytes < 4 * part < whole


def test_a_fresh_queue_is_random_unit_vectors_of_no_class():
    queue = make_queue(jax.random.key(0), 512, 16)
    np.testing.assert_allclose(np.linalg.norm(queue["keys"], axis=1), 1, rtol=1e-5)
    assert np.abs(np.mean(queue["keys"], axis=0)).max() < 0.1
    assert (queue["labels"] == -1).all()
    again = enqueue(queue, jnp.ones((4, 16)))
    for name, leaf in queue.items():
        assert (again[name].shape, again[name].dtype) == (leaf.shape, leaf.dtype), name
        assert again[name].weak_type == leaf.weak_type, name


def test_shapes_that_do_not_fit_are_refused():
    rows = jnp.ones((4, 3))
    with pytest.raises(ConfigError, match=r"nt_xent: .*\(4, 3\) and \(5, 3\)"):
        nt_xent(rows, jnp.ones((5, 3)))
    with pytest.raises(ConfigError, match="info_nce"):
        info_nce(rows, rows, negatives=jnp.ones((7, 2)))
    with pytest.raises(ConfigError, match="info_nce"):
        info_nce(rows, rows, negatives=jnp.ones((7, 3)), excluded=jnp.ones((7, 4), bool))
    with pytest.raises(ConfigError, match="at least the 9 keys of a batch, found a size of 8"):
        enqueue(make_queue(jax.random.key(0), 8, 3), jnp.ones((9, 3)))
    with pytest.raises(ConfigError, match="enqueue"):
        enqueue(make_queue(jax.random.key(0), 8, 3), jnp.ones((4, 2)))
    with pytest.raises(ConfigError, match="positive size"):
        make_queue(jax.random.key(0), 0, 3)
