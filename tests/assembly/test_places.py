"""Directories of models and predictions: what is taken, what is refused, what stays."""

import json
import os

import pytest

from dsad.assembly import pictures, predict, saving
from dsad.core.errors import WorkdirError


def test_weights_of_others_are_neither_taken_for_a_model_nor_removed(tmp_path):
    weights = tmp_path / "resnet18.safetensors"
    weights.write_bytes(b"weights")
    with pytest.raises(WorkdirError, match="resnet18"):
        saving.Writer(str(tmp_path), overwrite=True)
    assert weights.read_bytes() == b"weights"


def test_a_write_that_was_killed_blocks_no_model(tmp_path):
    (tmp_path / ".model.json.0123.writing").write_bytes(b"{")
    (tmp_path / "fitted-a.safetensors").write_bytes(b"")
    saving.Writer(str(tmp_path), overwrite=False).discard()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("complete", [True, False])
def test_only_complete_predictions_need_overwrite(tmp_path, complete):
    about = {"command": "predict", "complete": complete}
    (tmp_path / predict.ABOUT).write_text(json.dumps(about))
    (tmp_path / predict.CSV).write_text("path")
    if complete:
        with pytest.raises(WorkdirError, match="--overwrite"):
            predict.claim(str(tmp_path), overwrite=False)
    else:
        predict.claim(str(tmp_path), overwrite=False)
    assert (tmp_path / predict.CSV).exists() == complete


def test_an_image_named_twice_is_taken_once(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert pictures.matching(["a.png", os.fspath(tmp_path)]) == ["a.png"]
