"""What a resumed run may change of its config, and what the directory then says."""

import json

import pytest

from dsad.assembly import pretrain, workdir
from dsad.core import paths
from dsad.core.errors import WorkdirError
from dsad.core.types import RunInfo

INFO = RunInfo(total_steps=9, batch_size=8, samples=40, classes=2)


def config(**changes):
    values = pretrain.default_config("mae")
    with values.unlocked():
        for key, value in changes.items():
            values.update_from_flattened_dict({key.replace("__", "."): value})
    return json.loads(json.dumps(values.to_dict()))


def claim(path, values, resume=True):
    return workdir.claim(str(path), "pretrain", values, info=INFO, resume=resume)


@pytest.mark.parametrize(
    ("key", "value"),
    [("mesh__fsdp", 2), ("data__cache", "none"), ("checkpoint__every", 7), ("log_every", 3),
     ("checkpoint__minutes", 5.0), ("compilation_cache", "somewhere"), ("feature_store", "disk")],
)  # fmt: skip
def test_how_it_is_computed_and_kept_may_change_and_is_told(tmp_path, capsys, key, value):
    claim(tmp_path, config(), resume=False)
    changed = config(**{key: value})
    claim(tmp_path, changed)
    out = capsys.readouterr().out
    assert out.startswith(f"resumed with config.{key.replace('__', '.')}: ")
    assert out.count("\n") == 1
    assert workdir.read(tmp_path)["config"] == changed  # for whoever reads the run next
    claim(tmp_path, changed)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 1), ("batch_size", 8), ("optim__lr", 1.0), ("steps", 9), ("precision", "high"),
     ("objective__mask_ratio", 0.5), ("data__canvas", 64)],
)  # fmt: skip
def test_what_is_computed_may_not_change(tmp_path, key, value):
    claim(tmp_path, config(), resume=False)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    before = (tmp_path / workdir.CONFIG).read_bytes()
    with pytest.raises(WorkdirError, match=rf"config\.{key.replace('__', '.')}: ") as caught:
        claim(tmp_path, config(**{key: value}, log_every=3))
    assert "log_every" not in str(caught.value)  # only what stands in the way
    assert (tmp_path / workdir.CONFIG).read_bytes() == before


def test_before_the_first_checkpoint_everything_may_change(tmp_path, capsys):
    """Such as a batch that did not fit into memory."""
    claim(tmp_path, config(), resume=False)
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    claim(tmp_path, config(batch_size=8))
    assert capsys.readouterr().out == "resumed with config.batch_size: 256 → 8\n"
    assert workdir.read(tmp_path)["config"]["batch_size"] == 8


def test_a_directory_whose_claim_was_killed_is_free(tmp_path):
    (tmp_path / f".config.json.0{paths.TEMPORARY}").write_text('{"comm')
    claim(tmp_path, config(), resume=False)
    assert workdir.holds_run(str(tmp_path))


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        WorkdirError, match=r"file/run: cannot be written: Not a directory \(.*/file\).*--workdir"
    ):
        claim(tmp_path / "file" / "run", config(), resume=False)
