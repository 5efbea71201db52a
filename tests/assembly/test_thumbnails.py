"""Thumbnails of a data set: which images are shown, and that defects are marked where they are."""

import io

import numpy as np
from PIL import Image

from dsad.assembly import thumbnails
from dsad.core.types import Record, Sample
from dsad.data.base import DataConfig, indexed
from tests.data import trees


def sample(mask, shape=(40, 60)):
    record = Record(path="a.png", category="c", label=1, kind="dent")
    return Sample(record=record, image=np.full((*shape, 3), 100, np.uint8), mask=mask)


def test_a_defect_of_one_pixel_is_ringed_where_it_is():
    mask = np.zeros((400, 600), bool)
    mask[100, 450] = True
    small = thumbnails.thumbnail(sample(mask, mask.shape), 60)
    assert small.size == (60, 40)
    changed = (np.asarray(small) != 100).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert {*rows} == set(range(8, 13))
    assert {*columns} == set(range(43, 48))


def test_images_without_defect_or_mask_are_left_as_they_are():
    for mask in (None, np.zeros((40, 60), bool)):
        assert np.asarray(thumbnails.thumbnail(sample(mask), 120)).std() == 0


def test_an_enlarged_mask_is_whole():
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:4] = True
    pixels = np.asarray(thumbnails.thumbnail(sample(mask, mask.shape), 60))
    assert (pixels[10:30, 20:40] != 100).any(axis=2).all()


def test_every_kind_of_every_category_comes_before_more_of_one(tmp_path):
    data = indexed(trees.mvtec(tmp_path))
    taken, left = thumbnails.chosen(data, 6)
    assert [(c.category, c.kind) for c in taken] == [
        (category, kind)
        for category in ("disc", "plate")
        for kind in ("test dent", "test good", "train good")
    ]
    assert left == "6 of 14 images"
    taken, left = thumbnails.chosen(data, 3)
    assert [(c.category, c.kind) for c in taken] == [
        ("disc", "test dent"), ("disc", "test good"), ("plate", "test dent"),
    ]  # fmt: skip
    assert left == "3 of 14 images and 3 of 6 kinds; config.data.categories chooses others"
    assert thumbnails.chosen(data) == (thumbnails.chosen(data, 60)[0], "")


def test_the_page_shows_what_cannot_be_read_and_long_names(tmp_path):
    config = trees.mvtec(tmp_path)
    (tmp_path / "disc/test/dent/000.png").write_bytes(b"")
    old = tmp_path / "disc/train/good/000.png"
    old.rename(old.with_name(f"{'ü' * 100}.png"))
    page, left = thumbnails.sheet(indexed(config))
    image = Image.open(io.BytesIO(page))
    assert left == ""
    assert image.width == thumbnails.COLUMNS * (thumbnails.SIDE + thumbnails.GAP) + thumbnails.GAP
    colours = {colour for _, colour in image.getcolors(1 << 24) or ()}
    assert (0xD8, 0xD8, 0xD8) in colours
    assert (255, 0, 70) in colours
    one = indexed(DataConfig(**{**vars(config), "categories": ("plate",)}))
    assert Image.open(io.BytesIO(thumbnails.sheet(one)[0])).height < image.height
