"""Models of own images: fitted on all good ones, measured on those that they were not fitted on."""

import shutil

import jax
import pytest

from dsad.assembly import evaluate
from dsad.assembly.model import Saved
from dsad.cli import main
from dsad.core.mesh import make_mesh
from dsad.evaluation.localize import read_results
from tests.assembly.test_model import same
from tests.data import trees

SMALL = (
    "--config=knn", "--config.weights=random", "--config.detector.layers=('layer1',)",
    "--config.evaluation.image_size=32", "--config.evaluation.batch_size=4",
    "--config.evaluation.gallery=1", "--config.evaluation.false_alarm_rate=0.3",
    "--config.data.name=folder", "--config.data.normal=Prüf teile/good",
)  # fmt: skip
BAD = "--config.data.abnormal=Prüf teile/bad"


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten good and two bad pictures, a model of the good ones, and an evaluation with its model."""
    place = tmp_path_factory.mktemp("own models")
    trees.good_and_bad(place / "Prüf teile")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main.main(["fit", *SMALL, BAD, "--out=model"]) == 0
        argv = (*SMALL, BAD, "--workdir=live", "--save-model=model of live")
        assert main.main(["evaluate", *argv]) == 0
    return place


def measured(folder, monkeypatch, model, *argv):
    monkeypatch.chdir(folder)
    assert main.main(["evaluate", f"--model={model}", *argv, "--workdir=w", "--overwrite"]) == 0
    return read_results(folder / "w")


def test_a_model_is_fitted_on_every_good_picture(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main.main(["fit", *SMALL, f"--out={tmp_path}/alone"]) == 0
    assert "fitted on 10 good pictures; a second fit without 3" in capsys.readouterr().out
    model, alone = Saved.read("model"), Saved.read(tmp_path / "alone")
    assert model.index["sha256"] == alone.index["sha256"]  # bad pictures have no part in it
    assert model.threshold("Prüf teile") == alone.threshold("Prüf teile")
    cells = model.fitted("Prüf teile").state["bank"].shape[0]
    assert cells == 10 * 8 * 8
    assert Saved.read("model of live").fitted("Prüf teile").state["bank"].shape[0] == 8 * 8 * 8
    assert model.stamp["dataset"]["split"] == "all 10 normal images train, none is tested"


def test_a_saved_evaluation_of_own_images_measures_the_same(folder, monkeypatch):
    again = measured(folder, monkeypatch, "model of live")
    live = read_results(folder / "live")
    same(live, again)
    assert again.categories["Prüf teile"]["counts"] == live.categories["Prüf teile"]["counts"]
    assert again.stamp["dataset"]["split_hash"] == live.stamp["dataset"]["split_hash"]
    assert again.stamp["dataset"]["split"] == (
        "2 normal images tested, 8 that the model was fitted on are not"
    )


def test_what_a_model_was_fitted_on_is_not_tested(folder, monkeypatch, capsys):
    results = measured(folder, monkeypatch, "model")
    (row,) = results.categories.values()
    assert (row["counts"]["normal"], row["counts"]["anomalous"]) == (0, 2)
    assert row["image_auroc"] is None
    assert results.stamp["dataset"]["split"].startswith("0 normal images tested, 10 that the")
    assert "2 defects found, no good image tested, false alarms at 30 %" in capsys.readouterr().out
    only = ("--config.data.normal=Prüf teile/good", "--workdir=none")
    assert main.main(["evaluate", "--model=model", *only]) == 2
    assert "nothing is left to test" in " ".join(capsys.readouterr().err.split())
    assert not (folder / "none").exists()


def test_other_pictures_are_all_tested(folder, tmp_path, monkeypatch, capsys):
    """Wherever they lie: a place named anew replaces those of the fit, and the category's name."""
    for i in range(3):
        trees.save(tmp_path / "ok" / f"neu {i}.png", trees.pixels(50 + i))
    shutil.copy(folder / "Prüf teile/good/3.png", tmp_path / "ok" / "neu 4.png")
    bad = folder / "Prüf teile/bad"
    places = (f"--config.data.normal={tmp_path}/ok", f"--config.data.abnormal={bad}")
    capsys.readouterr()
    results = measured(folder, monkeypatch, "model", *places)
    (counts,) = (row["counts"] for row in results.categories.values())
    assert (counts["normal"], counts["anomalous"]) == (3, 2)
    split = "3 normal images tested, 1 that the model was fitted on are not"
    assert results.stamp["dataset"]["split"] == split
    rows = "".join(f"ok/neu {i}.png,good,test\n" for i in range(3)) + "b/1.png,bad,test\n"
    (tmp_path / "list.csv").write_text(f"path,label,split\n{rows}", "utf-8")
    (tmp_path / "b").mkdir()
    shutil.copy(bad / "1.png", tmp_path / "b")
    of_list = measured(folder, monkeypatch, "model", f"--config.data.manifest={tmp_path}/list.csv")
    assert "nothing can be fitted" not in capsys.readouterr().out
    scores = [{r["path"].rpartition("/")[2]: r["score"] for r in x.images["Prüf teile"]}
              for x in (results, of_list)]  # fmt: skip
    assert scores[1] == {name: scores[0][name] for name in scores[1]}
    assert len(scores[1]) == 4
