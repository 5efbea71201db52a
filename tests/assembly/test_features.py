"""Where what is computed of every sample once is kept: memory, files, and what does not fit."""

import io
import pickle

import numpy as np
import pytest
from etils import epath
from rich.console import Console

from dsad.assembly import features, training
from dsad.core.errors import ConfigError
from dsad.data.feature_files import FeatureFile
from dsad.objectives import ds2
from dsad.train.state import initial_state
from tests.assembly.test_training import config  # noqa: F401 - a fixture
from tests.seams.objectives import frozen

QUIET = Console(quiet=True)


@pytest.fixture
def asked(monkeypatch, config):  # noqa: F811
    monkeypatch.setattr(ds2, "build", lambda cfg, run: frozen.build(frozen.Config(), run))
    config.data.update(split="all", cache="host")
    return config


def test_files_hold_what_memory_would(asked, monkeypatch, tmp_path):
    batches = []
    for store in ("memory", "disk"):
        asked.feature_store = store
        made = training.build(asked)
        state = initial_state(made.run.objective, made.run.tx, made.run.abstract, seed=0)
        made = training.with_features(made, state, QUIET, epath.Path(tmp_path))
        batches.append(next(made.pipeline.iterator()))
    file = tmp_path / "features" / "process0" / "cells"
    assert file.stat().st_size == features.size(made.run) > 0
    # What is written anew is no further need; nothing is left where it is of no more use.
    monkeypatch.setattr(features.paths, "free", lambda path: 0)
    features.check_room(made.run, epath.Path(tmp_path))
    features.discard(epath.Path(tmp_path))
    assert not any(tmp_path.glob("features*"))
    with pytest.raises(ConfigError, match=r"and the disk of .* has 0 B for them"):
        features.check_room(made.run, epath.Path(tmp_path))
    for rows in (lambda b: b["features"], lambda b: b["references"]["features"]):
        np.testing.assert_array_equal(rows(batches[0])["cells"], rows(batches[1])["cells"])


def test_a_file_goes_to_other_processes_as_its_path(tmp_path):
    file = FeatureFile(tmp_path / "a", (1000, 50), np.float16, create=True)
    file[3:5] = np.ones((2, 50), np.float16)
    sent = pickle.dumps(file)
    assert len(sent) < 300
    again = pickle.loads(sent)
    np.testing.assert_array_equal(again[np.array([2, 3])], [[0] * 50, [1] * 50])
    assert (again.shape, again.dtype) == ((1000, 50), np.float16)


def test_features_that_do_not_fit_are_refused_before_the_first_image(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(features, "free_memory", lambda: 1000)
    out = Console(file=io.StringIO())
    with pytest.raises(
        ConfigError, match=r"features of 39 samples take 30 kB, and the memory .* has 1 kB"
    ):
        training.prepare(asked, out)
    asked.data.update(cache="none", workers=2)
    with pytest.raises(ConfigError, match=r"take 89\.9 kB \(3 times, for the workers"):
        training.prepare(asked, out)
    asked.data.update(cache="host", workers=0)
    asked.feature_store = "disk"
    made = training.prepare(asked, out)
    monkeypatch.setattr(features.paths, "free", lambda path: 10)
    with pytest.raises(ConfigError, match=r"and the disk of .* has 10 B for them"):
        features.check_room(made.run, epath.Path(tmp_path))
    with pytest.raises(ConfigError, match="expected a --workdir on a disk"):
        features.check_room(made.run, epath.Path("gs://bucket/run"))
    asked.data.cache = "device"
    with pytest.raises(ConfigError, match=r"found config\.data\.cache=device"):
        training.prepare(asked, out)
