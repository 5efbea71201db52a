"""``dsad fit`` and ``dsad predict``: the numbers of an evaluation, decisions, names and faults."""

import csv
import errno
import json
import math
import os
import pathlib
import shlex
import shutil
import types
import weakref

import jax
import numpy as np
import PIL.Image
import pytest
import scipy.stats
import tifffile

import dsad
from dsad.assembly import evaluate, pictures, predict, training
from dsad.assembly.model import FittedModel, Saved
from dsad.assembly.saving import FORMAT
from dsad.cli import main
from dsad.core import paths
from dsad.core.errors import ConfigError, DataError, StoppedError, WorkdirError
from dsad.core.mesh import make_mesh
from dsad.core.types import RunInfo
from dsad.data import base
from dsad.evaluation import preprocessing, support, thresholds
from dsad.evaluation.localize import read_results
from tests.assembly.test_model import LIGHT, SMALL, same
from tests.helpers import real_data

RATE = "--config.evaluation.false_alarm_rate=0.3"
ONE = (*SMALL, *LIGHT, "--config.data.categories=('wood',)")


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        yield


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An evaluation with its model, and its test images as files."""
    place = tmp_path_factory.mktemp("predict")
    argv = (*ONE, RATE, "--config.evaluation.save_maps=tiff")
    given = (f"--workdir={place / 'live'}", f"--save-model={place / 'model'}")
    assert main.main(["evaluate", *argv, *given]) == 0
    config = Saved.read(place / "model").config()["data"]
    synthetic = base.SyntheticConfig(**config["synthetic"])
    data = base.load(base.DataConfig(**{**config, "synthetic": synthetic}))
    for split in ("train", "test"):
        source = data.source(split)
        for i, record in enumerate(source.records):
            save(place / record.path, source[i].image)
    return place


def run(*argv):
    return main.main(["predict", *map(str, argv)])


def fails(capsys, *argv, code=2):
    capsys.readouterr()
    assert run(*argv) == code
    return " ".join(capsys.readouterr().err.split())


def rows(place):
    with open(place / "predictions.csv", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    lines = (place / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["path"] for line in lines] == [row["path"] for row in found]
    return found, [json.loads(line) for line in lines]


def test_predictions_are_those_of_the_evaluation(folder, tmp_path, capsys):
    live = read_results(folder / "live")
    assert (
        run(folder / "model", folder / "wood" / "test", f"--out={tmp_path}/p", "--maps=tiff") == 0
    )
    found, lines = rows(tmp_path / "p")
    expected = {row["path"]: row for row in live.images["wood"]}
    assert len(found) == len(expected)
    flagged, row = [0, 0], live.thresholds["wood"]["0"]
    for got, line in zip(found, lines, strict=True):
        name = got["path"].removeprefix(f"{folder}/")
        image = expected[name]
        assert float(got["score"]) == pytest.approx(image["score"], abs=1e-5)
        assert float(got["peak"]) == pytest.approx(image["max"], abs=1e-5)
        flagged[image["label"]] += got["flagged"] == "True"
        below = np.mean(np.array(row["scores"]) < line["score"])
        assert float(got["percentile"]) == pytest.approx(100 * below)
        short = name.removeprefix("wood/test/").replace(".png", "")
        scores = tifffile.imread(tmp_path / "p" / "maps" / f"{short}.tiff")
        saved = tifffile.imread(folder / "live" / "anomaly_maps" / name.replace(".png", ".tiff"))
        np.testing.assert_allclose(scores, saved, atol=1e-5)
        region = np.max(row["maxima"])  # three held out: the highest
        assert sum(r["area"] for r in line["regions"]) == (scores > region).sum()
        assert PIL.Image.open(tmp_path / "p" / got["overlay"]).size == (48, 48)
        if line["regions"]:
            first = line["regions"][0]
            assert [int(got[k]) for k in ("left", "top", "right", "bottom")] == first["box"]
    counts = live.categories["wood"]["counts"]
    decision = f"{flagged[1]} of {counts['anomalous']} defects found, {flagged[0]} of "
    assert row["decision"].startswith(f"{decision}{counts['normal']} false alarms at 30 %")
    about = json.loads((tmp_path / "p" / "about.json").read_text())
    assert (about["flagged"], about["image"], about["bound"]) == (sum(flagged), row["image"], 0.25)
    assert f"{sum(flagged)} flagged; threshold" in capsys.readouterr().out


def test_the_command_that_fit_shows_can_be_pasted(folder, tmp_path, capsys):
    two = (*SMALL, *LIGHT, "--config.data.categories=('tiles', 'wood')", RATE)
    assert main.main(["fit", "--config=knn", *two, f"--out={tmp_path}/two"]) == 0
    shown = capsys.readouterr().out.partition("use it:\n")[2]
    image = next((folder / "wood" / "test" / "good").iterdir())
    for word, value in (("IMAGES", image), ("CATEGORY", "wood"), ("=DIR", f"={tmp_path}/p")):
        shown = shown.replace(word, str(value))
    assert main.main(shlex.split(shown)[1:]) == 0


def test_fit_is_the_fit_of_an_evaluation(folder, tmp_path, capsys):
    assert main.main(["fit", "--config=knn", *ONE, RATE, f"--out={tmp_path}/m"]) == 0
    text = capsys.readouterr().out
    assert "wood: fitted on 6 good pictures; a second fit without 3 set the threshold" in text
    assert "false alarms at most 30 %" in text
    one, other = Saved.read(tmp_path / "m"), Saved.read(folder / "model")
    assert one.index["sha256"] == other.index["sha256"]
    for name in ("scores", "maxima", "weights", "image", "image_bound", "pixel"):
        assert one.threshold("wood")[name] == other.threshold("wood")[name]
    assert one.index["normals"] == other.index["normals"]
    assert one.index["normals"]["wood"]["width"] == [48, 48]
    assert "no decision" not in one.threshold("wood")
    argv = ["fit", "--config=knn", *ONE, RATE, f"--out={tmp_path}/m"]
    assert main.main(argv) == 2
    assert "holds a model. Replace it with --overwrite" in " ".join(capsys.readouterr().err.split())


def test_names_of_any_kind_keep_their_folders(folder, tmp_path):
    root = tmp_path / "Prüfung [1] *"
    images = sorted((folder / "wood" / "test" / "good").iterdir())
    for name in ("a b/ü [0].png", "c/ü [0].png", "c/ü [0].bmp", "c/.hidden.png", "c/notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("bmp"):
            save(root / name, np.asarray(PIL.Image.open(images[1])))
        else:
            shutil.copy(images[0], root / name)
    assert run(folder / "model", root, root / "c" / "ü [0].bmp", f"--out={root}/out") == 0
    found, _ = rows(root / "out")
    assert pictures.names(["x/a.png", "x/a.png/b.png"]) == ["a.png", "a.png/b.png"]
    assert sorted(row["overlay"] for row in found) == [
        "overlays/a b/ü [0].png", "overlays/c/ü [0].bmp.png", "overlays/c/ü [0].png.png",
    ]  # fmt: skip
    assert all((root / "out" / row["overlay"]).is_file() for row in found)
    assert run(folder / "model", root, f"--out={root}/out", "--overwrite") == 0  # not of overlays
    assert len(rows(root / "out")[0]) == 3
    pattern = f"{folder}/wood/test/g*/*.png"
    assert pictures.matching([pattern, pattern]) == [str(path) for path in images]


def test_no_folder_is_left_out_in_silence(tmp_path, monkeypatch):
    black = np.zeros((2, 2, 3), np.uint8)
    for name in ("in/a.png", "in/sub/b.png", "elsewhere/c.png"):
        save(tmp_path / name, black)
    top = tmp_path / "in"
    (top / "link").symlink_to(tmp_path / "elsewhere")
    (top / "sub" / "up").symlink_to(top)  # would never end
    images = [str(top / name) for name in ("a.png", "link/c.png", "sub/b.png")]
    assert pictures.matching([str(top)]) == images
    with pytest.raises(ConfigError, match="in/a.png: lies in .*, which takes the outputs"):
        pictures.matching([images[0]], without=str(top))
    listed = os.scandir

    def scandir(path):
        if os.path.basename(path) == "sub":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match="in/sub: the folder cannot be listed .Permission"):
        pictures.matching([str(top)])


def test_names_with_ends_of_lines_are_read_again(folder, tmp_path, capsys):
    first = sorted((folder / "wood" / "test" / "good").iterdir())[0]
    names = ["a\u2028b.png", "c\x85d.png", "e\nf.png", os.fsdecode(b"no text \xff.png")]
    (tmp_path / "in").mkdir()
    for name in names:
        shutil.copy(first, tmp_path / "in" / name)
    assert run(folder / "model", tmp_path / "in", f"--out={tmp_path}/p") == 0
    _, told = predict.read(str(tmp_path / "p"))
    assert sorted(pathlib.Path(row["path"]).name for row in told) == sorted(names)
    assert main.main(["report", f"{tmp_path}/p", f"--out={tmp_path}/page.html"]) == 0
    assert "overlays/no%20text%20%FF.png" in (tmp_path / "page.html").read_text()
    (tmp_path / "p" / "predictions.jsonl").write_text('{"path": "a.png"}\n')
    assert main.main(["report", f"{tmp_path}/p"]) == 2
    assert "not as dsad predict wrote it" in capsys.readouterr().err


def test_what_cannot_be_read_is_listed_and_passed_over(folder, tmp_path, capsys):
    shutil.copytree(folder / "wood" / "test" / "good", tmp_path / "in")
    whole = sorted((tmp_path / "in").iterdir())
    content = whole[0].read_bytes()
    (tmp_path / "in" / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "in" / "empty.png").write_bytes(b"")
    (tmp_path / "in" / "text.png").write_text("no picture")
    save(tmp_path / "in" / "dot.png", np.full((1, 1, 3), 90, np.uint8))
    (tmp_path / "in" / "gone.png").symlink_to("nowhere.png")
    assert run(folder / "model", tmp_path / "in", f"--out={tmp_path}/p") == 1
    out = capsys.readouterr().out
    assert f"not read: {tmp_path}/in/cut.png: " in out
    assert "7 images, " in out
    assert ", 4 not read; " in out
    assert f"; pictures: {tmp_path}/p/overlays" in out
    assert run(folder / "model", tmp_path / "in" / "cut.png", f"--out={tmp_path}/none") == 1
    assert "pictures:" not in capsys.readouterr().out
    assert not (tmp_path / "none" / "overlays").exists()
    found, lines = rows(tmp_path / "p")
    faults = {row["path"].rpartition("/")[2]: row["error"] for row in found}
    assert {name for name, text in faults.items() if text} == {
        "cut.png", "empty.png", "gone.png", "text.png",
    }  # fmt: skip
    assert "zero bytes" in faults["empty.png"]
    assert next(x for x in lines if x["path"].endswith("dot.png"))["width"] == 1
    assert run(folder / "model", *whole, f"--out={tmp_path}/q") == 0
    alone = {row["path"]: row["score"] for row in rows(tmp_path / "q")[0]}
    together = {row["path"]: row["score"] for row in found}
    assert all(float(together[p]) == pytest.approx(float(s)) for p, s in alone.items())


def test_another_rate_or_threshold_needs_no_fit(folder):
    model = FittedModel.load(folder / "model")
    scores = sorted(model.thresholds["wood"]["0"]["scores"])
    half = model.decision(rate=0.5)
    assert (half.image, half.bound) == (scores[1], 0.5)
    strict = model.decision(rate=0.01)
    assert (strict.image, strict.bound) == (scores[2], 0.25)
    assert str(strict).endswith(
        "false alarms at most 25 % (1 % needs 99 held-out images or groups, there are 3)"
    )
    chosen = model.decision(threshold=float(np.mean(scores[1:])))
    assert (chosen.bound, chosen.region) == (
        0.5,
        sorted(model.thresholds["wood"]["0"]["maxima"])[1],
    )
    assert str(chosen).endswith("as chosen, 1 of 3 held-out above it")
    low = model.decision(threshold=-1.0)
    image = np.asarray(PIL.Image.open(sorted((folder / "wood/test/good").iterdir())[0]))
    shown = model.predict(image, threshold=-1.0)
    assert (low.bound, shown.flagged, len(shown.regions)) == (1.0, True, 1)
    assert shown.regions[0].area == 48 * 48
    assert json.loads(json.dumps(low.region, allow_nan=False)) == low.region
    # Scores are float32, and no chart has room for what lies beyond.
    for given in ({"rate": 0.0}, {"rate": 1.0}, {"threshold": float("nan")}, {"threshold": 1e300}):
        with pytest.raises(ConfigError, match="expected a"):
            model.decision(**given)
    with pytest.raises(ConfigError, match="found both"):
        model.decision(rate=0.1, threshold=1.0)


def test_misuse_is_said_before_anything_is_written(folder, tmp_path, capsys):
    model, images = folder / "model", folder / "wood" / "test"
    out = f"--out={tmp_path}/p"
    assert "no such file or folder" in fails(capsys, model, tmp_path / "x.png", out)
    assert "no file matches this pattern" in fails(capsys, model, f"{tmp_path}/*.png", out)
    (tmp_path / "none").mkdir()
    assert "no image there" in fails(capsys, model, tmp_path / "none", out)
    assert "expected a model's directory" in fails(capsys, model, out)
    assert "--out=DIR is missing" in fails(capsys, model, images)
    assert "--rate: expected a number" in fails(capsys, model, images, out, "--rate=x")
    assert "expected a share" in fails(capsys, model, images, out, "--rate=5")
    assert "--maps: expected none or tiff" in fails(capsys, model, images, out, "--maps=png")
    assert "no fitted model there" in fails(capsys, tmp_path, images, out)
    told = fails(capsys, model, images, out, "--category=x")
    assert "expected a category, found 'x'" in told
    assert "--category=NAME" in told
    for content in ("{", "[]", f'{{"format": {FORMAT}}}', '{"format": 1}'):
        broken = tmp_path / "broken"
        shutil.copytree(model, broken, dirs_exist_ok=True)
        (broken / "model.json").write_text(content)
        assert "fit" in fails(capsys, broken, images, out).lower()
    shutil.copytree(model, tmp_path / "lost")
    (tmp_path / "lost" / "fitted-wood.safetensors").unlink()
    assert "cannot be read" in fails(capsys, tmp_path / "lost", images, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    text = fails(capsys, model, images, f"--out={tmp_path}/full", "--overwrite")
    assert "holds files but no predictions" in text
    assert (tmp_path / "full" / "letter.txt").read_text() == "dear"
    assert "found a file" in fails(capsys, model, images, f"--out={tmp_path}/full/letter.txt")
    assert not (tmp_path / "p").exists()


def test_a_stopped_run_leaves_partial_files_and_begins_anew(folder, tmp_path, capsys, monkeypatch):
    out = f"--out={tmp_path}/p"
    argv = (folder / "model", folder / "wood", out)

    def after(patch, name, stop, number):
        calls, whole = iter(range(10**6)), getattr(predict, name)

        def stopped(*given):
            if next(calls) == number:
                raise stop
            return whole(*given)

        patch.setattr(predict, name, stopped)

    with monkeypatch.context() as patch:
        after(patch, "_counted", KeyboardInterrupt(), 3)
        text = fails(capsys, *argv, code=130)
    assert "stopped after 3 of 13 images" in text
    assert "The same command begins anew" in text
    names = {p.name for p in (tmp_path / "p").iterdir()}
    assert names == {
        "about.json",
        "overlays",
        "predictions.csv.partial",
        "predictions.jsonl.partial",
    }
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        after(patch, "_filled", full, 2)  # in a thread
        assert "the disk or quota is full" in fails(capsys, *argv)
    assert not (tmp_path / "p" / "predictions.csv").exists()
    assert run(*argv) == 0
    found, _ = rows(tmp_path / "p")
    assert len(found) == 13
    assert not list((tmp_path / "p").glob("*.partial"))
    assert "holds predictions. Replace them with --overwrite" in fails(capsys, *argv)
    assert run(*argv, "--overwrite") == 0


def test_a_map_that_is_not_finite_is_a_fault_of_its_image(folder, tmp_path, monkeypatch):
    """Whatever its score is; JSON has no such numbers."""
    whole = FittedModel.stream

    def broken(self, source, **how):
        for images, count in whole(self, source, **how):
            values = np.array(images[1].map)
            values[0, 0] = np.nan
            images[1] = images[1]._replace(map=values)
            yield images, count

    monkeypatch.setattr(FittedModel, "stream", broken)
    assert run(folder / "model", folder / "wood" / "test" / "good", f"--out={tmp_path}/p") == 1
    found, _ = rows(tmp_path / "p")
    assert ["not finite" in row["error"] for row in found] == [i == 1 for i in range(len(found))]


def test_a_kill_before_the_last_file_blocks_no_retry(folder, tmp_path, monkeypatch):
    argv = (folder / "model", folder / "wood" / "test", f"--out={tmp_path}/p")
    write = paths.write_whole

    def killed(path, *content):
        if "stamp" in str(content):
            raise SystemExit
        return write(path, *content)

    with monkeypatch.context() as patch:
        patch.setattr(paths, "write_whole", killed)
        with pytest.raises(SystemExit):
            run(*argv)
    assert (tmp_path / "p" / "predictions.csv").exists()
    with pytest.raises(WorkdirError, match="were stopped. Run `dsad predict` again"):
        predict.read(str(tmp_path / "p"))
    assert run(*argv) == 0
    assert predict.read(str(tmp_path / "p")) is not None
    assert run(*argv) == 2


def test_a_stopped_fit_leaves_no_model(tmp_path, capsys, monkeypatch):
    def stop(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "write_model", stop)
    assert main.main(["fit", "--config=knn", *ONE, RATE, f"--out={tmp_path}/m"]) == 130
    assert "holds no new model" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(WorkdirError, match="no fitted model there"):
        Saved.read(tmp_path / "m")
    assert not list((tmp_path / "m").iterdir())


def test_few_images_are_held_at_a_time(folder, tmp_path, monkeypatch):
    """However many there are: a batch is decoded ahead, one scored, one written; few maps."""
    image = np.asarray(PIL.Image.open(sorted((folder / "wood/test/good").iterdir())[0]))
    for i in range(60):
        save(tmp_path / "in" / f"{i:02d}.png", image)
    decoded, most, maps, live = [], [], [], []
    filled = predict._filled
    monkeypatch.setattr(
        predict, "_filled",
        lambda prediction: maps.append(weakref.ref(prediction.map)) or filled(prediction),
    )  # fmt: skip
    whole = pictures._Pictures.decoded
    monkeypatch.setattr(
        pictures._Pictures, "decoded",
        lambda self, index: decoded.append(index) or whole(self, index),
    )  # fmt: skip
    model = FittedModel.load(folder / "model")
    decision, images = model.decision(), pictures.matching([str(tmp_path / "in")])
    place = predict.claim(str(tmp_path / "p"), overwrite=False)

    def tell(done, total, note):
        most.append(len(decoded) - done)
        live.append(sum(held() is not None for held in maps))

    predict.predict(model, images, decision, place, tell)
    assert len(decoded) == 60
    assert max(most) <= 3 * predict.BATCH + 2 * model.evaluation.workers
    assert most[-1] == 0
    assert len(maps) == 60
    assert max(live) <= model.evaluation.workers  # those at work


def told(normals, images):
    """What a batch of images is warned of."""
    drift = pictures.Drift(pictures.looks(pictures.source(normals)))
    for image in images:
        drift.add(pictures.brightness(image), image.shape[:2])
    return [line.partition(":")[0] for line in drift.warnings()]


def lit(level, shape=(40, 60), seed=0):
    noise = np.random.default_rng(seed).normal(0, 20, (*shape, 3))
    return np.clip(level + noise, 0, 255).astype(np.uint8)


def test_fresh_normals_are_not_warned_of_and_others_are():
    """Batches of any size, and of lamps that differ; levels are those of the batch's mean."""
    rng, false = np.random.default_rng(0), []
    normals = [lit(level, seed=i) for i, level in enumerate(rng.normal(90, 15, 40))]
    for size in (1, 4, 30):
        batches = [[lit(x, seed=i) for i, x in enumerate(rng.normal(90, 15, size))]
                   for _ in range(60)]  # fmt: skip
        false += [told(normals, batch) for batch in batches]
        twice = [[np.minimum(2 * image.astype(int), 255).astype(np.uint8) for image in batch]
                 for batch in batches]  # fmt: skip
        missed = sum(told(normals, batch) != ["brightness"] for batch in twice)
        assert missed <= {1: 12, 4: 1, 30: 0}[size]  # 3 of 15: a fifth of single images is near
    assert sum(map(bool, false)) <= 3
    same_lamp = [lit(90 + 1.5 * 15, seed=i) for i in range(50)]
    assert told(normals, same_lamp) == []
    assert told(normals, [lit(90 + 2.5 * 15, seed=i) for i in range(50)]) == ["brightness"]
    assert told(normals, [lit(90, (80, 120))]) == ["size"]
    assert told(normals, [lit(90, (20, 30)), lit(90)]) == ["size"]
    assert told(normals, [lit(90, (40, 70))]) == ["size"]  # stretched
    assert told(normals, [lit(90, (44, 66)), lit(90, (36, 54))]) == []


@pytest.mark.parametrize(("name", "root"), [("mvtec", "mvtec/bottle256"), ("mtd:grouped", "mtd")])
def test_fresh_normals_of_real_sets_are_not_warned_of(name, root):
    data = base.load(base.DataConfig(name=name, root=str(real_data(root))))
    train, test = data.source("train"), data.source("test")
    good = [i for i, r in enumerate(test.records) if not r.label]
    images = [test[i].image for i in good[:: -(-len(good) // 40)]]
    normals = [train[i].image for i in range(0, len(train), len(train) // 60)]
    assert told(normals, images) == []
    twice = [np.minimum(2 * image.astype(int), 255).astype(np.uint8) for image in images]
    assert told(normals, twice) == ["brightness"]
    larger = [np.kron(image, np.ones((2, 2, 1), np.uint8)) for image in images]
    assert told(normals, larger) == ["size"]


def test_a_fit_holds_few_maps_on_original_pixels(monkeypatch):
    """They are as large as the photographs, and as many as images are held out."""
    given: list[weakref.ref] = []
    most, back = [], preprocessing.Preprocessing.to_original

    def counted(self, scores, shape):
        values = back(self, scores, shape)
        given.append(weakref.ref(values))
        most.append(sum(ref() is not None for ref in given))
        return values

    monkeypatch.setattr(preprocessing.Preprocessing, "to_original", counted)
    monkeypatch.setattr(thresholds, "HELD", 0)
    images = [lit(90, seed=i) for i in range(30)]
    about = {"backbone": "resnet18", "weights": "random", "detector": "knn"}
    model = dsad.fit(images, **about, false_alarm_rate=0.1, settings=SETTINGS)
    assert len(model.decision().row["maxima"]) >= 9
    assert len(given) >= 4 * 9  # the highest values, the scale, two counts
    assert max(most) <= 2


def test_looks_hold_one_image_at_a_time():
    given: list[weakref.ref] = []

    class Images:
        records = ()

        def __len__(self):
            return 100

        def __getitem__(self, index):
            image = np.full((4 + index, 5, 3), index, np.uint8)
            assert sum(ref() is not None for ref in given) <= 1
            given.append(weakref.ref(image))
            return types.SimpleNamespace(image=image)

    about = pictures.looks(Images())
    assert about["images"] == 64
    assert about["height"] == [4, 102]  # the last of 64 that are spread over 100 is the 98th
    assert about["width"] == [5, 5]
    levels = [i * 100 // 64 for i in range(64)]
    assert about["brightness"] == pytest.approx([np.mean(levels), np.std(levels)])


def test_images_far_outside_the_normal_ones_are_told(folder, tmp_path, capsys):
    source = sorted((folder / "wood" / "train" / "good").iterdir())
    for i, path in enumerate([*source, *source[:4]]):
        image = np.asarray(PIL.Image.open(path)).astype(np.float64)
        noise = np.random.default_rng(i).normal(0, 60, (96, 48, 3))
        other = np.clip(0.3 * np.concatenate([image, image]) + noise, 0, 255)
        save(tmp_path / "in" / f"{i}.png", other.astype(np.uint8))
    assert run(folder / "model", tmp_path / "in", f"--out={tmp_path}/p") == 0
    text = capsys.readouterr().out
    assert "warning: brightness: these images have" in text
    assert (
        "warning: size: 10 of 10 images, the first 48×96 pixels; the normal ones are 48×48" in text
    )
    assert "warning: score: 10 of 10 images lie above all 3 held-out normal images" in text
    assert len(json.loads((tmp_path / "p" / "about.json").read_text())["warnings"]) == 3
    assert run(folder / "model", folder / "wood" / "train", f"--out={tmp_path}/q") == 0
    assert "warning" not in capsys.readouterr().out


SETTINGS = {"evaluation.image_size": 32, "evaluation.batch_size": 4, "detector.layers": ("layer1",)}


def test_python_fits_saves_loads_and_predicts(folder, tmp_path):
    good = folder / "wood" / "train" / "good"
    given = {"backbone": "resnet18", "weights": "random", "detector": "knn"}
    given["false_alarm_rate"] = 0.3
    model = dsad.fit(good, **given, category="wood", settings=SETTINGS)
    paths = sorted(good.iterdir())
    arrays = [np.asarray(PIL.Image.open(p)) for p in paths]
    again = dsad.fit(arrays, **given | {"false_alarm_rate": 0}, settings=SETTINGS)
    np.testing.assert_array_equal(model.fitted.state["bank"], again.fitted.state["bank"])
    model.save(tmp_path / "m")
    loaded = dsad.load(tmp_path / "m")
    image = sorted((folder / "wood" / "test").glob("*/*.png"))[-1]
    one, other = model.predict(image), loaded.predict(np.asarray(PIL.Image.open(image)))
    assert (one.score, one.percentile, one.flagged) == (
        other.score,
        other.percentile,
        other.flagged,
    )
    assert one.regions == other.regions
    np.testing.assert_array_equal(one.map, other.map)
    assert (one.map.shape, one.map.dtype) == ((48, 48), np.float32)
    scores, _ = loaded.score([np.asarray(PIL.Image.open(image))])
    assert scores[0] == pytest.approx(one.score, abs=1e-5)
    with pytest.raises(WorkdirError, match="holds a model"):
        model.save(tmp_path / "m")
    loaded.save(tmp_path / "m", overwrite=True)
    assert dsad.load(tmp_path / "m").predict(image).score == one.score
    refused = {
        r"array \(h, w, 3\) uint8, found \(4, 4\) uint8.*grey channel": np.zeros((4, 4), np.uint8),
        r"found \(4, 4, 4\) uint8.*leave alpha out": np.zeros((4, 4, 4), np.uint8),
        r"found \(4, 4, 3\) float64.*round floats": np.zeros((4, 4, 3)),
        r"found \(3, 4, 4\) uint8": np.zeros((3, 4, 4), np.uint8),
        "expected a path or an array .*, found Image": PIL.Image.fromarray(arrays[0]),
        "cannot be read": tmp_path / "none.png",
    }
    for match, bad in refused.items():
        with pytest.raises(DataError, match=match):
            model.predict(bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="expected good pictures, found none"):
        dsad.fit([], **given, settings=SETTINGS)


def test_an_overlay_is_that_of_the_command(folder, tmp_path):
    model = dsad.load(folder / "model")
    image = sorted((folder / "wood" / "test").glob("*/*.png"))[-1]
    prediction = model.predict(image, rate=0.9)
    assert prediction.regions
    assert (prediction.map > prediction.region_threshold).any()
    drawn = model.overlay(image, prediction)
    assert run(folder / "model", image, "--rate=0.9", f"--out={tmp_path}/p") == 0
    (written,) = (tmp_path / "p" / "overlays").glob("*.png")
    np.testing.assert_array_equal(drawn, np.asarray(PIL.Image.open(written)))
    assert (drawn != model.overlay(image, model.predict(image, rate=0.1))).any()


def test_a_model_takes_what_its_fit_allowed(folder, tmp_path):
    image = sorted((folder / "wood" / "train" / "good").iterdir())[0]
    PIL.Image.open(image).convert("RGBA").save(tmp_path / "alpha.png")
    given = {"backbone": "resnet18", "weights": "random", "detector": "knn"}
    given["false_alarm_rate"] = 0
    model = dsad.fit([image], **given, settings=SETTINGS | {"data.lossy": ("RGBA",)})
    alpha, plain = model.predict(tmp_path / "alpha.png"), model.predict(image)
    np.testing.assert_array_equal(alpha.map, plain.map)
    with pytest.raises(DataError, match="RGBA"):
        dsad.load(folder / "model").predict(tmp_path / "alpha.png")


def test_one_picture_makes_a_model_that_decides_nothing(folder):
    image = sorted((folder / "wood" / "train" / "good").iterdir())[:1]
    given = {"backbone": "resnet18", "weights": "random", "detector": "knn", "settings": SETTINGS}
    with pytest.raises(ConfigError, match="single training image cannot both"):
        dsad.fit(image, **given)
    prediction = dsad.fit(image, **given, false_alarm_rate=0).predict(image[0])
    assert prediction.score == pytest.approx(0, abs=1e-3)
    assert (prediction.percentile, prediction.flagged, prediction.regions) == (None, None, ())
    model = dsad.fit(image, **given, false_alarm_rate=0)
    for threshold, flagged in ((-1, True), (1, False)):
        assert model.predict(image[0], threshold=threshold).flagged is flagged
    assert str(model.decision(threshold=1)) == "threshold 1 as chosen, nothing was held out"
    with pytest.raises(ConfigError, match="fitted without held-out images"):
        model.decision(rate=0.1)
    with pytest.raises(ConfigError, match=r"config\.detector\.kk: unknown key.*mean detector\.k\?"):
        dsad.fit(image, **given | {"settings": {"detector.kk": 1}})
    with pytest.raises(ConfigError, match="no image there|no such file"):
        dsad.fit(image[0].parent / "none", **given)


def test_python_evaluates(folder):
    config = Saved.read(folder / "model").config()
    live, results = read_results(folder / "live"), dsad.evaluate({
        **config, "evaluation": {**config["evaluation"], "save_maps": "none"},
    })  # fmt: skip
    assert results.mean == live.mean


def test_of_a_config_for_both_each_takes_its_part(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.stepps: unknown key.*Did you mean steps\?"):
        dsad.pretrain("demo:smoke", tmp_path / "p", settings={"stepps": 1})
    with pytest.raises(WorkdirError, match="none"):
        dsad.evaluate("demo:smoke", settings={"backbone": f"run:{tmp_path}/none"})
    with pytest.raises(ConfigError, match="no 'objective'"):
        dsad.pretrain(pathlib.Path("configs/knn.py:smoke"), tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_stopped_training_gives_no_backbone(tmp_path, monkeypatch):
    info = RunInfo(total_steps=7, batch_size=2, samples=5, classes=3)
    prepared = types.SimpleNamespace(run=types.SimpleNamespace(info=info))
    ends = iter((False, True))
    monkeypatch.setattr(training, "prepare", lambda *_, **__: prepared)
    monkeypatch.setattr(training, "pretrain", lambda *_, **__: next(ends))
    with pytest.raises(StoppedError, match="stopped and saved.*resume=True"):
        dsad.pretrain("ds2:smoke", tmp_path / "p")
    assert dsad.pretrain("ds2:smoke", tmp_path / "p", resume=True) == f"run:{tmp_path / 'p'}"


WEIGHTS = "resnet18_in1k_folded_l1l3_fp16.npz"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "root", "size"), [("mvtec", "mvtec/bottle256", 128), ("mtd:grouped", "mtd", 96)]
)
def test_predictions_on_real_images_are_those_of_the_evaluation(name, root, size, tmp_path):
    data, weights = real_data(root), real_data("weights", WEIGHTS)
    argv = (
        "evaluate", "--config=patchcore", f"--config.weights={weights}",
        f"--config.data.name={name}",
        f"--config.data.root={data}", f"--config.evaluation.image_size={size}",
        "--config.detector.bank_fraction=0.01", "--config.evaluation.false_alarm_rate=0.05",
        f"--workdir={tmp_path}/live", f"--save-model={tmp_path}/model",
    )  # fmt: skip
    assert main.main([*argv]) == 0
    again = ("evaluate", f"--model={tmp_path}/model", f"--workdir={tmp_path}/again")
    assert main.main([*again, "--config.evaluation.save_maps=tiff"]) == 0
    saved = read_results(tmp_path / "again")
    same(read_results(tmp_path / "live"), saved)
    (images,) = saved.images.values()
    paths = [data / row["path"] for row in images]
    assert run(tmp_path / "model", *paths, f"--out={tmp_path}/p", "--maps=tiff") == 0
    found, _ = rows(tmp_path / "p")
    for row, image in zip(found, images, strict=True):
        assert float(row["score"]) == pytest.approx(image["score"], abs=1e-5)
        assert float(row["peak"]) == pytest.approx(image["max"], abs=1e-5)
        name = row["overlay"].removeprefix("overlays/").removesuffix(".png")
        there = f"anomaly_maps/{image['path'].rpartition('.')[0]}.tiff"
        scores = [tifffile.imread(tmp_path / x) for x in (f"p/maps/{name}.tiff", f"again/{there}")]
        np.testing.assert_allclose(*scores, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_false_alarms_on_real_normals_keep_their_bound():
    """200 splits of MTD's normals, groups whole: test, bank, held out; features computed once."""
    root, weights = real_data("mtd"), real_data("weights", WEIGHTS)
    config = evaluate.default_config("knn")
    with config.unlocked():
        config.weights = str(weights)
        config.data.update(name="mtd:grouped", root=str(root))
        config.evaluation.image_size = 64
    parts = evaluate.prepare(config, evaluate.Console(quiet=True))
    train = parts.dataset.source("train")
    features = cells_of(parts, train)
    records, rng = list(train.records), np.random.default_rng(0)
    distances = between(features)
    names = np.array([r.group or r.path for r in records])
    alarms, bounds, groups = [], [], []
    for seed in range(200):
        order = rng.permutation(np.unique(names))
        new = np.isin(names, order[: len(order) // 4])
        rest = [r for r, out in zip(records, new, strict=True) if not out]
        held_paths = set(support.hold_out(rest, seed, thresholds.needed(0.05), len(rest) // 5))
        held = np.array([r.path in held_paths for r in records])
        bank = ~new & ~held
        score = lambda which, b=bank: distances[which][:, :, b].min(2).max(1)  # noqa: E731
        weights_of = thresholds.group_weights([r.group for r in records if r.path in held_paths])
        value, bound = thresholds.image_threshold(score(held), 0.05, weights_of)
        flagged, of = score(new) > value, names[new]
        alarms.append(np.mean([flagged[of == name].mean() for name in np.unique(of)]))
        bounds.append(bound)
        groups.append(round(sum(weights_of)))
    above, n = np.mean(np.array(alarms) > bounds), round(np.median(groups))
    # The bound is that of the mean. Of one model the share of false alarms is Beta distributed, at
    # most: of a group not all images need to be flagged.
    k, tested = math.ceil((n + 1) * 0.95 - 1e-9), len(set(names)) // 4
    share = scipy.stats.betabinom(tested, n + 1 - k, k).sf(0.05 * tested)
    print(
        f"false alarms {np.mean(alarms):.4f} (bound {np.max(bounds):.3f}), above the bound in "
        f"{above:.3f} of the splits (at most {share:.3f}), {len(set(names))} groups"
    )
    assert np.max(bounds) <= 0.05 + 1e-12
    assert np.mean(alarms) <= 0.05 + 2 * np.std(alarms) / np.sqrt(len(alarms))
    assert above <= share + 2 * np.sqrt(share * (1 - share) / len(alarms))


def cells_of(parts, source):
    """Normalised features (n, cells, channels) of all images."""
    from dsad.evaluation.compiled import Device
    from dsad.evaluation.reader import Reader

    cfg = parts.config.evaluation
    mesh = make_mesh(parts.config.mesh, jax.devices()[:1])
    device = Device(parts.backbone, parts.detector, cfg, mesh)
    rows_ = []
    for host, maps in Reader(device, cfg).read(source, "x", keep=False):
        values = np.asarray(maps["layer2"])[host.valid]
        rows_.append(values.reshape(len(values), -1, values.shape[-1]))
    return np.concatenate(rows_)


def between(features):
    """[i, p, j]: how far cell p of image i is from the nearest cell of image j, squared."""
    n, cells, channels = features.shape
    flat = features.reshape(-1, channels)
    norms = (flat**2).sum(1)
    made = np.empty((n, cells, n), np.float32)
    for i in range(n):
        dots = features[i] @ flat.T
        far = (features[i] ** 2).sum(1)[:, None] + norms[None] - 2 * dots
        made[i] = far.reshape(cells, n, cells).min(2)
    return made
