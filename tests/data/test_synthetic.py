"""The procedural data set: deterministic, exact masks, resolution independent, not trivial."""

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from dsad.core.errors import ConfigError
from dsad.data import synthetic
from dsad.data.base import DataConfig, SyntheticConfig, load
from dsad.data.checks import check

DEMO, DEVELOPMENT = "synthetic", "synthetic:development"
both = pytest.mark.parametrize("name", [DEMO, DEVELOPMENT])


def made(name=DEMO, **kwargs):
    return load(DataConfig(name=name, synthetic=SyntheticConfig(**kwargs)))


@pytest.mark.parametrize(
    ("name", "categories", "kinds"),
    [
        (DEMO, ("speckle", "tiles", "washer", "weave", "wood"), {"scratch", "spot", "stain"}),
        (DEVELOPMENT, ("board", "knit", "leather", "sheet"), {"absent", "blur", "crack", "fold"}),
    ],
)
def test_counts(name, categories, kinds):
    data = made(name, size=16, train=3, good=2, bad=1)
    assert data.categories == categories
    assert data.name == data.protocol["dataset"] == name
    assert len(data.source("train")) == 3 * len(categories)
    for category in data.categories:
        test = data.source("test", category).records
        assert sum(r.kind == "good" for r in test) == 2
        assert {r.kind for r in test} >= {"good", *kinds}
        assert sum(r.label for r in test) == len({r.kind for r in test}) - 1


def test_development_shares_nothing_with_the_demo():
    """Neither category nor kind: what is chosen there is chosen without these."""
    demo, development = (made(name, size=16, train=1, bad=1) for name in (DEMO, DEVELOPMENT))
    assert not set(demo.categories) & set(development.categories)
    kinds = [{r.kind for r in data.source("test").records} for data in (demo, development)]
    assert kinds[0] & kinds[1] == {"good"}


@both
def test_image_depends_on_neither_count_nor_order(name):
    small, large = made(name, size=32, train=2, bad=1), made(name, size=32, train=5, bad=3)
    for split in ("train", "test"):
        few, many = small.source(split), large.source(split)
        place = {r.path: i for i, r in enumerate(many.records)}
        for i in reversed(range(len(few))):
            twin = many[place[few.records[i].path]]
            np.testing.assert_array_equal(few[i].image, twin.image)
            np.testing.assert_array_equal(few[i].mask, twin.mask)


@both
def test_images_and_seeds_differ(name):
    data, other = (made(name, size=32, train=4, bad=2, seed=seed) for seed in (0, 1))
    for split in ("train", "test"):
        images = [s.image.tobytes() for s in data.source(split)]
        images += [s.image.tobytes() for s in other.source(split)]
        assert len(set(images)) == len(images)


@both
def test_masks_are_exact(name):
    """Against the defect-free twin: changed inside the mask, unchanged away from it."""
    config = SyntheticConfig(size=96, bad=3, good=1, train=1)
    source = load(DataConfig(name=name, synthetic=config)).source("test")
    for sample in source:
        twin = synthetic.render(sample.record, config, clean=True)
        change = np.abs(sample.image.astype(int) - twin.image).max(-1)
        if sample.record.label == 0:
            assert not sample.mask.any()
            assert not change.any()
            continue
        assert 8 <= sample.mask.sum() <= 0.12 * sample.mask.size
        # Shadow and bevel of lost metal reach 5 % of the side, soft borders less.
        reach = 6 if sample.record.kind == "missing" else 3
        away = ~scipy.ndimage.binary_dilation(sample.mask, np.ones((3, 3)), reach)
        assert change[away].max() == 0, sample.record.path
        assert change[sample.mask].mean() > 4, sample.record.path


@both
def test_another_size_shows_the_same_scene(name):
    small, large = (made(name, size=size, train=1, good=1, bad=1) for size in (64, 128))
    for a, b in zip(small.source("test"), large.source("test"), strict=True):
        shrunk = np.asarray(Image.fromarray(b.image).resize((64, 64), Image.Resampling.BOX))
        likeness = np.corrcoef(a.image.ravel(), shrunk.ravel())[0, 1]
        assert likeness > 0.85, a.record.path
        if a.mask.any():
            shared = b.mask[::2, ::2] | b.mask[1::2, 1::2]
            assert (a.mask & shared).sum() > 0.5 * min(a.mask.sum(), shared.sum()), a.record.path


@pytest.mark.parametrize(("name", "category"), [(DEMO, "weave"), (DEVELOPMENT, "knit")])
def test_grey_level_statistics_do_not_find_the_defects(name, category):
    """Neither mean nor spread of the whole image tells good from bad."""
    source = made(name, size=64, train=1, good=12, bad=3).source("test", category)
    label = np.asarray([r.label for r in source.records])
    for statistic in (np.mean, np.std):
        score = np.asarray([statistic(s.image) for s in source])
        wins = (score[label == 1][:, None] > score[label == 0]).mean()
        assert 0.1 < wins < 0.9


@both
def test_check_finds_nothing(name):
    config = SyntheticConfig(size=64, train=2, good=1, bad=2)
    assert check(DataConfig(name=name, synthetic=config)).ok


def test_refused_configs():
    with pytest.raises(
        ConfigError, match=r"data.synthetic.size: expected an integer >= 16, found 4"
    ):
        SyntheticConfig(size=4)
    with pytest.raises(
        ConfigError, match=r"data.synthetic.train: expected an integer >= 1, found 0"
    ):
        SyntheticConfig(train=0)
    with pytest.raises(ConfigError, match=r"wool not found\. Did you mean 'wood'"):
        load(DataConfig(categories=("wool",)))
    with pytest.raises(ConfigError, match=r"categories: .*once \(a flag given twice.*wood.*wood"):
        load(DataConfig(categories=("wood", "tiles", "wood")))
    with pytest.raises(ConfigError, match=r"wood not found.*has: board, knit, leather, sheet"):
        load(DataConfig(name=DEVELOPMENT, categories=("wood",)))
    for name in ("synthetic:developmnt", "synthetic:"):
        with pytest.raises(ConfigError, match=f"one of synthetic, {DEVELOPMENT}; found '{name}'"):
            load(DataConfig(name=name))
    with pytest.raises(ConfigError, match=r"no data named 'synthetc'"):
        load(DataConfig(name="synthetc"))
