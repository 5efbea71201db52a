"""``dsad report`` of predictions: what is flagged first, links that resolve, faults, refusals."""

import json
import os
import shutil
import urllib.parse

import jax
import numpy as np
import PIL.Image
import pytest

from dsad.assembly import evaluate
from dsad.cli import main
from dsad.core.mesh import make_mesh
from dsad.evaluation.report import predicted
from tests.assembly.test_model import LIGHT, SMALL
from tests.assembly.test_predict import RATE
from tests.evaluation.test_report import Page

NAME = "neue Prüfung 100% #1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Predictions for pictures of two folders, one of them broken, below awkward names."""
    place = tmp_path_factory.mktemp("Läufe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        given = (*SMALL, *LIGHT, "--config.data.categories=('wood',)", RATE)
        assert main.main(["fit", *given, f"--out={place}/model"]) == 0
        for i in range(8):
            rng = np.random.default_rng(i)
            image = rng.integers(90, 110, (60, 48, 3), np.uint8) + np.uint8(18 * i)
            file = place / "fotos" / f"Teil #{i % 2}" / f"Größe {i}%.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(image).save(file)
        (file.parent / "kaputt.png").write_bytes(b"no image")
        out = f"--out={place / NAME}"
        assert main.main(["predict", f"{place}/model", f"{place}/fotos", out]) == 1
        lines = (place / NAME / "predictions.jsonl").read_text().splitlines()
        scores = sorted(json.loads(x)["score"] for x in lines if "score" in x)
        again = ("predict", f"{place}/model", f"{place}/fotos", out, "--overwrite")
        assert main.main([*again, f"--threshold={scores[4]}"]) == 1  # three are above it
    return place


def read(path):
    page = Page(path.read_text())
    assert page.stack == []
    return page, [v for tag, name, v in page.attributes if (tag, name) == ("a", "href")]


def test_flagged_pictures_come_first_and_all_links_resolve(place, capsys):
    assert main.main(["report", str(place / NAME)]) == 0
    page, links = read(place / NAME / "report.html")
    lines = (place / NAME / "predictions.jsonl").read_text().splitlines()
    rows = [row for line in lines if "score" in (row := json.loads(line))]
    order = sorted(rows, key=lambda row: -row["score"])
    assert [urllib.parse.unquote(link) for link in links] == [row["overlay"] for row in order]
    text = " ".join("".join(page.texts).split())
    assert "3 of 9 images flagged" in text
    places = [text.index(s) for s in ("3 of 9", "Flagged: 3,", "Not flagged: 5,", "Not read: 1")]
    assert places == sorted(places)
    assert "kaputt.png: " in text[places[-1] :]
    for link, row in zip(links, order, strict=True):
        overlay = np.asarray(PIL.Image.open(place / NAME / urllib.parse.unquote(link)))
        assert (overlay == (0, 229, 255)).all(-1).any() == bool(row["regions"])
    sources = [v for tag, name, v in page.attributes if (tag, name) == ("img", "src")]
    texts = [v for tag, name, v in page.attributes if (tag, name) == ("img", "alt")]
    assert len(sources) == len(texts) == 8
    assert all(s.startswith("data:image/jpeg;base64,") for s in sources)
    assert all(row["path"] in alt for row, alt in zip(order, texts, strict=True))
    assert not any("://" in v for _, name, v in page.attributes if name in ("href", "src"))
    assert "threshold" in next(
        v for tag, n, v in page.attributes if (tag, n) == ("svg", "aria-label")
    )


def test_a_page_elsewhere_links_back_and_leaves_out_what_is_too_much(place, monkeypatch, capsys):
    monkeypatch.setattr(predicted, "PICTURES", 4)
    out = place / "Seiten" / "p.html"
    assert main.main(["report", str(place / NAME), f"--out={out}", "--title=Schicht 2"]) == 0
    page, links = read(out)
    assert len(links) == 4
    for link in links:
        assert os.path.isfile(out.parent / urllib.parse.unquote(link))
    text = " ".join("".join(page.texts).split())
    assert "4 more, with lower scores" in text
    assert "Schicht 2" in text


def test_predictions_stand_alone_and_whole(place, tmp_path, capsys):
    first = str(place / NAME)
    assert main.main(["report", first, first]) == 2
    assert "or one directory of a comparison, of predictions," in capsys.readouterr().err
    shutil.copytree(first, tmp_path / "half")
    about = tmp_path / "half" / "about.json"
    about.write_text('{"command": "predict", "complete": false}')
    assert main.main(["report", str(tmp_path / "half")]) == 2
    assert "stopped" in capsys.readouterr().err
    shutil.copytree(first, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "overlays")
    assert main.main(["report", str(tmp_path / "bare")]) == 2
    assert "expected an overlay" in capsys.readouterr().err
    assert not (tmp_path / "bare" / "p.html").exists()
