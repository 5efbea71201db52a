"""sPRO of an evaluation against its definition on a miniature MVTec LOCO, from its own files."""

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
import pytest
import tifffile
from PIL import Image
from rich.console import Console
from sklearn.metrics import roc_auc_score

from dsad.cli.evaluate import spro_table, table
from dsad.core.channels import HasChannels
from dsad.core.errors import DataError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.data import mvtec_loco, records_builder
from dsad.data.base import DataConfig, load
from dsad.data.checks import check
from dsad.data.combined import selected
from dsad.detectors import knn
from dsad.evaluation import channels, metrics
from dsad.evaluation.localize import EvalConfig, localize, read_results, write_results
from dsad.evaluation.maps import map_path
from dsad.evaluation.preprocessing import Preprocessing
from dsad.evaluation.report.page import metric_label, write_report
from tests.data import published_trees, trees
from tests.evaluation.test_localize import Distance
from tests.evaluation.test_metrics import brute_area
from tests.evaluation.test_stored import CELLS

LIMITS = {"spro_30": 0.3, "spro_05": 0.05}
LOGICAL, STRUCTURAL = "logical_anomalies", "structural_anomalies"
GROUND = "pushpins/ground_truth"


def small(value):
    """Four pixels, fewer than saturate; one of them outside of any other mask."""
    mask = np.zeros_like(trees.mask())
    mask[3:5, 9:11] = value
    return mask


#: A mask that overlaps another one's pixels, and one smaller than its absolute saturation.
MORE = {
    f"{GROUND}/{LOGICAL}/001/001.png": np.roll(trees.mask(255), (1, 3), (0, 1)),
    f"{GROUND}/{STRUCTURAL}/000/002.png": small(255),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("loco")
    published_trees.write("mvtec_loco", root, more=MORE)
    return root


def config_of(root, name="mvtec_loco", **keys):
    return DataConfig(name=name, root=str(root), **keys)


def run(data, folder=None, devices=1, detector=None, **config):
    settings = {"image_size": 16, "batch_size": 4, "workers": 2, "gallery": 1}
    kept = {"save_maps": "tiff"} if folder else {}
    return localize(
        CELLS, detector or Distance(sigma=0.0), data, EvalConfig(**{**settings, **kept, **config}),
        mesh=make_mesh(MeshConfig(), jax.devices()[:devices]), key=jax.random.key(3), folder=folder,
    )  # fmt: skip


def expected(root, folder, category, limit, kinds=(LOGICAL, STRUCTURAL), into=None):
    """From the definition: files are read by their names, saturations from their list."""
    listed = json.loads((root / category / "defects_config.json").read_text())
    rules = {x["pixel_value"]: x for x in listed}
    maps, normal, inside, saturated = [], [], [], []
    for image in sorted(root.glob(f"{category}/test/*/*.png")):
        if image.parent.name not in (*kinds, "good"):
            continue
        name = image.relative_to(root).as_posix()
        score = np.float64(tifffile.imread(map_path(folder / "anomaly_maps", name, "tiff")))
        part = into.inspected(score.shape) if into else np.s_[:, :]
        score = score[part]
        masks = root / category / "ground_truth" / image.parent.name / image.stem
        every = [np.asarray(Image.open(m))[part] for m in sorted(masks.glob("*.png"))]
        free = np.ones(score.shape, bool)
        for mask in every:
            free &= mask == 0
            if mask.any():
                rule = rules[mask.max()]
                area = np.count_nonzero(mask)
                enough = rule["saturation_threshold"]
                enough = math.floor(enough * area) if rule["relative_saturation"] else enough
                inside.append(score[mask > 0])
                saturated.append(max(1, min(enough, area)))
        maps.append(score)
        normal.append(score[free])
    return brute_area(maps, np.concatenate(normal), inside, saturated, limit)


@pytest.mark.parametrize(("count", "method"), [(1, "exact"), (8, "exact"), (8, "streaming")])
def test_numbers_are_those_of_the_definition(root, tmp_path, count, method):
    data = load(config_of(root))
    found = run(data, tmp_path, count, method=method)
    error = 1e-9 if method == "exact" else 1e-5
    for category, row in found.categories.items():
        kinds = found.kinds[category]
        for name, limit in LIMITS.items():
            whole = expected(root, tmp_path, category, limit)
            assert row[name] == pytest.approx(whole, abs=error)
            parts = {k: expected(root, tmp_path, category, limit, (k,)) for k in kinds}
            for kind, value in parts.items():
                assert kinds[kind][name] == pytest.approx(value, abs=error)
            assert row[f"{name}_kinds"] == pytest.approx(np.mean(list(parts.values())), abs=error)
        images = found.images[category]
        aurocs = []
        for kind in (LOGICAL, STRUCTURAL):
            some = [x for x in images if x["kind"] in ("good", kind)]
            aurocs.append(roc_auc_score([x["label"] for x in some], [x["score"] for x in some]))
        assert row["image_auroc_kinds"] == pytest.approx(np.mean(aurocs))
    for name in ("spro_05", "spro_05_kinds", "image_auroc_kinds"):
        rows = [row[name] for row in found.categories.values()]
        assert found.mean[name] == pytest.approx(np.mean(rows))
    # Of pushpins alone the tree was changed: the numbers tell it from the other category.
    assert len({row["spro_05"] for row in found.categories.values()}) == 2
    assert found.stamp["spro"] == channels.PROTOCOL
    assert found.stamp["dataset"]["saturations"] == data.protocol["saturations"]


def test_usual_numbers_stay_those_of_the_union(root):
    data = load(config_of(root, categories=("pushpins",)))
    found, plain = run(data), run(dataclasses.replace(data, saturations={}))
    assert plain.mean.keys() == set(EvalConfig().metric_names)
    assert {n: found.mean[n] for n in plain.mean} == plain.mean
    assert "spro" not in plain.stamp


@pytest.mark.parametrize(
    "way",
    [
        {"resize": "shorter", "crop": 0.75},
        {"resize": "longer"},
        {"resize": "windows", "image_size": 12, "overlap": 2},
    ],
    ids=lambda way: way["resize"],
)
def test_channels_of_what_is_inspected(root, tmp_path, way):
    detector = knn.build(knn.Config(layers=("colour",), bank_rows=200, sigma=1.0))
    data = load(config_of(root, categories=("pushpins",)))
    found = run(data, tmp_path, detector=detector, **way)
    config = EvalConfig(**{"image_size": 16, **way})
    into: Preprocessing = config.preprocessing
    assert into.everything == (way["resize"] != "shorter")
    for name, limit in LIMITS.items():
        oracle = expected(root, tmp_path, "pushpins", limit, into=into)
        assert found.mean[name] == pytest.approx(oracle, abs=1e-9)


def test_a_set_of_which_one_category_has_saturations(tmp_path):
    found = run(load(published_trees.write("autovi", tmp_path)), fpr_limit=0.05)
    assert found.categories["pipe_clip"]["spro_05"] is None
    assert found.mean["spro_05"] == found.categories["tank_screw"]["spro_05"] is not None
    assert "spro_30" not in found.mean
    assert found.about_means == "mean of sPRO numbers over 1 of 2 categories"


@pytest.mark.parametrize("several", [False, True])
def test_tables_and_page(root, tmp_path, several):
    found = run(load(config_of(root)))
    if several:
        found = dataclasses.replace(
            found, std={"mean": found.mean, "categories": found.categories},
            seeds={"0": {}, "1": {}},
        )  # fmt: skip
    out = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    out.print(table(found))
    assert "spro" not in out.export_text()
    out.print(spro_table(found))
    text = out.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert text.count("mean of kinds") == 4  # two categories, their mean, and what it is
    assert f"{found.mean['spro_05_kinds']:.3f}" in text
    if not several:
        write_results(found, tmp_path)
        assert read_results(tmp_path).mean == found.mean
        page = pathlib.Path(write_report(tmp_path / "page.html", [("own", tmp_path)])).read_text()
        assert metric_label("spro_05_kinds") == "sPRO 0.05, mean of kinds"
        for name in ("sPRO 0.3", "sPRO 0.05, mean of kinds", "Image AUROC, mean of kinds"):
            assert name in page


def test_hits_of_the_sheet_from_files(tmp_path):
    """Absolute 100: of 400 pixels 50 hits are 0.5, 100 and 400 are 1; of 60 all count."""
    listed = [
        {"defect_name": "a", "pixel_value": 1, "saturation_threshold": 100,
         "relative_saturation": False},
        {"defect_name": "b", "pixel_value": 2, "saturation_threshold": 0.5,
         "relative_saturation": True},
    ]  # fmt: skip
    image = np.zeros((30, 40, 3), np.uint8)
    large, low, tiny = (np.zeros((30, 40), np.uint8) for _ in range(3))
    large[:20, :20], low[:6, 30:], tiny[25, :7] = 1, 1, 2
    folder = "screw_bag"
    more = {f"{folder}/defects_config.json": json.dumps(listed)}
    for i, mask in enumerate((large, low, tiny)):
        more[f"{folder}/test/{LOGICAL}/{i:03d}.png"] = image
        more[f"{folder}/ground_truth/{LOGICAL}/{i:03d}/000.png"] = mask
    tree = published_trees.mvtec_loco()
    less = [p for p in tree if p.startswith(f"{folder}/ground_truth/{LOGICAL}") and p not in more]
    less += [p for p in tree if STRUCTURAL in p and p.startswith(folder)]
    config = published_trees.write("mvtec_loco", tmp_path, more=more, less=less)
    source = load(config).source("test", folder)
    rows = [i for i, r in enumerate(source.records) if r.kind == LOGICAL]
    part = selected(source, rows)
    assert isinstance(part, HasChannels)
    assert part.saturated

    def area(number, hits, limit=0.05):
        (channel,) = part.channels(number, (30, 40))
        whole = np.s_[0:30, 0:40]
        units = channels.read(part, number, channel.mask, whole, (30, 40))
        scores = np.zeros(channel.mask.shape, np.float32)
        scores.flat[np.flatnonzero(channel.mask)[:hits]] = 1
        found = metrics.channel_metrics([scores], [units], (limit,))["spro_05"]
        return (found - limit / 2) / (1 - limit / 2)  # the curve is straight from there to (1, 1)

    assert [area(0, n) for n in (50, 100, 400)] == pytest.approx([0.5, 1, 1])
    assert [area(1, n) for n in (30, 60)] == pytest.approx([0.5, 1])
    assert [area(2, n) for n in (1, 3, 7)] == pytest.approx([1 / 3, 1, 1])


def test_records_keep_channels_and_saturations(root, tmp_path):
    config = config_of(root)
    files = load(config)
    records_builder.write(records_builder.plan(files), str(tmp_path / "records"))
    stored = load(config_of(tmp_path / "records", "records"))
    assert stored.saturations == files.saturations
    assert stored.protocol == files.protocol
    one = load(config_of(tmp_path / "records", "records", categories=("pushpins",)))
    same = load(config_of(root, categories=("pushpins",)))
    assert one.protocol["saturations"] == same.protocol["saturations"]
    assert one.protocol["saturations"] != files.protocol["saturations"]
    left, right = files.source("test", "pushpins"), one.source("test", "pushpins")
    for i, record in enumerate(left.records):
        known, found = (x.channels(i, (16, 24)) for x in (left, right))
        assert len(known) == len(found) == len(record.masks)
        for a, b in zip(known, found, strict=True):
            np.testing.assert_array_equal(a.mask, b.mask)
            assert a.saturation == b.saturation
    about = tmp_path / "records/dsad_records.json"
    older = json.loads(about.read_text())
    del older["saturations"], older["protocol"]["saturations"]
    about.write_text(json.dumps(older))
    older = load(config_of(tmp_path / "records", "records"))
    assert not channels.known(older, older.categories)
    assert "saturations" not in older.protocol


def test_files_that_are_not_one_known_defect(tmp_path):
    """A file of two defects, and one that the list does not have: both in one pass."""
    both = np.maximum(trees.mask(254), np.roll(trees.mask(255), 6, axis=0))
    two, other = (f"{GROUND}/{kind}/001/000.png" for kind in (LOGICAL, STRUCTURAL))
    config = published_trees.write(
        "mvtec_loco", tmp_path, more={two: both, other: trees.mask(7)}
    )  # fmt: skip
    faults = [f for f in check(config).faults if f.check == "K4"]
    assert {f.path for f in faults if f.severity == "error"} == {two, other}
    (text,) = (f.message for f in faults if f.path == two)
    assert "254, 255: expected one" in text
    with pytest.raises(DataError, match="pushpins/ground_truth"):
        run(load(config))


def test_thresholds_change_what_a_number_means(root, tmp_path):
    changed = [{**x, "saturation_threshold": 1} for x in published_trees.DEFECTS]
    more = {"pushpins/defects_config.json": json.dumps(changed)}
    other = load(published_trees.write("mvtec_loco", tmp_path, more=more))
    assert mvtec_loco.saturations(tmp_path, "pushpins")[255].pixels(15) == 1
    here = load(config_of(root))
    assert other.protocol["saturations"] != here.protocol["saturations"]
    assert "saturations" not in load(trees.mvtec(tmp_path / "plain")).protocol
