"""What a detector shows beside its map: made for the gallery's cases, drawn in its own rows."""

import base64
import dataclasses
import html
import io
import re

import jax
import numpy as np
import PIL.Image
import pytest

from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.detectors import isstad
from dsad.evaluation.localize import EvalConfig, localize, read_results, write_results
from dsad.evaluation.preprocessing import Preprocessing
from dsad.evaluation.report import gallery, panels
from dsad.evaluation.report.page import write_report
from tests.backbones import Plain, static
from tests.evaluation.test_localize import Distance, Planted, PlantedSource, Pooled


@dataclasses.dataclass(frozen=True)
class Maps(Plain):
    """Colour above grey as probability and a tenth of its square as error; pixels as they are."""

    mean: tuple = static(default=(0.0, 0.0, 0.0))
    std: tuple = static(default=(1.0, 1.0, 1.0))
    names = ("probability", "error", "reconstruction")

    def maps(self, images):
        excess = images.max(-1, keepdims=True) - images.min(-1, keepdims=True)
        made = {"probability": excess, "error": 0.1 * excess**2, "reconstruction": images}
        return {n: made[n] for n in self.names}


DATA = Planted(categories=("disc", "ring"))
CONFIG = EvalConfig(image_size=48, batch_size=8, workers=1, gallery=3)


def run(backbone, detector, devices=1, config=CONFIG):
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    return localize(backbone, detector, DATA, config, mesh=mesh, key=jax.random.key(0))


@pytest.fixture(scope="module")
def detector():
    return isstad.build(isstad.Config(sigma=1.0))


@pytest.fixture(scope="module")
def folder(detector, tmp_path_factory):
    root = tmp_path_factory.mktemp("panels")
    write_results(run(Maps(), detector), root / "maps")
    write_results(run(Pooled(), Distance(sigma=0.0)), root / "plain")
    return root


def excess(sample):
    """What the network sees of a sample."""
    small = Preprocessing(height=48, width=48).to_input(sample.image) / 255
    return small, small.max(-1) - small.min(-1)


def test_panels_are_the_maps_of_the_cases_at_original_aspect(folder):
    found = read_results(folder / "maps")
    source = DATA.source("test", "ring")
    numbers = sorted({n for ns in found.cases["ring"].values() for n in ns})
    assert panels.names(found.gallery) == ["reconstruction", "error", "probability"]
    own = [k for k in found.gallery if k.startswith("panel/") and "/ring/" in k]
    assert len(own) == 3 * len(numbers) == 3 * 6  # one of each section
    errors = [0.1 * excess(source[n])[1] ** 2 for n in numbers]
    top = found.scales["ring"]["panel_p99_9/error"]
    assert top == pytest.approx(np.quantile(errors, 0.999), rel=1e-4)
    assert found.scales["ring"]["panel_top/probability"] == 1.0
    for n, error in zip(numbers, errors, strict=True):
        pixels, probability = excess(source[n])
        wanted = {"reconstruction": pixels, "error": error / top, "probability": probability}
        for name, values in wanted.items():
            array = found.gallery[f"panel/{name}/ring/{n}"]
            assert array.shape[:2] == (60, 40)  # the image is smaller than a picture may be
            levels = np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)
            expected = PIL.Image.fromarray(levels).resize((40, 60), PIL.Image.Resampling.BILINEAR)
            np.testing.assert_allclose(np.int32(array), np.int32(expected), atol=1)


@pytest.mark.parametrize("shown", [True, False], ids=["panels", "no panels"])
def test_a_pictured_image_is_decoded_once(shown, detector, monkeypatch, folder):
    decoded, get = [], PlantedSource.__getitem__

    def counting(self, index):
        decoded.append(self.records[index].path)
        return get(self, index)

    monkeypatch.setattr(gallery, "PICTURE_SIDE", 32)
    with monkeypatch.context() as patch:
        patch.setattr(PlantedSource, "__getitem__", counting)
        results = run(*((Maps(), detector) if shown else (Pooled(), Distance())))
    tests = [p for p in decoded if "/test/" in p]
    assert sorted(tests) == sorted(r.path for r in DATA.source("test").records)
    source = DATA.source("test", "disc")
    for n in {n for numbers in results.cases["disc"].values() for n in numbers}:
        picture = PIL.Image.fromarray(source[n].image).resize((21, 32), PIL.Image.LANCZOS)
        stored = gallery.opened(results.gallery[f"image/disc/{n}"])
        assert abs(stored - np.float64(picture)).mean() < 4  # to what JPEG keeps
        mask = PIL.Image.fromarray(np.uint8(255 * source[n].mask)).resize((21, 32), PIL.Image.BOX)
        np.testing.assert_array_equal(results.gallery[f"mask/disc/{n}"], np.asarray(mask) >= 64)


def test_devices_change_nothing(folder, detector):
    one, eight = read_results(folder / "maps").gallery, run(Maps(), detector, devices=8).gallery
    for name in [n for n in one if n.startswith("panel/")]:
        np.testing.assert_allclose(np.int32(eight[name]), np.int32(one[name]), atol=1)


def test_no_gallery_no_panels(detector):
    class Without(Maps):
        names = ("probability", "error")

    config = EvalConfig(image_size=48, batch_size=8, workers=1, gallery=0)
    assert panels.names(run(Without(), detector, config=config).gallery) == []
    with pytest.raises(ConfigError, match="no feature map reconstruction; it has: error, proba"):
        run(Without(), detector)


def articles(text):
    return re.findall(r'<article class="case">(.*?)</article>', text, re.S)


def captions(text):
    return [html.unescape(c) for c in re.findall(r"<figcaption>([^<]*)<", text)]


def test_the_report_shows_them_with_their_scales(folder, tmp_path):
    path = write_report(tmp_path / "r.html", [("isstad", folder / "maps")])
    text = path.read_text()
    found = read_results(folder / "maps")
    for category in DATA.categories:
        top = found.scales[category]["panel_p99_9/error"]
        assert f"error from 0 to {top:.4g}, the 99.9th percentile" in text
    assert "probability from 0 to 1." in text
    assert len(articles(text)) == 12
    for case in articles(text):
        assert captions(case)[-3:] == ["reconstruction", "error", "probability"]
    # The reconstruction of the first case, the best: its image, to what JPEG keeps.
    uris = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', articles(text)[0])
    pictures = [PIL.Image.open(io.BytesIO(base64.b64decode(u))) for u in uris]
    assert [p.size for p in pictures] == [(40, 60), *[(171, 256)] * 6]
    pictures[0] = pictures[0].resize((171, 256))
    image, reconstruction = (np.asarray(p, np.float64) for p in (pictures[0], pictures[-3]))
    assert abs(image - reconstruction).mean() < 6


def test_other_runs_have_no_panels(folder, tmp_path):
    alone = write_report(tmp_path / "a.html", [("plain", folder / "plain")]).read_text()
    assert "percentile over the pictured" not in alone
    assert 'class="panels"' not in alone
    given = [("plain", folder / "plain"), ("isstad", folder / "maps")]
    both = write_report(tmp_path / "b.html", given, allow_different=True).read_text()
    shown = [captions(case)[6:] for case in articles(both)]
    row = [f"isstad: {n}" for n in ("reconstruction", "error", "probability")]
    assert row in shown
    assert all(s in ([], row) for s in shown)
    assert "for the images that isstad chose itself" in both
