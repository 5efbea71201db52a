"""Every variant of the configs of the two stages can be built; the tables reach the config."""

import itertools
import json

import pytest

from dsad.assembly import evaluate, pretrain
from dsad.core.errors import ConfigError
from dsad.terminal import flags

TABLES = json.loads((flags.config_directory() / "isstad_tables.json").read_text())
RELEASES = [(d, r) for d in TABLES if d not in ("about", "default") for r in TABLES[d]]
CORRUPTION = ("kind", "most_draw", "n_max", "limit_box", "remove_background")


def parsed(spec, *argv):
    """(run, objective) of a config of pretraining."""
    config, _, rest = flags.Command("x", "", config=f"configs/{spec}").parse(list(argv))
    assert not rest
    run, module, method = pretrain.parse(config)
    return run, method, module.__name__.rpartition(".")[2]


def refused(spec):
    with pytest.raises(ConfigError) as error:
        parsed(spec)
    return str(error.value)


# --- the first stage


SIZES = ("tiny", "base", "large", "huge")


@pytest.mark.parametrize("size", SIZES)
def test_mae_sizes(size):
    arch = f"mae_vit_{size}_patch{14 if size == 'huge' else 16}"
    for isstad in (False, True):
        run, method, name = parsed(f"mae.py:{size}{',isstad,bottle' if isstad else ''}")
        assert (name, method.encoder.arch) == ("mae", arch)
        assert run.data.categories == (("bottle",) if isstad else ())
        assert (run.batch_size, run.epochs) == ((20, 305.0) if isstad else (256, 800.0))
        assert method.decoder.depth == (6 if isstad else 8)
        assert (run.optim.name, run.optim.momentum, run.optim.b2) == ("adamw", 0.9, 0.95)


def test_mae_first_stage_of_isstad_as_published():
    """The rate rule 1e-3 · 20 / 256 gives the published 7.8e-5."""
    run, method, _ = parsed("mae.py:isstad,bottle")
    assert run.optim.lr * run.batch_size / run.optim.lr_batch == pytest.approx(7.8e-5, rel=2e-3)
    assert method.adopt_decoder == "leading"
    assert method.mask_ratio == 0.75
    assert not method.norm_pix


@pytest.mark.parametrize(
    ("variant", "size", "data", "categories"),
    [
        ("small", "tiny", "mvtec", ()),
        ("small,mtd", "tiny", "mtd:grouped", ()),
        ("mtd", "large", "mtd:grouped", ()),
        ("synthetic", "tiny", "synthetic", ()),
        ("smoke", "tiny", "synthetic", ()),
        # Any other word is a category: the data set, not the config, knows which there are.
        ("small,a,b", "tiny", "mvtec", ("a", "b")),
    ],
)
def test_mae_small_variants(variant, size, data, categories):
    run, method, _ = parsed(f"mae.py:{variant}")
    assert method.encoder.arch == f"mae_vit_{size}_patch16"
    assert (run.data.name, run.data.categories) == (data, categories)


@pytest.mark.parametrize("size", ["", "base", "large", "huge"])
def test_mae_imagenet(size):
    for pix in (False, True):
        words = ",".join(filter(None, (size, "norm_pix" if pix else "")))
        run, method, _ = parsed(f"mae_imagenet.py{':' if words else ''}{words}")
        patch = 14 if size == "huge" else 16
        assert method.encoder.arch == f"mae_vit_{size or 'large'}_patch{patch}"
        assert (method.norm_pix, method.dtype, method.remat) == (pix, "bfloat16", "dots")
        assert (run.data.name, run.data.cache, run.batch_size) == ("folder", "none", 4096)
        rate = run.optim.lr * run.batch_size / run.optim.lr_batch
        assert rate == pytest.approx(2.4e-3)
    text = refused("mae_imagenet.py:hug")
    assert "no variant 'hug'. Did you mean 'huge'? It has: base, huge, large, norm_pix" in text


# --- the second stage


@pytest.mark.parametrize(("dataset", "release"), RELEASES)
def test_isstad_rows_of_the_tables(dataset, release):
    words = [dataset] + (["ext"] if release == "ext" and dataset == "mvtec" else [])
    for category, own in TABLES[dataset][release].items():
        row = {**TABLES["default"], **own}
        for like, extra in itertools.product((False, True), ((), ("published",))):
            name = f"like_{category}" if like else category
            run, method, objective = parsed(f"isstad.py:{','.join((*words, *extra, name))}")
            assert objective == "isstad"
            assert {k: getattr(method.corruption, k) for k in CORRUPTION} == {
                k: row[k] for k in CORRUPTION
            }
            assert run.epochs == row["epochs"]
            assert run.data.categories == (() if like else (category,))
            assert method.corruption.label == ("mask" if extra else type(method.corruption)().label)
            assert (method.target, method.permute) == (
                ("input", "shuffle") if extra else ("clean", "none")
            )
        # VisA and MPDD have no other table than that of the second release.
        if release == "ext" and dataset != "mvtec":
            named, _, _ = parsed(f"isstad.py:{dataset},ext,{category}")
            assert named == parsed(f"isstad.py:{dataset},{category}")[0]


def test_isstad_without_a_set_takes_mvtec():
    assert parsed("isstad.py:carpet") == parsed("isstad.py:mvtec,carpet")
    assert parsed("isstad.py:carpet")[1] != parsed("isstad.py:ext,carpet")[1]


def test_isstad_as_published():
    run, method, _ = parsed("isstad.py")
    assert (run.batch_size, run.epochs, run.optim.lr, run.optim.lr_batch) == (16, 200.0, 1e-3, 0)
    assert (run.optim.schedule, run.optim.period_epochs) == ("periodic", 30.0)
    assert (method.encoder.arch, method.decoder.depth) == ("mae_vit_large_patch16", 12)
    assert (method.class_weights, method.reconstruction, method.similarity) == ((3, 1), 0.5, 0.1)
    assert (method.normalisation, method.ssim_range) == ("shared", "unit")
    _, quirks, _ = parsed("isstad.py:published")
    assert (quirks.normalisation, quirks.ssim_range) == ("published", "signed")
    assert method.corruption.facts == ("original_size", "foreground_box")
    assert quirks.corruption.facts == ("original_size", "foreground_box_published")


@pytest.mark.parametrize(
    "variant", ["small", "small,mtd", "mtd", "synthetic", "smoke", "small,bottle", "ext,small,grid",
                "small,mpdd,tubes"],
)  # fmt: skip
def test_isstad_small_variants_fit_the_first_stage(variant):
    run, method, _ = parsed(f"isstad.py:{variant}")
    first = ",".join(w for w in variant.split(",") if w not in ("ext", "mpdd"))
    before, mae, _ = parsed(f"mae.py:{first}")
    assert run.data.categories == before.data.categories
    assert run.data.name == before.data.name
    assert method.encoder == mae.encoder
    assert method.side == mae.view.side
    assert (method.decoder.width, method.decoder.heads) == (mae.decoder.width, mae.decoder.heads)
    assert method.decoder.depth >= mae.decoder.depth
    if variant == "small,mpdd,tubes":
        assert run.epochs == 40.0  # the table's 300 are those of the whole method


def test_isstad_refuses_what_it_does_not_know():
    text = refused("isstad.py:botle")
    assert "no variant or category of mvtec 'botle'. Did you mean 'bottle'?" in text
    for known in ("published", "smoke", "bottle", "zipper"):
        assert f" {known}, " in text or f" {known}." in text
    text = refused("isstad.py:visa,bottle")
    assert "or category of visa 'bottle'" in text
    assert " candle, " in text
    assert "like_bolt" in refused("isstad.py:like_bolt")
    assert "loco has no table 'ext'" in refused("isstad.py:loco,ext,pushpins")
    assert "expected one of" in refused("isstad.py:visa,mpdd,tubes")


# --- its detector


@pytest.mark.parametrize("dataset", ["mvtec", "visa", "mpdd"])
def test_the_detector_takes_the_exponents_of_the_second_release(dataset):
    config, _, _ = flags.Command("x", "", config=f"isstad_detector:{dataset}").parse([])
    cfg, detector = evaluate.parse(config)
    own = detector.config
    assert cfg.evaluation.image_size == 0  # the run tells its size
    assert (own.pixel, own.image) == ("product", "weighted")
    assert (own.q, own.a, own.b) == tuple(TABLES["default"][k] for k in "qab")
    rows = {name: values for name, *values in own.exponents}
    for category, entry in TABLES[dataset]["ext"].items():
        values = [{**TABLES["default"], **entry}[k] for k in "qab"]
        assert rows.pop(category, [own.q, own.a, own.b]) == values
    assert not rows
    assert all(row[1:] != (own.q, own.a, own.b) for row in own.exponents)


def test_the_detector_refuses_a_set_without_exponents():
    with pytest.raises(
        ConfigError, match=r"no variant 'loco'.*mpdd, mvtec, smoke, visa, weighted\."
    ):
        flags.Command("x", "", config="isstad_detector:loco").parse([])
