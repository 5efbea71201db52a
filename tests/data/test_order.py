"""The endless order: permutations that never change, cut into batches and by process."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dsad.data.order import Order, permutation

PINNED = ([0, 2, 1, 5, 4, 3, 6, 7], [4, 2, 7, 3, 0, 6, 1, 5])


def sequence(order, batches):
    found = [order[b] for b in range(batches)]
    return [np.concatenate([f[name] for f in found]).tolist() for name in ("index", "epoch")]


def test_it_is_the_sequence_of_epochs():
    expected = [i for epoch in range(8) for i in permutation(3, epoch, 7).tolist()]
    for batch in (1, 4, 7, 20):
        index, epoch = sequence(Order(7, batch, 3, 0, 1), -(-40 // batch))
        assert index[:40] == expected[:40]
        assert epoch[:40] == [i // 7 for i in range(40)]


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_have_parts_of_every_batch(processes):
    whole = Order(7, 6, 3, 0, 1)
    parts = [Order(7, 6, 3, p, processes) for p in range(processes)]
    for b in (0, 1, 2, 11):
        for name, values in whole[b].items():
            pieces = np.concatenate([part[b][name] for part in parts])
            np.testing.assert_array_equal(pieces, values)


def test_epochs_and_seeds_differ():
    drawn = {permutation(seed, epoch, 50).tobytes() for seed in (0, 1, -1) for epoch in range(9)}
    assert len(drawn) == 27
    for epoch in range(9):
        assert sorted(permutation(1, epoch, 50).tolist()) == list(range(50))


def test_it_never_changes():
    """Written down once: runs are to go on with a later numpy."""
    assert permutation(0, 0, 8).tolist() == PINNED[0]
    assert permutation(7, 12, 8).tolist() == PINNED[1]


def test_every_place_is_as_likely():
    """2,000 epochs of 5 samples: 400 ± 18 times each sample at each place."""
    counts = np.zeros((5, 5), int)
    for epoch in range(2000):
        counts[np.arange(5), permutation(0, epoch, 5)] += 1
    assert (abs(counts - 400) < 90).all()


def test_threads_and_processes_see_the_same():
    order = Order(11, 4, 0, 0, 1)
    places = [(37 * i) % 400 for i in range(400)]  # more epochs than are kept, back and forth
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(order.__getitem__, places))
    again = pickle.loads(pickle.dumps(order))
    for place, batch in zip(places, found, strict=True):
        np.testing.assert_array_equal(batch["index"], again[place]["index"])


def test_far_positions():
    order = Order(1_281_167, 8192, 0, 0, 1)
    batch = order[10_000_000]
    assert batch["epoch"].tolist() == [(10_000_000 * 8192 + i) // 1_281_167 for i in range(8192)]
    assert batch["index"].dtype == batch["epoch"].dtype == np.int32
