"""The types that an editor shows of ``import dsad``."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT

USE = """
import pathlib
from typing import assert_type

import dsad
import numpy as np
import numpy.typing as npt

good = [np.zeros((4, 4, 3), np.uint8)]
model = dsad.fit(good, backbone="resnet18", weights=pathlib.Path("w.npz"), detector="knn")
assert_type(model, dsad.FittedModel)
assert_type(dsad.fit("pics", backbone="run:x"), dsad.FittedModel)
assert_type(model.save(pathlib.Path("m")), None)
assert_type(dsad.load("m"), dsad.FittedModel)
prediction = model.predict(pathlib.Path("x.png"), rate=0.1)
assert_type(prediction, dsad.Prediction)
assert_type(prediction.score, float)
assert_type(prediction.percentile, float | None)
assert_type(prediction.flagged, bool | None)
assert_type(prediction.region_threshold, float | None)
assert_type(prediction.regions[0].box, tuple[int, int, int, int])
picture: npt.NDArray[np.uint8] = model.overlay(good[0], prediction)
heat: npt.NDArray[np.float32] = prediction.map
assert_type(dsad.pretrain("ds2", "runs/x", settings={"steps": 3}), str)
print(dsad.evaluate("knn", settings={}).mean["aupro_30"])
try:
    model.predict("x.png")
except dsad.DsadError as error:
    print(error.code)
"""
#: Each refused by itself: a line, and what is wrong with it.
WRONG = {
    "model.predict(3)": "reportArgumentType",
    "dsad.fit('pics')": "reportCallIssue",
    "dsad.fit('pics', 'resnet18')": "reportCallIssue",
    "dsad.fits('pics')": "reportAttributeAccessIssue",
    "prediction.flagged()": "reportOptionalCall",
}


@pytest.mark.slow
def test_an_editor_sees_the_types_of_the_facade(tmp_path):
    (tmp_path / "use.py").write_text(USE + "\n".join(WRONG) + "\n")
    settings = {"include": ["use.py"], "extraPaths": [str(ROOT)], "pythonVersion": "3.11"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson",
         "-p", str(tmp_path)], capture_output=True, text=True,
    )  # fmt: skip
    lines = (tmp_path / "use.py").read_text().splitlines()
    problems: dict[str, set[str]] = {}
    for each in json.loads(done.stdout)["generalDiagnostics"]:
        line = lines[each["range"]["start"]["line"]]
        problems.setdefault(line, set()).add(each.get("rule", each["message"]))
    assert problems.keys() == WRONG.keys(), problems
    for line, rule in WRONG.items():
        assert rule in problems[line]
