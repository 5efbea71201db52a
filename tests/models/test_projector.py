"""The projector: its size, what it is without its parts, and how cells depend on each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.models import projector
from dsad.models.draws import uniform_draws


def fresh(width=16, references=10, heads=4):
    build = functools.partial(
        projector.init_projector, width=width, references=references, heads=heads
    )
    return uniform_draws(jax.random.key(0), build)


@pytest.mark.parametrize(
    ("width", "expected"), [(768, 10_431_168), (1024, 17_840_384), (1280, 27_215_680)]
)
def test_published_numbers_of_parameters(width, expected):
    shapes = jax.eval_shape(lambda: fresh(width, 2048, 16))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == expected


def test_without_attention_and_mlp_it_changes_nothing():
    p, x = fresh(), jax.random.normal(jax.random.key(1), (2, 6, 16))
    for name in ("out", "fc2"):
        p[name] = jax.tree.map(jnp.zeros_like, p[name])
    np.testing.assert_array_equal(projector.project(p, x), x)


def test_cells_are_alike_and_know_of_each_other():
    p, x = fresh(), jax.random.normal(jax.random.key(1), (2, 6, 16))
    found, order = projector.project(p, x), np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_allclose(projector.project(p, x[:, order]), found[:, order], atol=1e-6)
    changed = projector.project(p, x.at[0, 2].add(1.0))
    assert (np.abs(changed - found)[0].max(-1) > 1e-6).all()
    np.testing.assert_array_equal(changed[1], found[1])


def test_against_float64():
    p, x = fresh(), np.random.default_rng(0).normal(size=(2, 5, 16))
    w = jax.tree.map(np.float64, p)
    line = lambda n, y: y @ w[n]["kernel"] + w[n]["bias"]  # noqa: E731
    references = line("mix", w["references"])
    q, k, v = (
        np.einsum("...c,chd->...hd", y, w[n]["kernel"]) + w[n]["bias"]
        for n, y in (("queries", x), ("keys", references), ("values", references))
    )  # fmt: skip
    scores = np.exp(np.einsum("bnhd,mhd->bhnm", q, k) / 2)
    weights = scores / scores.sum(-1, keepdims=True)
    cells = x - line("out", np.einsum("bhnm,mhd->bnhd", weights, v).reshape(x.shape))
    hidden = line("fc1", cells)
    mean = hidden.mean(1, keepdims=True)
    gate = 1 / (1 + np.exp(-line("excite", np.maximum(line("squeeze", mean), 0))))
    y = gate * hidden
    from scipy.special import ndtr

    expected = line("fc2", y * ndtr(y)) + cells
    np.testing.assert_allclose(projector.project(p, jnp.asarray(x)), expected, atol=1e-5)


def test_initial_spreads():
    p = fresh(128, 300, 16)
    expected = {
        "references": 1, "mix/kernel": np.sqrt(2 / 128), "queries/kernel": np.sqrt(2 / 4 / 128),
        "out/kernel": 1 / np.sqrt(3 * 128), "fc2/kernel": 1 / np.sqrt(3 * 512),
    }  # fmt: skip
    for path, spread in expected.items():
        values = functools.reduce(lambda tree, name: tree[name], path.split("/"), p)
        np.testing.assert_allclose(np.std(values), spread, rtol=0.03, err_msg=path)
