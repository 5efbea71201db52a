"""Procedural defects in any image: where they are, that they can be seen, and what stays."""

import numpy as np
import pytest
from scipy import ndimage

from dsad.core.types import Record, Sample
from dsad.data.defective import KINDS, VISIBLE, Photo, WithDefects, with_defect


def photo(height=60, width=90, seed=0):
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.uniform(0, 1, (height, width, 3)), (3, 3, 0))
    return (255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)


class Photos:
    def __init__(self, count):
        names = [f"disc/{i}.png" for i in range(count)]
        self.records = [Record(path=n, category="disc", label=0, kind="good") for n in names]

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        image = photo(seed=index)
        mask = np.zeros(image.shape[:2], bool)
        return Sample(record=self.records[index], image=image, mask=mask)


def test_a_photo_is_its_pixels_in_its_window_and_mirrored_beyond():
    image = photo()
    scene = Photo(image, top=0, left=20, side=60)
    axis = ((np.arange(-10, 60) + 0.5) / 60).astype(np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    pixels = 255 * scene.colour(x, y)
    np.testing.assert_allclose(pixels[10:], image[:, 10:80], atol=2e-3)
    np.testing.assert_allclose(pixels[:10], image[9::-1, 10:80], atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_defect_can_be_seen_where_its_mask_is_and_nowhere_far_from_it(kind, seed):
    image = photo(seed=seed)
    made, mask = with_defect(image, kind, np.random.default_rng(seed))
    assert (made.shape, made.dtype, mask.shape, mask.dtype) == (
        (60, 90, 3),
        np.uint8,
        (60, 90),
        bool,
    )
    assert 0 < mask.mean() < 0.2
    change = np.abs(made.astype(int) - image).max(axis=-1)
    assert change[mask].mean() >= 255 * VISIBLE
    assert not change[~ndimage.binary_dilation(mask, iterations=8)].any()


def test_a_defect_of_structure_is_set_where_there_is_some():
    image = np.full((64, 64, 3), 255, np.uint8)
    image[20:44, 20:44] = photo(24, 24)
    for seed in range(5):
        made, mask = with_defect(image, "patch", np.random.default_rng(seed))
        assert np.abs(made.astype(int) - image)[mask].mean() >= 255 * VISIBLE
    flat = np.full((64, 64, 3), 255, np.uint8)
    made, mask = with_defect(flat, "patch", np.random.default_rng(0))  # there is no better place
    np.testing.assert_array_equal(made, flat)
    assert mask.any()


@pytest.mark.parametrize("kind", KINDS)
def test_grey_images_stay_grey(kind):
    grey = np.repeat(photo()[..., :1], 3, axis=-1)
    made, _ = with_defect(grey, kind, np.random.default_rng(1))
    np.testing.assert_array_equal(made, made[..., :1].repeat(3, axis=-1))
    assert (made != grey).any()


def test_every_image_as_it_is_and_with_a_defect():
    source = Photos(6)
    queries = WithDefects(source, seed=3)
    assert [r.label for r in queries.records] == [0, 1] * 6
    assert len({r.path for r in queries.records}) == len(queries) == 12
    assert {r.kind for r in queries.records[1::2]} == {f"procedural {k}" for k in KINDS}
    for i in range(6):
        clean, defective, again = (
            queries[2 * i],
            queries[2 * i + 1],
            WithDefects(source, 3)[2 * i + 1],
        )
        np.testing.assert_array_equal(clean.image, source[i].image)
        assert not clean.mask.any()
        assert defective.mask.any()
        np.testing.assert_array_equal(defective.image, again.image)
        np.testing.assert_array_equal(defective.mask, again.mask)
        assert (WithDefects(source, 4)[2 * i + 1].image != defective.image).any()
