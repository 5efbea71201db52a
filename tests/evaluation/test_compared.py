"""The files and the page of a comparison, from made numbers."""

import csv
import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
from etils import epath

from dsad.cli.compare import tables
from dsad.core.errors import WorkdirError
from dsad.evaluation import compared
from dsad.evaluation.compared import Baseline, Measured
from dsad.evaluation.report.compared import write_compared
from dsad.models.weights.licences import UNKNOWN, named
from dsad.terminal import console

METRICS = ("image_auroc", "pixel_ap", "aupro_30")
MAIN = ("pixel_ap", "aupro_30", "image_auroc")
CATEGORIES = ("disc", "[red]y")


def stamp(**changes):
    return {
        "name": "any", "date": "2026", "categories": list(CATEGORIES), "fpr_limit": 0.3,
        "dataset": {"name": "discs", "records_sha256": "ab"}, "detector": {"name": "knn"},
        "support": {"shots": "all", "seeds": [0], "sha256": "x"}, "layers": ["layer2"],
        "backbone": {"arch": "resnet18", "weights": "random, seed 0"},
        "map_wrappers": ["residual"], **changes,
    }  # fmt: skip


def numbers(*place):
    """Of one seed: the more, the higher the numbers of the place."""
    rng = np.random.default_rng(place)
    rows = {
        c: {m: float(0.5 + 0.1 * place[0] + 0.01 * rng.random()) for m in METRICS}
        for c in CATEGORIES
    }
    mean = {m: float(np.mean([row[m] for row in rows.values()])) for m in METRICS}
    return {"mean": mean, "categories": rows}


def cell(backbone, detector, seeds, level, shots: Any = "all", **changes):
    return Measured(
        dataset="discs", backbone=backbone, detector=detector, shots=shots,
        folder=f"discs/{backbone}/{detector}" + (f"/seed{seeds[0]}" if len(seeds) == 1 else ""),
        stamp=stamp(**changes), seeds={str(s): numbers(level, s) for s in seeds},
        seconds={"features": 1.0, "fit": 2.0, "score": 3.0, "metrics": 4.0},
    )  # fmt: skip


CELLS = [
    cell("raw", "knn", (0, 1, 2), 0),
    cell("raw", "a<b", (0, 1, 2), 1),
    # One evaluation for each seed.
    *(cell("ours", "knn", (s,), 2, support={"shots": "all", "seeds": [s], "sha256": str(s)})
      for s in (0, 1, 2)),
]  # fmt: skip


@pytest.fixture(scope="module")
def content():
    return compared.summary(CELLS, Baseline(backbone="raw"), MAIN, ["discs/ours/a<b"])


def test_rows_hold_spreads_and_paired_differences(content):
    found = content["datasets"]["discs"]
    first, second, ours = found["rows"]
    assert (first["baseline"], second["baseline"], ours["baseline"]) == (True, True, False)
    assert ours["against"] == "raw/knn"
    assert ours["seeds"] == ["0", "1", "2"]
    left = [numbers(2, s)["mean"]["pixel_ap"] for s in (0, 1, 2)]
    right = [numbers(0, s)["mean"]["pixel_ap"] for s in (0, 1, 2)]
    gap, gaps = ours["differences"]["pixel_ap"], np.subtract(left, right)
    assert gap["mean"] == pytest.approx(gaps.mean())
    assert gap["std"] == pytest.approx(gaps.std(ddof=1))
    own = [numbers(2, s)["categories"]["disc"]["pixel_ap"] for s in (0, 1, 2)]
    assert ours["categories"]["disc"]["pixel_ap"]["mean"] == pytest.approx(np.mean(own))
    assert ours["seconds"]["fit"] == 6.0  # of three evaluations
    assert found["leads"] == {m: [2] for m in METRICS}
    assert found["notices"] == []
    assert found["common"]["dataset.name"] == "discs"
    assert not {"support.seeds", "support.sha256"} & found["common"].keys()
    assert content["left"] == ["discs/ours/a<b"]
    assert not content["complete"]


def test_numbers_that_mean_something_else_are_told():
    other = cell("ours", "knn", (0, 1, 2), 2, fpr_limit=0.05, layers=["layer1"])
    told = compared.summary([CELLS[0], other], Baseline(), MAIN)["datasets"]["discs"]["notices"]
    assert told == ["discs/raw/knn / discs/ours/knn: fpr_limit: 0.3 against 0.05"]


def few(backbone, detector, level, shots, **support):
    about = {"shots": shots, "rule": "drawn", "seeds": [0, 1, 2], "sha256": f"{shots}", **support}
    return cell(backbone, detector, (0, 1, 2), level, shots, support=about)


#: What leads with one image does not with all.
SHOTS = [
    few("raw", "knn", 3, 1), few("raw", "knn", 0, "all", rule="all training images"),
    few("raw", "musc", 9, "none", rule="the test images"),
    few("ours", "knn", 1, 1), few("ours", "knn", 2, "all"),
]  # fmt: skip
LICENCES = {"raw": named("CC BY-NC 4.0"), "ours": UNKNOWN}


@pytest.fixture(scope="module")
def shots():
    return compared.summary(SHOTS, Baseline(backbone="raw"), MAIN, licences=LICENCES)


def test_rows_are_compared_with_those_of_as_many_shots(shots):
    found = shots["datasets"]["discs"]
    assert found["shots"] == [1, "all", "none"]
    assert [row["shots"] for row in found["rows"]] == [1, "all", "none", 1, "all"]
    assert found["leads"] == {m: [0, 4] for m in METRICS}
    # However high, what was fitted on the test images neither leads nor keeps others from it.
    gaps = [row["differences"].get("pixel_ap", {}).get("mean") for row in found["rows"]]
    assert gaps[:3] == [None] * 3
    assert gaps[3] == pytest.approx(-0.2, abs=0.01)
    assert gaps[4] == pytest.approx(0.2, abs=0.01)
    assert found["notices"] == []
    # One image more is no other protocol, rotations of it are.
    other = compared.summary([*SHOTS, few("ours", "padim", 1, 1, rotations=8)], Baseline(), MAIN)
    assert "support.rotations: '(absent)' against 8" in other["datasets"]["discs"]["notices"][0]
    assert shots["backbones"] == {
        "raw": {"licence": "CC BY-NC 4.0", "commercial": False},
        "ours": {"licence": "unknown", "commercial": None},
    }


@pytest.mark.parametrize(
    ("mean", "text"), [(-4e-4, "0.000"), (4e-4, "0.000"), (-6e-4, "−0.001"), (0.25, "+0.250")]
)
def test_a_difference_that_rounds_to_nothing_has_no_sign(mean, text):
    assert compared.told({"mean": mean, "std": 0.0}, "+.3f") == text


def test_no_deviation_is_claimed_where_every_seed_gives_the_same(tmp_path, capsys):
    """Of two such rows none leads, however far it is from the other."""
    once = {
        name: dataclasses.replace(
            few("raw", name, 0, "all"), seeds=dict.fromkeys("012", numbers(level, 7))
        )
        for name, level in (("padim", 2), ("subspace", 1))
    }
    drawn = few("raw", "knn", 0, "all")
    near = compared.summary([*once.values(), drawn], Baseline(detector="subspace"), MAIN)
    assert near["datasets"]["discs"]["leads"]["pixel_ap"] == []
    compared.write(epath.Path(tmp_path), near)
    page = write_compared(tmp_path / "all.html", tmp_path).read_text()
    high, low = (once[name].mean("pixel_ap")["0"] or 0.0 for name in once)
    shown = [f"{high:.3f}", f"{high - low:+.3f}"]
    for text in shown:
        assert f">{text}</td>" in page
    assert len(re.findall(r">0\.\d{3} ± 0\.\d{3}</td>", page)) == 3 + 3 + 3 * 2  # of knn alone
    assert not re.search(r"gap up", page)
    assert "network; without ±, all give the same." in page
    console.console().print(*tables(near, "discs"))
    text = capsys.readouterr().out
    assert re.search(rf"raw +│ +{shown[0]}│|raw +│ +{shown[0]} ", text)
    assert "without ±: the same with every seed" in text
    capsys.readouterr()
    console.console().print(*tables(compared.summary([drawn], Baseline(), MAIN), "discs"))
    assert "without" not in capsys.readouterr().out


def test_the_files_name_the_shots(shots, tmp_path):
    compared.write(epath.Path(tmp_path), shots)
    rows = list(csv.DictReader((tmp_path / compared.TABLE).open()))
    assert list(dict.fromkeys(row["shots"] for row in rows)) == ["1", "all", "none"]
    assert [c["shots"] for c in compared.read(tmp_path)["cells"]] == [1, "all", "none", 1, "all"]
    older = json.loads((tmp_path / compared.FILE).read_text())
    del older["backbones"]
    (tmp_path / compared.FILE).write_text(json.dumps(older))
    with pytest.raises(WorkdirError, match="written by an older dsad. The same dsad compare"):
        compared.read(tmp_path)


def test_tables_of_several_numbers_of_shots_fit_80_columns(capsys):
    more = [few("mobilenetv2", "patchcore", 1, s) for s in (1, 2, 4, 8, "all")]
    content = compared.summary([*more, *SHOTS], Baseline("raw", "knn"), MAIN)
    made = tables(content, "discs")
    assert [t.title for t in made][:2] == ["discs: Pixel AP"] * 2
    assert [len(t.columns) - 1 for t in made] == [4, 2] * 3
    for one in made:
        console.console().print(one)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    first, second = text.split("discs: Pixel AP")[1:3]
    assert re.search(r"1-shot.*2-shot.*4-shot.*8-shot", first)
    assert "musc" not in first  # nothing of it is in these columns
    assert re.search(r"all images.*0-shot", second)
    assert re.search(r"raw +│ +│ 1\.40\d ± 0\.00\d\n *musc", second)
    assert re.search(r"raw +│ 0\.80\d ± 0\.00\d\*", first)
    assert text.count("0-shot: fitted on the test images") == 1


def test_the_page_has_a_column_for_each_number_of_shots_and_the_licences(shots, tmp_path):
    compared.write(epath.Path(tmp_path), shots)
    page = write_compared(tmp_path / "all.html", tmp_path).read_text()
    assert "2 backbones × 2 detectors × 2 numbers of shots × 3 seeds" in page
    for heading in ("Pixel AP", "AUPRO 0.3", "Image AUROC"):
        assert f"<h3>{heading}</h3>" in page
    heads = re.findall(r'<th class="edge">([^<]+)</th>', page)
    assert heads == ["1-shot", "all images", "0-shot"] * 3
    assert page.count('class="number edge best"') == 2 * 3
    assert page.count("CC BY-NC 4.0; commercial use: not allowed") == 3
    assert page.count("unknown; commercial use: not known") == 3
    assert page.count('<svg class="chart"') == 3
    assert "circles below: each seed; all images." in page
    assert "musc, 0-shot</td>" in page


def test_files_hold_every_number(content, tmp_path):
    compared.write(epath.Path(tmp_path), content)
    assert compared.read(tmp_path) == content == json.loads((tmp_path / compared.FILE).read_text())
    rows = list(csv.DictReader((tmp_path / compared.TABLE).open()))
    assert len(rows) == 9 * 3  # each seed of each row; two categories and their mean
    found = {(r["backbone"], r["detector"], r["seed"], r["category"]): r for r in rows}
    row = found["ours", "knn", "2", "[red]y"]
    assert float(row["pixel_ap"]) == numbers(2, 2)["categories"]["[red]y"]["pixel_ap"]
    assert row["folder"] == "discs/ours/knn/seed2"
    (tmp_path / compared.FILE).unlink()
    with pytest.raises(WorkdirError, match="no evaluation of this comparison is finished"):
        compared.read(tmp_path)


def test_the_table_fits_80_columns(content, capsys):
    console.console().print(*tables(content, "discs"))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert len(re.findall(r"│ +baseline", text)) == 6
    assert re.search(r"ours +│ +0\.70\d ± 0\.00\d\*", text)
    assert re.search(r"knn +│ \+0\.\d+ ± 0\.00\d", text)
    assert "paired difference to raw" in text


def test_the_page_shows_links_charts_and_what_is_left(content, tmp_path):
    compared.write(epath.Path(tmp_path), content)
    (tmp_path / "discs/ours/knn/seed1").mkdir(parents=True)
    (tmp_path / "discs/ours/knn/seed1/report.html").write_text("")
    out = write_compared(tmp_path / "pages" / "all.html", tmp_path, title="[red]<x>")
    page = out.read_text()
    assert "<h1>[red]&lt;x&gt;</h1>" in page
    assert "1 data set × 2 backbones × 2 detectors × 3 seeds" in page
    assert "1 evaluation left, first discs/ours/a&lt;b" in page
    assert '<a href="../discs/ours/knn/seed1/report.html">discs/ours/knn/seed1</a>' in page
    assert page.count("<a ") == 1
    assert page.count('<svg class="chart"') == 3
    assert page.count('class="number edge best"') == 3
    assert "Pixel AP: difference" in page
    assert len(re.findall(r"gap up\">\+0\.\d{3} ± 0\.00\d", page)) == 3
    assert "records_sha256" in page
    assert "resnet18, random, seed 0, behind residual; layer2</td>" in page
    assert "[red]y" in page
