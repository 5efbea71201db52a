"""Saved maps: read back they give the numbers of the results, in the layout of MVTec AD."""

import io
import json

import numpy as np
import PIL.Image
import pytest
import tifffile
from sklearn import metrics as oracle

from dsad.core import paths
from dsad.core.errors import ConfigError, DataError
from dsad.evaluation import maps
from tests.evaluation.test_localize import Planted
from tests.evaluation.test_support import run


def read_map(path):
    """A map (h, w) as written: exact from TIFF, within half a step from PNG."""
    file = paths.directory(path)
    content = io.BytesIO(file.read_bytes())
    if file.suffix == ".tiff":
        return tifffile.imread(content)
    scale = json.loads(file.with_suffix(".json").read_text())
    with PIL.Image.open(content) as picture:
        levels = np.asarray(picture, np.float64)
    return np.asarray(scale["offset"] + levels * scale["step"], np.float32)


@pytest.mark.parametrize(("kind", "bound"), [("tiff", 1e-12), ("png", 1e-4)])
def test_pixel_auroc_from_the_files_is_that_of_the_results(tmp_path, kind, bound):
    dataset = Planted(strength=9)
    results = run(dataset, save_maps=kind, folder=tmp_path)
    root = tmp_path / "anomaly_maps"
    test = dataset.source("test", "disc")
    scores = [read_map(maps.map_path(root, r.path, kind)) for r in test.records]
    assert all(s.shape == (60, 40) and s.dtype == np.float32 for s in scores)
    truth = np.ravel([test[i].mask for i in range(len(test))])
    found = oracle.roc_auc_score(truth, np.ravel(scores))
    assert found == pytest.approx(results.categories["disc"]["pixel_auroc"], abs=bound)
    for row, values in zip(results.images["disc"], scores, strict=True):
        assert values.max() == pytest.approx(row["max"], rel=1e-6)
    assert json.loads((root / "stamp.json").read_text())["fpr_limit"] == 0.3
    files = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    expected = {r.path.removesuffix("png") + kind for r in test.records}
    scales = {r.path.removesuffix("png") + "json" for r in test.records} if kind == "png" else set()
    assert files == expected | scales | {"stamp.json"}  # no temporary file is left


def test_files_are_what_other_programs_expect(tmp_path):
    scores = np.linspace(-2, 7, 35 * 20).reshape(35, 20)
    path = maps.MapWriter(tmp_path, "tiff").write("cup/test/hole/003.crop.jpg", scores)
    assert path == tmp_path / "cup/test/hole/003.crop.tiff"
    stored = tifffile.imread(path)
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, scores.astype(np.float32))
    assert PIL.Image.open(path).mode == "F"
    path = maps.MapWriter(tmp_path, "png").write("cup/test/hole/003.jpg", scores)
    with PIL.Image.open(path) as picture:
        assert picture.mode.startswith("I;16")
        assert picture.getextrema() == (0, 65535)
    half = 9 / 65535 / 2
    np.testing.assert_allclose(read_map(path), scores, atol=half * 1.01)
    flat = maps.MapWriter(tmp_path, "png").write("flat.png", np.full((3, 4), 1.5))
    np.testing.assert_array_equal(read_map(flat), np.full((3, 4), 1.5, np.float32))


def test_maps_are_written_as_they_are_made(tmp_path, monkeypatch):
    """A run that dies in the middle leaves whole files of what was scored before."""
    write = maps.MapWriter.write
    count = iter(range(100))

    def dying(self, path, scores):
        if next(count) == 6:
            raise RuntimeError("power cut")
        return write(self, path, scores)

    monkeypatch.setattr(maps.MapWriter, "write", dying)
    with pytest.raises(RuntimeError, match="power cut"):
        run(save_maps="tiff", folder=tmp_path)
    files = sorted(tmp_path.rglob("*.tiff"))
    assert len(files) == 6
    assert all(read_map(f).shape == (60, 40) for f in files)


def test_every_seed_has_a_folder(tmp_path):
    results = run(save_maps="tiff", folder=tmp_path, shots=1, seeds=(0, 4))
    dataset = Planted(strength=9)
    test = dataset.source("test", "disc")
    truth = np.ravel([test[i].mask for i in range(len(test))])
    for seed in ("0", "4"):
        root = tmp_path / f"anomaly_maps_seed{seed}"
        scores = [read_map(maps.map_path(root, r.path, "tiff")) for r in test.records]
        expected = results.seeds[seed]["categories"]["disc"]["pixel_auroc"]
        assert oracle.roc_auc_score(truth, np.ravel(scores)) == pytest.approx(expected, abs=1e-12)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ConfigError, match="a folder is needed"):
        run(save_maps="tiff")
    maps.check_paths(["a/0.png", "a/1.jpg", "b/0.jpg"], "tiff")
    with pytest.raises(DataError, match=r"a/0\.png and a/0\.jpg"):
        maps.check_paths(["a/0.png", "a/0.jpg"], "tiff")
    for path in ("/etc/0.png", "a/../../0.png"):
        with pytest.raises(DataError, match="relative to the data set"):
            maps.MapWriter(tmp_path, "tiff").write(path, np.zeros((2, 2)))
    with pytest.raises(DataError, match="NaN"):
        maps.MapWriter(tmp_path, "png").write("b.png", np.array([[np.nan]]))
