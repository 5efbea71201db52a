"""The files and the page of a comparison, from made numbers."""

import csv
import json
import re

import numpy as np
import pytest
from etils import epath

from dsad.cli.compare import tables
from dsad.core.errors import WorkdirError
from dsad.evaluation import compared
from dsad.evaluation.compared import Baseline, Measured
from dsad.evaluation.report.compared import write_compared
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


def cell(backbone, detector, seeds, level, shots="all", **changes):
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
    assert found["leads"] == dict.fromkeys(METRICS, [2])
    assert found["notices"] == []
    assert found["common"]["dataset.name"] == "discs"
    assert not {"support.seeds", "support.sha256"} & found["common"].keys()
    assert content["left"] == ["discs/ours/a<b"]
    assert not content["complete"]


def test_numbers_that_mean_something_else_are_told():
    other = cell("ours", "knn", (0, 1, 2), 2, fpr_limit=0.05, layers=["layer1"])
    told = compared.summary([CELLS[0], other], Baseline(), MAIN)["datasets"]["discs"]["notices"]
    assert told == ["discs/raw/knn / discs/ours/knn: fpr_limit: 0.3 against 0.05"]


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
