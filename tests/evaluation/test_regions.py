"""Regions: boxes, areas and peaks, against a search by hand."""

import numpy as np

from dsad.evaluation.regions import Region, regions


def test_regions_touch_at_corners_and_are_ordered_by_their_peak():
    scores = np.zeros((5, 8), np.float32)
    scores[0, 0], scores[1, 1] = 2, 3  # one, at corners
    scores[3:5, 4:7] = 5
    scores[4, 6] = 7
    scores[0, 7] = 1  # not above
    assert regions(scores, 1.0) == (
        Region(box=(4, 3, 7, 5), area=6, peak=7.0, at=(6, 4)),
        Region(box=(0, 0, 2, 2), area=2, peak=3.0, at=(1, 1)),
    )
    assert regions(scores, 7.0) == ()


def test_a_region_inside_the_box_of_another_keeps_its_own_pixels():
    ring = np.zeros((7, 7), np.float32)
    ring[[0, 6], :] = ring[:, [0, 6]] = 1
    ring[3, 3] = 9
    inner, outer = regions(ring, 0.5)
    assert (inner.area, inner.box, inner.at) == (1, (3, 3, 4, 4), (3, 3))
    assert (outer.area, outer.box, outer.peak) == (24, (0, 0, 7, 7), 1.0)


def test_regions_cover_what_is_above():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 30)).astype(np.float32)
    found = regions(scores, 1.0)
    assert sum(r.area for r in found) == (scores > 1).sum()
    assert found[0].peak == scores.max()
    assert all(scores[r.at[1], r.at[0]] == np.float32(r.peak) for r in found)
