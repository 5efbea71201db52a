"""First-neighbour clustering against its definition and on blobs."""

import itertools

import numpy as np
import pytest

from dsad.core.errors import ConfigError
from dsad.ops.finch import components, finch, first_neighbours, normalised, prototypes


def blobs(seed=0, count=40):
    """Unit rows around five directions 60 degrees and more apart, and the blob of each."""
    rng = np.random.default_rng(seed)
    centres = np.eye(8)[:5]
    blob = rng.integers(0, 5, count)
    return normalised(centres[blob] + 0.05 * rng.standard_normal((count, 8))), blob


def same(a, b):
    """Whether two labellings are one partition."""
    return np.array_equal(a[:, None] == a[None], b[:, None] == b[None])


def test_first_neighbours_are_the_largest_cosines():
    for count in (2, 3, 40, 64, 65):
        rows = normalised(np.random.default_rng(count).standard_normal((count, 8)))
        cosine = np.float64(rows) @ np.float64(rows).T - 3 * np.eye(count)
        np.testing.assert_array_equal(first_neighbours(rows), cosine.argmax(axis=1))


def test_duplicates_are_neighbours_of_each_other():
    rows = normalised(np.repeat(np.eye(8)[:3], [1, 5, 2], axis=0))
    found = first_neighbours(rows)
    assert (found != np.arange(8)).all()
    assert ((found[1:6] >= 1) & (found[1:6] <= 5)).all()
    assert found[6:].tolist() == [7, 6]


def test_components_follow_the_three_rules():
    """Linked: i is j's neighbour, j is i's, or both have the same; then the closure."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        nn = np.array([rng.choice(np.delete(np.arange(12), i)) for i in range(12)])
        linked = np.eye(12, dtype=bool)
        for i, j in itertools.product(range(12), repeat=2):
            linked[i, j] |= nn[i] == j or nn[j] == i or nn[i] == nn[j]
        for _ in range(12):
            linked = linked @ linked
        labels = components(nn)
        np.testing.assert_array_equal(linked, labels[:, None] == labels[None])
        assert np.bincount(labels).min() >= 2


def test_levels_of_blobs():
    rows, blob = blobs()
    levels = list(finch(rows))
    counts = [len(level.means) for level in levels]
    assert counts[-1] == 1
    assert all(b <= a / 2 for a, b in itertools.pairwise([40, *counts]))
    finest = levels[0].labels
    assert np.bincount(finest).min() >= 2
    assert all(len(np.unique(blob[finest == c])) == 1 for c in np.unique(finest))
    for a, b in itertools.pairwise(levels):  # a level merges whole clusters of the one before
        assert len({(x, y) for x, y in zip(a.labels, b.labels, strict=True)}) == len(a.means)
    for level in levels:
        for c, mean in enumerate(level.means):
            expected = np.float64(rows[level.labels == c]).mean(axis=0)
            np.testing.assert_allclose(mean, expected / np.linalg.norm(expected), atol=1e-6)


def test_partition_does_not_depend_on_the_order():
    rows, _ = blobs(1)
    order = np.random.default_rng(2).permutation(len(rows))
    for a, b in zip(finch(rows), finch(rows[order]), strict=True):
        assert same(a.labels[order], b.labels)


def test_prototypes_by_level_and_cap():
    rows, _ = blobs()
    counts = [len(level.means) for level in finch(rows)]
    assert prototypes(rows, 0) is rows
    assert [len(prototypes(rows, i + 1)) for i in range(len(counts))] == counts
    assert len(prototypes(rows, 99)) == 1
    assert len(prototypes(rows, 0, most=counts[0])) == counts[0]
    assert len(prototypes(rows, 1, most=counts[0] - 1)) == counts[1]
    assert len(prototypes(rows[:1], 1)) == 1
    with pytest.raises(ConfigError, match="at least 2 rows, found 1"):
        first_neighbours(rows[:1])
