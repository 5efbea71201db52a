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
import pathlib

import numpy as np
import pytest

from dsad.core.config import members
from dsad.core.errors import ConfigError
from dsad.core.types import Dataset
from dsad.data import about, deeppcb, mtd, realiad, records_builder, visa
from dsad.data.base import DataConfig, load
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


#: Published images of all categories, as the papers and archives say in all.
TOTALS = {
    "mvtec": (3629, 467, 1258, 73), "mvtec_ad2": (2528, 302, 379, 705, 2045, 2045),
    "mvtec_loco": (1778, 305, 575, 561, 432), "mvtec_3d": (2656, 294, 249, 948),
    "mpdd": (888, 176, 282), "btad": (1799, 451, 290), "visa": (8659, 962, 1200),
    "ksdd": (347, 52), "ksdd2": (2085, 246, 894, 110), "dagm": (7004, 1046, 6996, 1054),
    "mtd": (1344,), "deeppcb": (1000, 500, 500), "dtd": (47, 5640), "imagenet": (1000, 1_281_167),
    "realiad": (36_465, 114_585, 51_329), "realiad_variety": (19_955, 178_995),
    "autovi": (1523, 1521, 878, 12), "adam3d": (), "kaputt": (),
}  # fmt: skip


def test_published_counts_sum_up_to_the_published_totals():
    assert {name: tuple(a.totals.values()) for name, a in about.every().items()} == TOTALS
    setups = {
        s: tuple(map(sum, zip(*visa.published(s).values(), strict=True))) for s in visa.SETUPS
    }
    assert setups == {
        "": (8659, 0, 962, 1200), "highshot": (5773, 720, 3848, 480),
        "fewshot": (1924, 240, 7697, 960),
    }  # fmt: skip
    single = realiad.PUBLISHED["single"]
    assert (single.train, single.test, single.bad) == (10_408, 19_802, 9_415)
    assert realiad.PUBLISHED[""].unseen == 26_881
    boxes = {name: sum(kinds) for name, (_, kinds) in deeppcb.PUBLISHED.items()}
    assert boxes == {"trainval": 6873, "test": 3140}
    assert mtd.COUNTS["Free"] == 952 == sum(mtd.RANDOM_SIZES) + 1


#: Licences, or what is asked where there is none, that are not CC BY-NC-SA 4.0.
OTHER_LICENCES = {
    "visa": "CC BY 4.0", "mtd": "none stated; citation asked", "deeppcb": "research only",
    "dtd": "research use", "imagenet": "research only", "kaputt": "CC BY-NC-ND 4.0",
    "dagm": "see the owner's page", "realiad_variety": "not verified",
}  # fmt: skip


def test_licences():
    for name, item in about.every().items():
        assert OTHER_LICENCES.get(name, "CC BY-NC-SA 4.0") in item.licence, name


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


def test_the_root_of_a_published_set_is_recognised(config):
    module, known = config.name.partition(":")[0], about.every()
    found = about.recognised(pathlib.Path(config.root))
    if module not in known or module == "mvtec":
        assert not found
        return
    others = {name for name in found if known[name].marks != known[module].marks}
    assert found.keys() - others == {n for n in known if known[n].marks == known[module].marks}
    assert others <= {"realiad", "realiad_variety"}  # both have their images in OK/S0001
    for wrong in {"mvtec", "folder", "btad", "visa"} - {module}:
        if wrong == "folder" and known[module].masks == "none":
            continue  # all of its images are normal
        with pytest.raises(ConfigError, match=f"name: expected .*{module}.* holds .* shows"):
            load(DataConfig(name=wrong, root=config.root))


def test_unknown_names(data):
    with pytest.raises(ConfigError, match="no split"):
        data.source("nothing_like_this")
    with pytest.raises(ConfigError, match="no category"):
        data.source("train", "nothing_like_this")
