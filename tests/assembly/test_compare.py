"""A comparison of small evaluations: found faults, features once, going on, what may change."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from dsad.assembly import compare as module
from dsad.assembly import comparison, comparison_cells, evaluate, runs
from dsad.assembly.compare import compare, prepare
from dsad.cli import main
from dsad.core import paths
from dsad.core.errors import ConfigError, DsadError, MetricError, WorkdirError
from dsad.core.types import silent
from dsad.evaluation import compared
from dsad.evaluation.compared import Baseline
from dsad.evaluation.extract import Extractor
from dsad.models import wrappers
from dsad.terminal import console, flags
from tests.backbones import Plain
from tests.seams.wrappers.away import KIND

IMAGES = 3 + 1 + 5  # training, good and bad ones


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Small(Plain):
    """Three maps with the names of a ResNet's, in no time."""

    weight: jax.Array

    def maps(self, images):
        b, h, w, c = images.shape
        made = {}
        for stage, side in enumerate((4, 8, 16), start=1):
            cells = images.reshape(b, h // side, side, w // side, side, c)
            parts = [cells.mean((2, 4)), cells.max((2, 4)), cells.min((2, 4))]
            made[f"layer{stage}"] = self.weight * jnp.concatenate(parts, -1)
        return made


@pytest.fixture
def small(monkeypatch):
    """In the place of any network."""

    def backbone(spec, weights, seed):
        drawn = runs.random_seed(weights, seed)
        return Small(jnp.float32(1 + drawn), description=f"random, seed {drawn}")

    monkeypatch.setattr(runs, "backbone", backbone)


def config(**changes):
    """Two detectors of other layers on one untrained network, raw and behind a wrapper."""
    made = comparison.default_config()
    made.detectors = ("knn", "padim")
    made.settings = {"padim": {"detector": {"channels": 8}}}
    rows = {"raw": "resnet18", "away": "away:resnet18"}
    entries = {name: comparison.backbone(spec, "random") for name, spec in rows.items()}
    entries["away"]["layers"] = ("layer2",)
    made.backbones = comparison.in_order(entries)
    made.datasets = {"tiles": comparison.dataset("synthetic", categories=("tiles",))}
    made.datasets.tiles.synthetic.update(size=48, train=3, good=1, bad=1)
    made.evaluation.update(image_size=32, batch_size=8, gallery=0, workers=1)
    for key, value in changes.items():
        made[key] = value
    return made.lock()


@pytest.fixture(autouse=True)
def away(monkeypatch):
    monkeypatch.setitem(wrappers.KINDS, "away", KIND)


def run(made, folder, **given):
    checked = prepare(made, str(folder), console.console(), **given)
    return compare(checked, str(folder), console.console(), made.to_dict())


@pytest.fixture
def seen(monkeypatch):
    """Calls of networks, of which each has the training or the test images, at most 8."""
    counts, call = [], Extractor.__call__

    def counting(self, images):
        counts.append(images.shape)
        return call(self, images)

    monkeypatch.setattr(Extractor, "__call__", counting)
    return counts


def test_every_image_passes_a_network_once_and_a_stopped_comparison_goes_on(
    tmp_path, small, seen, monkeypatch, capsys
):
    asked, localize = [], module.evaluate.evaluate

    def stopping(parts, *given, name, **more):
        asked.append(name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return localize(parts, *given, name=name, **more)

    monkeypatch.setattr(module.evaluate, "evaluate", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(config(), tmp_path)
    half = compared.read(tmp_path)
    assert half["left"] == ["tiles/away/knn", "tiles/away/padim"]
    assert "2/4  tiles/raw/padim, about" in capsys.readouterr().out
    del asked[:]
    asked.extend(["", "", ""])
    content = run(config(), tmp_path)
    assert asked[3:] == ["tiles/away/knn", "tiles/away/padim"]
    assert content["complete"]
    assert len(seen) == 2  # of four evaluations
    assert len(list((tmp_path / "features").glob("*/*.features"))) == IMAGES
    rows = content["datasets"]["tiles"]["rows"]
    assert [(r["backbone"], r["detector"]) for r in rows] == [
        ("raw", "knn"), ("raw", "padim"), ("away", "knn"), ("away", "padim"),
    ]  # fmt: skip
    assert rows[2]["against"] == "raw/knn"
    mark = json.loads((tmp_path / "tiles/away/padim/results.json").read_text())["stamp"]
    assert mark["map_wrappers"] == ["away"]
    # The same command does nothing.
    assert run(config(), tmp_path) == content
    assert len(asked) == 5
    # The numbers are those of an evaluation by itself.
    alone = prepare(config(), str(tmp_path), console.console()).cells[3].config
    alone.evaluation.update(feature_cache="", cache_layers=())
    parts = module.evaluate.prepare(alone, console.console())
    found = module.evaluate.localized(parts, silent)
    assert {m: spread["mean"] for m, spread in rows[3]["numbers"].items()} == found.mean
    seen[2:] = []
    one = json.loads((tmp_path / "tiles/raw/knn/config.json").read_text())
    assert one["command"] == "evaluate"
    assert one["config"]["evaluation"]["cache_layers"] == ["layer2", "layer3", "layer1"]
    # Another detector is measured on the features that are there, more rows change nothing.
    grown = config(detectors=("knn,padim", "protoad"), skip=("*/away/protoad",))
    assert run(grown, tmp_path)["complete"]
    assert asked[5:] == ["tiles/raw/protoad"]
    assert len(seen) == 2
    # What has other settings now is named, and measured again on request.
    changed = config(settings={"padim": {"detector": {"channels": 9}}})
    with pytest.raises(ConfigError) as error:
        run(changed, tmp_path)
    assert "tiles/raw/padim, tiles/away/padim:\n" in str(error.value)
    assert "config.detector.channels: 8 → 9" in str(error.value)
    assert "knn" not in str(error.value)
    run(changed, tmp_path, overwrite=True)
    assert asked[6:] == ["tiles/raw/padim", "tiles/away/padim"]
    assert len(seen) == 2
    assert main.main(["report", str(tmp_path)]) == 0
    assert "<h2>tiles</h2>" in (tmp_path / "report.html").read_text()


def test_numbers_of_shots_share_the_features_and_more_may_follow(
    tmp_path, small, seen, monkeypatch, capsys
):
    own = {"musc": {"detector": {"layers": ("layer2",), "similar": "mean"}}}
    given = {
        "detectors": ("knn", "musc"), "settings": own, "seeds": (0, 1),
        "skip": ("*/away/1-shot/*", "*/away/musc"),
    }  # fmt: skip
    made = config(**given, shots=(1, 0))
    checked = prepare(made, str(tmp_path), console.console())
    titles = ["tiles/raw/1-shot/knn", "tiles/raw/knn", "tiles/raw/musc", "tiles/away/knn"]
    assert [cell.title for cell in checked.cells] == [cell.folder for cell in checked.cells]
    assert [cell.title for cell in checked.cells] == titles
    assert [cell.config.shots for cell in checked.cells] == [1, 0, 0, 0]
    assert [cell.shots for cell in checked.cells] == [1, "all", "none", "all"]
    told = "musc: is fitted on the test images and takes no training image; measured once, as 0-"
    assert checked.notes == [f"{told}shot, not with config.shots = 1, 0"]
    content = compare(checked, str(tmp_path), console.console(), made.to_dict())
    images = sum(shape[0] for shape in seen)
    features = set((tmp_path / "features").glob("*/*.features"))
    assert len(features) == IMAGES
    support = json.loads((tmp_path / "tiles/raw/1-shot/knn/results.json").read_text())["support"]
    assert {own["images"] for own in support["tiles"].values()} == {1}
    rows = content["datasets"]["tiles"]["rows"]
    assert [(r["backbone"], r["detector"], r["shots"]) for r in rows] == [
        ("raw", "knn", 1), ("raw", "knn", "all"), ("raw", "musc", "none"), ("away", "knn", "all"),
    ]  # fmt: skip
    assert rows[3]["against"] == "raw/knn"
    # Another number is measured on the features that are there, and nothing else again.
    capsys.readouterr()
    asked, evaluate = [], module.evaluate.evaluate
    monkeypatch.setattr(
        module.evaluate,
        "evaluate",
        lambda *a, name, **k: asked.append(name) or evaluate(*a, name=name, **k),
    )
    run(config(**given, shots=(2, 1, 0)), tmp_path)
    assert asked == ["tiles/raw/2-shot/knn", "tiles/away/2-shot/knn"]
    assert sum(shape[0] for shape in seen) == images
    assert main.main(["report", str(tmp_path)]) == 0
    assert '<th class="edge">2-shot</th>' in (tmp_path / "report.html").read_text()


def test_one_number_of_shots_and_settings_of_a_backbone():
    own = {"padim": {"detector": {"channels": 8}}, "away/padim": {"detector": {"channels": 5}}}
    plan = comparison.parse(config(shots=4, settings=own))
    cells = comparison_cells.cells_of(plan, "features", comparison_cells.Faults())
    assert {cell.config.shots for cell in cells} == {4}
    assert [c.config.detector.get("channels") for c in cells] == [None, 8, None, 5]
    with pytest.raises(ConfigError, match=r"config.settings: no detector other/padim"):
        comparison.parse(config(settings={"other/padim": {}}))
    # Fewer detectors may be asked for than a file has settings of, but not other backbones.
    for name in ("padim", "away/padim", "musc"):
        assert comparison.parse(config(detectors=("knn",), settings={name: {}})).settings
    for name, key in (("padim", "seed"), ("away/padim", "detector")):
        faults = comparison_cells.Faults()
        plan = comparison.parse(config(settings=own | {name: {key: {"nothing": 1}}}))
        comparison_cells.cells_of(plan, "features", faults)
        assert f"config.settings.{name}: " in str(faults)
    for wrong in ((), (1, 1), (1, -1), "4"):
        with pytest.raises(ConfigError, match="config.shots"):
            comparison.parse(config(shots=wrong))


def test_licences_come_with_the_backbones(tmp_path, small):
    made = config(detectors=("knn",))
    made.backbones.away.licence = "MIT"
    found = prepare(made, str(tmp_path), console.console()).licences
    assert found == {"raw": ("none (untrained)", True), "away": ("MIT", True)}


def test_a_network_for_each_seed(tmp_path, small, monkeypatch):
    calls = []

    def faked(parts, path, out, *, name):
        calls.append((name, parts.config.seeds, parts.config.weights, parts.config.seed))
        raise MetricError("scores are not finite")

    monkeypatch.setattr(module.evaluate, "evaluate", faked)
    made = config(detectors=("knn",), seeds=(3, 5))
    made.backbones.raw.weights = "random:{seed}"
    checked = prepare(made, str(tmp_path), console.console())
    folders = ["tiles/raw/knn/seed3", "tiles/raw/knn/seed5", "tiles/away/knn"]
    assert [cell.folder for cell in checked.cells] == folders
    with pytest.raises(DsadError, match=r"^tiles/raw/knn/seed3: scores are not finite"):
        compare(checked, str(tmp_path), console.console(), made.to_dict())
    assert calls == [("tiles/raw/knn/seed3", (3,), "random:3", 0)]
    assert [c.config.seeds for c in checked.cells] == [(3,), (5,), (3, 5)]
    # float32 maps of 9 channels of three networks, layer2 of all of them and layer3 of two
    assert checked.bytes == IMAGES * 4 * 9 * (3 * 4 * 4 + 2 * 2 * 2)


def test_all_faults_are_told_at_once_and_nothing_is_touched(tmp_path):
    made = config(detectors=("knn", "nearest"), skip=("good/*", "wide/away/*"))
    made.backbones = comparison.in_order({
        "raw": comparison.backbone("resnet18", "random"),
        "lost": "run:runs/none", "deep": comparison.backbone("resnet18", "random", ["layer9"]),
        "resnet19": comparison.backbone("resnet19", "random"),
    })  # fmt: skip
    made.datasets = {
        "tiles": made.datasets.tiles.copy_and_resolve_references(),
        "gone": comparison.dataset("mvtec", root=str(tmp_path / "none")),
    }
    with pytest.raises(ConfigError) as error:
        prepare(made, str(tmp_path / "out"), console.console())
    text = str(error.value)
    assert text.startswith("dsad compare: nothing was computed, because of")
    for told in (
        "gone/raw/knn", "no file 'nearest'", "runs/none: no dsad run there",
        "no feature map layer9", "no backbone named 'resnet19'",
    ):  # fmt: skip
        assert told in text, told
    assert text.count("'nearest'") == 1
    # Keys are those of a comparison.
    made.backbones.raw.weights = ""
    made.datasets.gone.root = ""
    with pytest.raises(ConfigError) as error:
        prepare(made, str(tmp_path / "out"), console.console())
    assert "config.backbones.raw.weights: resnet18 needs some" in str(error.value)
    assert "Set it with --config.datasets.gone.root=DIR" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_numbers_of_one_table_mean_the_same(tmp_path, small):
    made = config(settings={"padim": {"evaluation": {"image_size": 48}}})
    with pytest.raises(ConfigError, match=r"preprocessing.height: 32 against 48") as error:
        prepare(made, str(tmp_path), console.console())
    assert "--allow-different" in str(error.value)
    checked = prepare(made, str(tmp_path), console.console(), allow_different=True)
    assert len(checked.cells) == 4


def test_features_that_do_not_fit_are_refused(tmp_path, small, monkeypatch):
    monkeypatch.setattr(paths, "free", lambda path: 1000)
    with pytest.raises(ConfigError, match=r"features need about 27.2 kB, and 1 kB are free"):
        prepare(config(), str(tmp_path), console.console())


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"command": "evaluate", "config": {}}))
    with pytest.raises(WorkdirError, match="holds a run of dsad evaluate, not of dsad compare"):
        prepare(config(), str(tmp_path), console.console())
    with pytest.raises(ConfigError, match="--workdir=DIR is missing"):
        prepare(config(), "", console.console())


def test_names_from_a_command_line():
    def names(*detectors):
        return comparison.parse(config(detectors=detectors)).detectors

    assert names("knn,padim") == names("knn", "padim") == ("knn", "padim")
    assert names("knn, patchcore:published") == ("knn", "patchcore:published")
    assert names("gde:mtd,cutpaste_free,knn") == ("gde:mtd,cutpaste_free", "knn")


def test_what_files_ask_for_and_do_not_get_is_told():
    assert comparison_cells.notes(comparison.parse(config(detectors=("gde:mtd", "knn")))) == [
        "gde:mtd: its file has config.evaluation.image_size = 256, here 32"
    ]
    own = {"gde": {"evaluation": {"image_size": 256}}}
    assert not comparison_cells.notes(
        comparison.parse(config(detectors=("gde:mtd",), settings=own))
    )


def test_patterns_of_no_evaluation_are_told():
    used = ("*/away/padim", "*/4-shot/knn", "tiles/raw/all/padim")
    plan = comparison.parse(config(skip=(*used, "*/awya/*", "*/1-shot/*"), shots=(4, 0)))
    assert comparison_cells.notes(plan) == [
        "config.skip: '*/awya/*' is of no evaluation",
        "config.skip: '*/1-shot/*' is of no evaluation",
    ]


def test_the_baseline():
    def baseline(name, **changes):
        return comparison.parse(config(baseline=name, **changes)).baseline

    assert baseline("") == Baseline(backbone="raw")
    assert baseline("", backbones={"raw": "resnet18"}) == Baseline(detector="knn")
    assert baseline("padim") == Baseline(detector="padim")
    assert baseline("away/knn") == Baseline("away", "knn")
    with pytest.raises(ConfigError, match=r"config.baseline: no 'pdim'. Did you mean 'padim'\?"):
        baseline("pdim")
    assert Baseline(detector="knn").of("raw", "padim") == ("raw", "knn")
    assert Baseline("raw", "knn").of("raw", "knn") is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"backbones": {}}, "config.backbones: expected at least one, found none"),
        ({"backbones": {"a/b": "resnet18"}}, "the name 'a/b' cannot be that of a folder"),
        ({"datasets": {"features": {}}}, "the name 'features' cannot be that of a folder"),
        (
            {"backbones": {"a": {"spec": "x", "weigths": ""}}},
            r"config.backbones.a.weigths: unknown",
        ),
        (
            {"datasets": {"a": "mvtec"}},
            "config.datasets.a: expected a group of keys, found 'mvtec'",
        ),
        ({"datasets": {"a": {"nme": "x"}}}, "config.datasets.a.nme: unknown key"),
        ({"settings": {"pdim": {}}}, r"config.settings: no detector pdim. Did you mean 'padim'\?"),
        (
            {"evaluation": {"align_corners": True}},
            "config.evaluation.align_corners: expected False",
        ),
    ],
)
def test_what_a_config_cannot_hold(changes, told):
    made = config()
    with made.unlocked():
        for group, values in changes.items():
            if group == "evaluation":
                made.evaluation.update(values)
            else:
                made[group] = ml_collections.ConfigDict(values)
    with pytest.raises(ConfigError, match=told):
        comparison.parse(made)


def test_the_table_of_representations_reads_maps_that_its_networks_have():
    made, _, _ = flags.Command("compare", "", config="compare:representations").parse([])
    plan, faults = comparison.parse(made), comparison_cells.Faults()
    cells = comparison_cells.cells_of(plan, "features", faults)
    assert not faults
    read = {(c.backbone, c.detector): evaluate.parse(c.config)[1].layers for c in cells}
    assert read["resnet18", "subspace"] == ("layer3",)
    assert read["mae", "rad"] == ("norm3", "norm7", "norm11")
    for (backbone, _), layers in read.items():
        blocks = any(name.startswith(("block", "norm")) for name in layers)
        assert blocks == (backbone == "mae")
    bottles = [c for c in cells if c.dataset == "bottle"]
    # Four numbers of shots, three for PaDiM, one for MuSc; of two encoders a run for each seed.
    assert len(bottles) == (4 + 2 * 3) * (3 * 4 + 3 + 1) + (5 * 4 + 3 + 1)
    assert len(cells) == 3 * len(bottles)
