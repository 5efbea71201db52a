"""The report: its numbers, self-contained, refuses what does not compare, shows every run."""

import base64
import dataclasses
import html.parser
import io
import json
import re

import jax
import matplotlib
import numpy as np
import PIL.Image
import pytest

from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.evaluation.localize import EvalConfig, localize, write_results
from dsad.evaluation.report import cases, figures, page
from dsad.evaluation.report.page import write_report
from dsad.evaluation.support import Sampling
from tests.evaluation.test_localize import Distance, Planted, Pooled


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two comparable runs: the second backbone sees blue only."""

    class Blue(Pooled):
        def maps(self, images):
            maps = super().maps(images)
            return {n: m.at[..., :2].set(0.0) for n, m in maps.items()}

    root = tmp_path_factory.mktemp("runs")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = EvalConfig(image_size=48, workers=1)
    dataset = Planted(categories=("disc", "tile & co"), strength=9)
    found = {}
    for name, backbone in (("all", Pooled()), ("blue", Blue(arch="blue <only> $x_1$"))):
        found[name] = localize(
            backbone, Distance(), dataset, config, mesh=mesh, key=jax.random.key(0), name=name
        )
        write_results(found[name], root / name)
    return root, found


@pytest.fixture(scope="module")
def single(runs):
    """The page of the first run."""
    root, _ = runs
    return write_report(root / "single" / "report.html", [("all", root / "all")])


@pytest.fixture(scope="module")
def double(runs):
    """The page of both runs."""
    root, _ = runs
    given = [("all", root / "all"), ("only blue", root / "blue")]
    return write_report(root / "double.html", given).read_text()


class Page(html.parser.HTMLParser):
    """Attributes and texts of a page; counts open elements."""

    def __init__(self, text):
        super().__init__()
        self.attributes, self.texts, self.stack = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        if tag not in ("meta", "img", "br", "link"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, k, v or "") for k, v in attrs]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_self_contained_and_well_formed(single):
    text = single.read_text()
    page = Page(text)
    assert page.stack == []
    for _, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "data", "action"):
            assert value.startswith(("data:image/", "#")), value[:80]
    assert not re.search(r"https?://|url\((?!#)|@import|<script|<link", text)
    assert len(text) < 8_000_000
    assert [p.name for p in single.parent.iterdir()] == ["report.html"]


def rows_of(text, heading):
    """Label and cells (style, value) of the rows below a heading of the page."""
    body = text[text.index(heading) :]
    rows = re.findall(r"<tr class=\"[^\"]*\">(.*?)</tr>", body[: body.index("</table>")], re.S)
    cells = [re.findall(r"<td class=\"number ?([^\"]*)\">([^<]*)</td>", r) for r in rows]
    labels = [re.sub(r"<[^>]*>", "", r.split('<td class="number')[0]) for r in rows]
    return list(zip(labels, cells, strict=True))


def test_the_numbers_and_differences_are_those_of_the_results(runs, double):
    _, found = runs
    rows = rows_of(double, "<h2>Numbers</h2>")
    assert [label for label, _ in rows] == [
        "discall", "only blue", "only blue − all",
        "tile &amp; coall", "only blue", "only blue − all",
        "Meanall", "only blue", "only blue − all",
    ]  # fmt: skip
    names = list(found["all"].mean)
    both = [found["all"].mean, found["blue"].mean]
    for (_, cells), mean in zip(rows[6:8], both, strict=True):
        assert [value for _, value in cells] == [f"{mean[m]:.3f}" for m in names]
    for m, left, right, gap in zip(names, *(cells for _, cells in rows[6:]), strict=True):
        assert ("best" in left[0]) == (left[1] >= right[1])
        assert ("best" in right[0]) == (right[1] >= left[1])
        change = both[1][m] - both[0][m]
        assert float(gap[1].replace("−", "-")) == pytest.approx(change, abs=6e-4)
        assert ("up" in gap[0]) == (round(change, 3) > 0)
        assert ("down" in gap[0]) == (round(change, 3) < 0)
    kinds = re.findall(r'<th class="name plain" rowspan="3">(\w+)</th><td[^>]*>(\d+)<', double)
    assert kinds == [("blue", "3"), ("red", "3")] * 2


def test_runs_lie_side_by_side_on_the_same_images(runs, double):
    _, found = runs
    articles = re.findall(r'<article class="case">(.*?)</article>', double, re.S)
    paths = [re.search(r'<div class="small muted path">([^<]*)<', a)[1] for a in articles]
    assert len(set(paths)) == len(paths) > 0  # no image twice
    stored = {
        found["all"].images[c][n]["path"]
        for c, sections in found["all"].cases.items()
        for numbers in sections.values()
        for n in numbers
    }
    assert stored <= {p.replace("&amp;", "&") for p in paths}
    for article in articles:
        captions = re.findall(r"<figcaption>([^<]*)<", article)
        assert captions[:3] == ["Image", "all: overlay", "only blue: overlay"]
        assert captions[3] in ("Annotated defect", "No annotated defect")
        assert captions[4:] == ["all: heat map", "only blue: heat map"]
    assert "localizes better than" in double
    assert "<h3>disc: Good images with the highest scores, all" in double
    picture = re.search(r'src="data:image/jpeg;base64,([^"]*)"', double)
    assert picture
    assert PIL.Image.open(io.BytesIO(base64.b64decode(picture[1]))).size == (40, 60)


def test_images_that_one_run_localizes_better(runs):
    """The first heading names what the second run gains, ordered by the gain itself."""
    _, found = runs
    given = [page.Run(n, found[k], "#000") for n, k in (("A", "all"), ("B", "blue"))]
    parts = cases.sections(given, "disc", 9, 64)
    above = {c["entry"]["path"] for section in parts["wrong"] for c in section["cases"]}
    made = parts["others"]
    own = [{x["path"]: x["pixel_auroc"] for x in r.results.images["disc"]} for r in given]
    gains = {p: own[1][p] - own[0][p] for p in own[0] if own[0][p] is not None}
    better = sorted((p for p in gains if gains[p] > 0), key=lambda p: -gains[p])[:3]
    worse = sorted((p for p in gains if gains[p] < 0), key=lambda p: gains[p])[:3]
    titled = {s["title"]: [c["entry"]["path"] for c in s["cases"]] for s in made}
    assert better or worse
    for title, expected in (("B localizes better", better), ("A localizes better", worse)):
        shown = [paths for t, paths in titled.items() if t.startswith(title)]
        fresh = [p for p in expected if p not in above]
        assert shown == ([fresh] if fresh else [])
    # A's map of an image is in A's normal scale, B's in B's.
    maps = [r.results.gallery["map/disc/5"] for r in given]
    every = [c for sections in parts.values() for s in sections for c in s["cases"]]
    case = next(c for c in every if c["entry"]["path"].endswith("blue/000.png"))
    size = PIL.Image.open(io.BytesIO(base64.b64decode(case["pictures"][-1][1].split(",")[1]))).size
    mask = found["all"].gallery["mask/disc/5"]
    mask = np.asarray(PIL.Image.fromarray(mask).resize(size, PIL.Image.Resampling.NEAREST))
    for (_, uri), units in zip(case["pictures"][-2:], maps, strict=True):
        heat = figures.outline(figures.heat(units, size), mask, figures.ANNOTATED)
        assert uri == figures.data_uri(heat)


def test_seeds_and_thresholds_are_on_the_page(tmp_path):
    found = localize(
        Pooled(), Distance(), Planted(strength=9),
        EvalConfig(image_size=48, workers=1, false_alarm_rate=0.2, holdout=2),
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]), key=jax.random.key(0),
        sampling=Sampling(shots=5, seeds=(0, 4)),
    )  # fmt: skip
    write_results(found, tmp_path / "few")
    text = write_report(tmp_path / "r.html", [("few", tmp_path / "few")]).read_text()
    _, cells = rows_of(text, "<h2>Numbers</h2>")[-1]
    mean, std = found.mean, found.std["mean"]
    assert {*std.values()} >= {0.0}  # nothing is said of what all seeds share
    shown = {m: f" ± {x:.3f}" if x else "" for m, x in std.items()}
    assert [v for _, v in cells] == [f"{mean[m]:.3f}{shown[m]}" for m in mean]
    assert "over\n  2 seeds (0, 4)" in text
    assert "support sets of\n  5 images per category; mean ±" in text
    assert "7 training images,\n  5 of them for the detector,\n  2 held out of a second fit" in text
    assert "Thresholds from normal images" in text
    rows = list(found.thresholds["disc"].values())
    rate = np.mean([r["image_false_alarms"] for r in rows])
    assert f'<td class="number">{100 * rate:.2f} %</td>' in text


def test_one_run_shows_its_own_cases_with_overlays(single):
    text = single.read_text()
    for heading in (
        "disc: Defective images with the lowest scores", "disc: Good images with the highest score",
        "Other defective images: lowest pixel AUROC", "Other good images",
    ):  # fmt: skip
        assert f"<h3>{heading}" in text
    case = re.findall(r'<article class="case">(.*?)</article>', text, re.S)[0]
    captions = re.findall(r"<figcaption>([^<]*)<", case)
    assert captions == ["Image", "Overlay", "Annotated defect", "Heat map"]
    assert "localizes better" not in text


def test_different_stamps_are_refused_by_name(runs, tmp_path):
    root, found = runs
    mark = found["blue"].stamp | {"fpr_limit": 0.05}
    write_results(dataclasses.replace(found["blue"], stamp=mark), root / "other")
    given = [("all", root / "all"), ("other", root / "other")]
    with pytest.raises(ConfigError, match=r"all / other: fpr_limit: 0\.3 against 0\.05"):
        write_report(tmp_path / "r.html", given)
    assert not (tmp_path / "r.html").exists()
    text = write_report(tmp_path / "r.html", given, allow_different=True).read_text()
    assert "do not mean the same" in text
    assert "fpr_limit: 0.3 against 0.05" in text


def test_runs_need_names_and_folders(runs, tmp_path):
    root, _ = runs
    with pytest.raises(ConfigError, match="distinct names"):
        write_report(tmp_path / "r.html", [])
    with pytest.raises(ConfigError, match="distinct names"):
        write_report(tmp_path / "r.html", [("a", root / "all"), ("a", root / "blue")])
    with pytest.raises(WorkdirError, match=r"results\.json: no such file"):
        write_report(tmp_path / "r.html", [("a", tmp_path)])


def test_training_curves_and_config(runs, tmp_path):
    root, _ = runs
    folder = tmp_path / "train"
    folder.mkdir()
    given = [("all", root / "all")]
    with pytest.raises(WorkdirError, match=r"metrics\.jsonl: no such file"):
        write_report(tmp_path / "r.html", given, folder)
    rows = [{"step": i, "loss": 1 / (i + 1), "lr": 0.1, "images_per_s": None} for i in range(80)]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (folder / "metrics.jsonl").write_text(lines + '{"step": 80, "lo')
    (folder / "config.json").write_text('{"name": "<ds2>", "seed": 17}')
    text = write_report(tmp_path / "r.html", given, folder).read_text()
    assert 'aria-label="Loss"' in text
    assert 'aria-label="Learning rate"' in text
    assert "Images per second" not in text
    assert "&lt;ds2&gt;" in text
    assert "79 steps" in text
    (folder / "metrics.jsonl").write_text("nonsense\n" + lines)
    with pytest.raises(WorkdirError, match=r"line 1 is not JSON"):
        write_report(tmp_path / "r.html", given, folder)


def test_the_page_shrinks_to_its_limit_and_is_reproducible(runs, single, tmp_path, monkeypatch):
    root, _ = runs
    again = write_report(tmp_path / "a.html", [("all", root / "all")])
    assert again.read_bytes() == single.read_bytes()
    full = single.stat().length
    monkeypatch.setattr(page, "LIMIT", full * 2 // 3)
    small = write_report(tmp_path / "b.html", [("all", root / "all")]).stat().length
    assert small < full * 2 // 3


def test_figures_leave_no_global_state():
    before = dict(matplotlib.rcParams)
    svg = figures.series_chart(np.arange(5.0), np.arange(5.0), "A < b & $c$", name="x")
    assert dict(matplotlib.rcParams) == before
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert "$c$" in svg


def test_heat_scale_and_outline():
    units = np.array([[0.0, 1.0], [figures.TOP, 99.0]], np.float32)
    colours = figures.heat(units, (2, 2)).astype(int)
    table = matplotlib.colormaps["inferno"](np.arange(256), bytes=True)[:, :3].astype(int)
    assert np.array_equal(colours[0, 0], table[0])
    assert np.array_equal(colours[0, 1], table[128])
    assert np.array_equal(colours[1, 0], table[255])
    assert np.array_equal(colours[1, 1], table[255])
    mask = np.zeros((20, 20), bool)
    mask[8:12, 8:12] = True
    drawn = figures.outline(np.zeros((20, 20, 3), np.uint8), mask)
    ring = (drawn == figures.OUTLINE).all(-1)
    assert not (ring & mask).any()
    assert ring[6, 9]
    assert ring[5, 9]
    assert ring.sum() == 10**2 - 6**2
    mask[8:, 8:12] = True  # cut off by the picture: there the line is on its edge
    ring = (figures.outline(np.zeros((20, 20, 3), np.uint8), mask) == figures.OUTLINE).all(-1)
    assert ring[18:, 8:12].all()
    assert not ring[8:18, 8:12].any()
    calm = figures.overlay(np.full((2, 2, 3), 90, np.uint8), np.zeros((2, 2), np.float32))
    assert (calm == 90).all()
