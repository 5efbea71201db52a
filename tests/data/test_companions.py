"""References of a sample: who they may be, and that a draw depends on nothing else."""

import numpy as np
import pytest
from scipy import stats

from dsad.core.batch import Companions
from dsad.core.types import Record
from dsad.data.companions import CompanionDraws

#: Two categories, three groups in each, every fourth sample anomalous; one category has no normal.
RECORDS = [
    Record(path=f"{i:03d}", category="ab"[i % 2], label=int(i % 4 == 3), kind="", group=str(i % 3))
    for i in range(60)
] + [Record(path="x", category="c", label=1, kind="", group="0")]
EVERY = np.arange(len(RECORDS), dtype=np.int32)


def draws(seed=0, epoch=0, index=EVERY, records=RECORDS, **asked):
    companions = Companions(**{"count": 4, **asked})
    return CompanionDraws(records, companions, seed)(index, np.full(len(index), epoch))


@pytest.mark.parametrize("same", [("category",), ("category", "group"), ("group",), ()])
@pytest.mark.parametrize("label", [0, 1, None])
def test_references_are_others_of_the_same_kind_each_once(same, label):
    made = draws(same=same, label=label)
    keys = ("category", "group") if "group" in same else same  # a group belongs to a category
    for i, record in enumerate(RECORDS):
        able = {
            j for j, other in enumerate(RECORDS)
            if j != i and label in (None, other.label)
            and all(getattr(other, key) == getattr(record, key) for key in keys)
        }  # fmt: skip
        chosen = made["index"][i][made["valid"][i]].tolist()
        assert len(chosen) == len(set(chosen)) == min(4, len(able))
        assert set(chosen) <= able
        assert (made["index"][i][~made["valid"][i]] == i).all()
    assert made["index"].dtype == np.int32


def test_a_category_without_a_normal_image_has_no_reference():
    assert not draws()["valid"][-1].any()


def test_a_draw_depends_on_seed_epoch_and_sample_alone():
    whole, order = draws(seed=3, epoch=2), np.random.default_rng(0).permutation(len(RECORDS))[:17]
    part = draws(seed=3, epoch=2, index=EVERY[order])
    np.testing.assert_array_equal(part["index"], whole["index"][order])
    for other in (draws(seed=4, epoch=2), draws(seed=3, epoch=1)):
        assert (other["index"] != whole["index"]).mean() > 0.5
    np.testing.assert_array_equal(whole["index"][0], [26, 10, 14, 38])  # on any machine


@pytest.mark.parametrize("count", [1, 3, 5])
def test_every_candidate_is_drawn_as_often_at_every_place(count):
    records = [Record(path=str(i), category="a", label=0, kind="good") for i in range(6)]
    epochs = np.arange(3000)
    made = CompanionDraws(records, Companions(count=count), 0)(np.full(3000, 2), epochs)["index"]
    seen = np.bincount(made.ravel(), minlength=6)
    assert seen[2] == 0
    if count < 5:
        assert stats.chisquare(seen[[0, 1, 3, 4, 5]]).pvalue > 1e-3
    assert len(set(map(tuple, np.sort(made, axis=1)))) == {1: 5, 3: 10, 5: 1}[count]
