"""What the report says and draws at a threshold: decision, order, contours, scores, full size."""

import base64
import io
import math
import re
import shlex

import jax
import numpy as np
import PIL.Image
import pytest
import tifffile
from scipy import ndimage

from dsad.cli import main
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.types import Sample
from dsad.evaluation.localize import EvalConfig, localize, write_results
from dsad.evaluation.report import gallery
from dsad.evaluation.report.page import write_report
from dsad.terminal import flags
from tests.evaluation.test_localize import Distance, Planted, PlantedSource, Pooled
from tests.evaluation.test_report import Page

RATE, SIZE = 0.2, (480, 320)  # height and width of the images


class Large(Planted):
    """Enlarged images: the defects with number 0 are hardly coloured, one good image is."""

    def source(self, split, category=None):
        rows = super().source(split, category).rows
        if split == "train":  # enough to hold some out
            rows = [("disc", "good", i) for i in range(30)]
        return LargeSource(self, split, rows)


class LargeSource(PlantedSource):
    def __getitem__(self, index):
        sample, (_, kind, number) = super().__getitem__(index), self.rows[index]
        image = sample.image.astype(np.int32)
        if kind != "good" and number == 0:
            image[sample.mask] -= (image[sample.mask] - 120) * 98 // 100
        if kind == "good" and "test" in self.records[index].path and number == 2:
            image[20:32, 16:28] += [50, 0, 0]
        mask = None if sample.mask is None else sample.mask.repeat(8, 0).repeat(8, 1)
        large = image.repeat(8, 0).repeat(8, 1).astype(np.uint8)
        return Sample(record=sample.record, image=large, mask=mask)


def evaluated(folder, dataset, **settings):
    config = EvalConfig(image_size=48, workers=1, **settings)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    results = localize(
        Pooled(), Distance(), dataset, config, mesh=mesh, key=jax.random.key(0), folder=folder
    )
    write_results(results, folder)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("Läufe neu")


@pytest.fixture(scope="module")
def decided(folder):
    """Results with thresholds and maps, and their page."""
    settings = {"false_alarm_rate": RATE, "holdout": 2, "save_maps": "tiff"}
    results = evaluated(folder / "mit", Large(), **settings)
    return results, write_report(folder / "mit.html", [("mit", folder / "mit")]).read_text()


def cases(text):
    """File, pictures by caption, and text of every image of a page, in its order."""
    found = []
    for article in re.findall(r'<article class="case">(.*?)</article>', text, re.S):
        uris = re.findall(r'src="data:image/jpeg;base64,([^"]*)" alt="([^"]*)"', article)
        images = [
            np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(uri)))).astype(int)
            for uri, _ in uris
        ]
        captions = re.findall(r"<figcaption>([^<]*)<", article)
        path = re.search(r'<div class="small muted path">([^<]*)<', article)[1]
        assert all(path in alt for _, alt in uris)
        found.append((path, dict(zip(captions, images, strict=True)), article))
    return found


def test_decision_first_then_what_was_wrong_then_the_rest_then_numbers(decided):
    results, text = decided
    row = results.thresholds["disc"]["0"]
    shown = " ".join(re.sub(r"<[^>]*>", "", text[text.index('class="verdict">') + 16 :]).split())
    assert shown.startswith(row["decision"].split(" (")[0])
    assert f"Threshold {row['image']:.4g}, set by {row['held_out']} held-out" in shown
    assert f"at most {100 * row['image_bound']:.3g} % are flagged" in shown
    places = [
        text.index(s) for s in (
            'class="verdict"', "<h3>Missed: ", "<h3>False alarms: ", "<h2>Other pictures",
            "<h3>Defects found", "<h2>Numbers", "By kind of defect", "<h2>Protocol",
        )
    ]  # fmt: skip
    assert places == sorted(places)
    folded = re.findall(r"<details>(.*?)</details>", text, re.S)
    assert sum("By kind of defect" in part for part in folded) == 1
    assert not any("<summary>" in part and 'class="case"' in part for part in folded)
    images = results.images["disc"]
    missed = [x for x in images if x["label"] == 1 and x["score"] <= row["image"]]
    alarms = [x for x in images if x["label"] == 0 and x["score"] > row["image"]]
    assert missed, "the weak defects are missed"
    assert alarms, "the coloured good image is flagged"
    wrong = sorted(missed, key=lambda x: x["score"]) + sorted(alarms, key=lambda x: -x["score"])
    assert [path for path, _, _ in cases(text)][: len(wrong)] == [x["path"] for x in wrong]
    words = ["missed"] * len(missed) + ["false alarm"] * len(alarms)
    for (_, _, article), image, word in zip(cases(text), wrong, words, strict=False):
        assert f'score <b>{image["score"]:.4g}</b>, <b class="wrong">{word}</b>' in article


def test_the_contour_is_where_the_map_crosses_the_threshold(decided, folder):
    """Against the saved maps, and the threshold of their maxima computed here."""
    results, text = decided
    maxima = sorted(results.thresholds["disc"]["0"]["maxima"])
    region = maxima[min(math.ceil((len(maxima) + 1) * (1 - RATE)), len(maxima)) - 1]
    crossed = 0
    for path, pictures, _ in cases(text):
        overlay = pictures["Overlay"]
        assert overlay.shape[:2] == SIZE  # full resolution
        line = (abs(overlay - (0, 229, 255)) < 60).all(-1)
        saved = tifffile.imread(folder / "mit" / "anomaly_maps" / path.replace(".png", ".tiff"))
        above = saved > region
        border = above & ~ndimage.binary_erosion(above, border_value=0)
        if not above.any():
            assert not line.any(), path
            continue
        crossed += 1
        assert line.any(), path
        # The line is just outside: 2 to 3 of 480 pixels away, and the page's maps have 160.
        assert ndimage.distance_transform_edt(~border)[line].max() <= 8, path
        assert ndimage.distance_transform_edt(~line)[border].max() <= 8, path
    assert 0 < crossed < len(cases(text))


def test_the_annotated_defect_has_its_own_colour(decided):
    _, text = decided
    path, pictures, _ = cases(text)[0]
    line = (abs(pictures["Annotated defect"] - (70, 235, 60)) < 60).all(-1)
    number = int(path[-7:-4])
    inside = np.zeros(SIZE, bool)
    top, left = 8 * (6 + 15 * number), 8 * (5 + 9 * number)
    inside[top : top + 96, left : left + 80] = True
    assert line.any()
    assert not (line & inside).any()
    assert ndimage.distance_transform_edt(~inside)[line].max() <= 6


def test_the_threshold_divides_the_dots_of_the_score_plot(decided):
    results, text = decided
    chart = next(s for s in re.findall(r"<svg.*?</svg>", text, re.S) if "Image scores" in s[:300])
    value = results.thresholds["disc"]["0"]["image"]
    assert f"threshold {value:.4g}" in chart[:400]  # read aloud
    assert f">threshold {value:.4g}<" in chart
    (line,) = re.findall(r'<path d="M ([\d.]+) [\d.]+\s+L \1 [^>]*dasharray', chart)
    # A circle alone is drawn where it is, several are used from a shared one.
    marks = r'<(?:use href="[^"]*" x=|path d=)"(?:M )?([\d.]+)[^>]*stroke: (#2f7de1|#e0314b)[^>]*>'
    marks = [(float(x), colour) for x, colour in re.findall(marks, chart)]
    dots = [x for x, _ in marks]
    scores = [x["score"] for x in results.images["disc"]]
    assert len(dots) == len(scores)
    assert sum(x > float(line) for x in dots) == sum(s > value for s in scores)
    red = [x for x, colour in marks if colour == "#e0314b"]
    found = results.images["disc"]
    assert len(red) == sum((x["score"] > value) != (x["label"] == 1) for x in found)


def test_every_picture_opens_and_nothing_else_is_referred_to(decided):
    _, text = decided
    page = Page(text)
    assert page.stack == []
    ids = [v for _, name, v in page.attributes if name == "id"]
    targets = [v for _, name, v in page.attributes if name == "popovertarget"]
    assert len(set(targets)) == len(targets) == text.count("<img ") > 0
    assert set(targets) <= set(ids)
    assert text.count('alt="') == text.count("<img ")
    outside = r'https?://|url\((?!#)|@import|<script|<link|(src|href)="(?!data:image/|#)'
    assert not re.search(outside, text)


def test_without_a_threshold_the_page_says_how_to_get_one(folder):
    results = evaluated(folder / "ohne", Planted(strength=9))
    runs = [("ohne", folder / "ohne")]
    text = write_report(folder / "o.html", runs, commands={"ohne": "dsad <again>"}).read_text()
    assert "No threshold, no decisions" in text
    assert "dsad &lt;again&gt;</pre>" in text
    assert "Missed" not in text
    images = results.images["disc"]
    low = sorted((x["score"], x["path"]) for x in images if x["label"] == 1)
    assert [path for path, _, _ in cases(text)][:3] == [path for _, path in low[:3]]
    assert not any(
        (abs(p["Overlay"] - (0, 229, 255)) < 60).all(-1).any() for _, p, _ in cases(text)
    )
    plain = write_report(folder / "p.html", runs).read_text()
    assert "config.evaluation.false_alarm_rate=0.05" in plain


def test_decided_and_undecided_runs_lie_side_by_side(folder, decided):
    evaluated(folder / "schwach", Large(strength=20))
    runs = [("mit", folder / "mit"), ("schwach", folder / "schwach")]
    text = write_report(folder / "b.html", runs, allow_different=True).read_text()
    assert "schwach: no threshold, no decisions" in text
    for _, pictures, _ in cases(text):
        lines = [(abs(pictures[f"{n}: overlay"] - (0, 229, 255)) < 60).all(-1) for n, _ in runs]
        assert not lines[1].any()
    assert "<h3>Missed by mit: " in text
    assert "with the lowest scores" not in text


def test_images_without_masks_are_decided_too(folder):
    dataset = Large(without_mask=9)
    evaluated(folder / "maskenlos", dataset, false_alarm_rate=RATE, holdout=2)
    text = write_report(folder / "m.html", [("m", folder / "maskenlos")]).read_text()
    assert "<h3>Missed: " in text
    assert "Defects found: highest score" in text
    assert all([*p] == ["Image", "Overlay", "Heat map"] for _, p, _ in cases(text))


def test_pictures_are_kept_at_full_resolution_up_to_a_limit():
    for given, kept in (((500, 800), (500, 800)), ((2000, 3200), (1000, 1600))):
        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 255, (given[0] // 50, given[1] // 50, 3), np.uint8)
        image = coarse.repeat(50, 0).repeat(50, 1)
        stored = gallery.picture(image)
        assert (stored.dtype, stored.ndim) == (np.uint8, 1)
        assert gallery.opened(stored).shape == (*kept, 3)


def test_the_command_for_thresholds_can_be_pasted(tmp_path, monkeypatch, capsys):
    """It is the same evaluation, but for the rate."""
    monkeypatch.chdir(tmp_path)
    argv = (
        "--config=configs/knn.py:smoke", "--config.data.categories=('wood',)",
        "--config.evaluation.image_size=32", "--config.evaluation.gallery=1",
        "--workdir=Prüfung 1",
    )  # fmt: skip
    assert main.main(["evaluate", *argv]) == 0
    hint = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(hint)[1:] == ["report", str(tmp_path / "Prüfung 1")]
    assert main.main(["report", "Prüfung 1"]) == 0
    page = Page((tmp_path / "Prüfung 1" / "report.html").read_text())
    command = next(t for t in page.texts if t.startswith("dsad evaluate"))
    _, name, *words = shlex.split(command)
    parser = flags.Command(name, "", config="configs/knn.py")
    for flag in ("workdir",):
        parser.string(flag, "", "")
    again, values, rest = parser.parse(words)
    first, *_ = parser.__class__(name, "", config="configs/knn.py").parse(argv[:-1])
    with first.unlocked():
        first.evaluation.false_alarm_rate = 0.05
    assert again.to_dict() == first.to_dict()
    assert (values.workdir, rest) == ("Prüfung 1-decided", [])
