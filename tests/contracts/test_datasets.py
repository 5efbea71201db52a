"""What every member of dsad.data promises, whatever its source.

A member ``dsad/data/NAME.py`` needs ``tests/contracts/datasets/NAME.py`` with
``small(name, root)``, which writes a small instance below ``root`` and returns its DataConfig.
``NAMES`` are the names under which it is loaded, where these are not its own;
``HAS_TEST = False`` says that it is for pretraining alone, ``LABELLED_TRAIN`` under which names
its training has labelled defects; ``MASKED = False`` that its defects have no masks, ``FILES =
False`` that its images are no files.
"""

import dataclasses
import importlib

import numpy as np
import pytest

from dsad.core.config import members
from dsad.core.errors import ConfigError
from dsad.core.types import Dataset
from dsad.data import about, records_builder
from dsad.data.base import load
from dsad.data.checks import check

CASES = {m: importlib.import_module(f"tests.contracts.datasets.{m}") for m in members("data")}
NAMES = {n: case for m, case in CASES.items() for n in getattr(case, "NAMES", (m,))}


@pytest.fixture(params=NAMES)
def config(request, tmp_path):
    return NAMES[request.param].small(request.param, tmp_path)


@pytest.fixture
def data(config):
    return load(config)


def test_members():
    assert set(members("data")) >= {"folder", "mvtec", "mtd", "synthetic"}


def test_protocol_of_the_numbers(data):
    assert isinstance(data, Dataset)
    needed = {"dataset", "split", "split_hash", "licence", "missing_masks", "canvas_crop"}
    assert needed <= data.protocol.keys()
    assert data.protocol["canvas_crop"] == "none"
    assert len(data.protocol["split_hash"]) == 16
    assert list(data.categories) == sorted(set(data.categories))


def test_training_is_normal_and_disjoint_from_test(config, data):
    train, test = data.source("train").records, data.source("test").records
    assert len(train) > 0
    labelled = config.name in getattr(NAMES[config.name], "LABELLED_TRAIN", ())
    assert {r.label for r in train} == ({0, 1} if labelled else {0})
    has_test = getattr(NAMES[config.name], "HAS_TEST", True)
    assert {r.label for r in test} == ({0, 1} if has_test else set())
    assert not {r.path for r in train} & {r.path for r in test}


def test_samples_match_their_records(config, data):
    masked = getattr(NAMES[config.name], "MASKED", True)
    for split in ("train", "test"):
        source = data.source(split)
        assert len(source) == len(source.records)
        for i, record in enumerate(source.records):
            sample = source[i]
            assert sample.record == record
            assert (record.kind == "good") == (record.label == 0)
            assert bool(record.masks) == (record.label == 1 and masked)
            assert sample.image.dtype == np.uint8
            assert sample.image.ndim == 3
            assert sample.image.shape[2] == 3
            assert (sample.mask is None) == (record.label == 1 and not masked)
            if sample.mask is None:
                continue
            assert sample.mask.dtype == bool
            assert sample.mask.shape == sample.image.shape[:2]
            assert sample.mask.any() == bool(record.label)
        with pytest.raises(IndexError):
            source[len(source)]


def test_categories_partition_a_split(data):
    for split in ("train", "test"):
        whole = [r.path for r in data.source(split).records]
        parts = [r.path for c in data.categories for r in data.source(split, c).records]
        assert whole == sorted(whole)
        assert sorted(parts) == whole
        for category in data.categories:
            found = {r.category for r in data.source(split, category).records}
            assert found == ({category} if whole else set())


def test_loading_twice_gives_the_same(config, data):
    again = load(config)
    assert again.protocol == data.protocol
    for split in ("train", "test"):
        for a, b in zip(data.source(split), again.source(split), strict=True):
            assert a.record == b.record
            np.testing.assert_array_equal(a.image, b.image)
            np.testing.assert_array_equal(a.mask, b.mask)


def test_one_category_alone(config, data):
    first = data.categories[0]
    alone = load(dataclasses.replace(config, categories=(first,)))
    assert alone.categories == (first,)
    for split in ("train", "test"):
        assert alone.source(split).records == data.source(split, first).records
    with pytest.raises(ConfigError, match="nothing_like_this not found"):
        load(dataclasses.replace(config, categories=("nothing_like_this",)))


def test_check_covers_every_category(config, data):
    report = check(config)
    assert report.ok
    assert [row.category for row in report.rows] == list(data.categories)
    assert sum(row.train for row in report.rows) == len(data.source("train"))


def test_prepared_is_the_same(config, data, tmp_path):
    """To the last bit, in every split."""
    if not getattr(NAMES[config.name], "FILES", True):
        with pytest.raises(ConfigError, match="are no files to copy"):
            records_builder.plan(data)
        return
    records_builder.write(records_builder.plan(data), str(tmp_path / "prepared"))
    root = str(tmp_path / "prepared")
    kept = dataclasses.replace(config, name="records", root=root, normal="", abnormal="", masks="")
    made = load(kept)
    assert (made.name, made.categories) == (data.name, data.categories)
    assert made.protocol == data.protocol
    assert made.splits == data.splits
    for split in data.splits:
        source = data.source(split)
        assert list(made.source(split).records) == list(source.records)
        for i, sample in enumerate(made.source(split)):
            assert sample.record == source[i].record
            np.testing.assert_array_equal(sample.image, source[i].image)
            np.testing.assert_array_equal(sample.mask, source[i].mask)
            if sample.record.masks:
                assert made.source(split).encoded_masks(i) == source.encoded_masks(i)
    assert check(kept).rows == check(config).rows


def test_every_split_is_sorted_and_apart(config, data):
    mixed = {"test"}
    if config.name in getattr(NAMES[config.name], "LABELLED_TRAIN", ()):
        mixed.add("train")
    paths = [r.path for split in data.splits for r in data.source(split).records]
    assert len(set(paths)) == len(paths)
    for split in data.splits:
        records = data.source(split).records
        assert [r.path for r in records] == sorted(r.path for r in records)
        labels = {r.label for r in records}
        assert labels <= ({0, 1} if split in mixed else {0}) or labels == {-1}


def test_what_is_known_of_published_sets():
    known = about.every()
    assert set(known) == set(members("data")) - set(about.UNPUBLISHED)
    for item in known.values():
        assert item.title
        assert item.licence
        assert item.citation
        assert item.masks
        assert item.protocols
        rows = [*item.counts.values(), *item.also.values()]
        assert all(len(row) == len(item.columns) for row in rows)
        assert item.also.keys() <= item.counts.keys()


def test_unknown_names(data):
    with pytest.raises(ConfigError, match="no split"):
        data.source("nothing_like_this")
    with pytest.raises(ConfigError, match="no category"):
        data.source("train", "nothing_like_this")
