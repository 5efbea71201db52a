"""Whole files: the old content or the new one, whatever happens while it is written."""

import concurrent.futures
import errno
import pathlib

import pytest
from etils import epath

from dsad.core import paths
from dsad.core.errors import ConfigError, WorkdirError

GPath = type(epath.Path("."))


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_folders_are_made_and_contents_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paths.write_whole("a/b/x.txt", "é") == tmp_path / "a/b/x.txt"
    assert paths.write_whole(tmp_path / "a/b/x.txt", b"\0\1") == tmp_path / "a/b/x.txt"
    assert files(tmp_path) == {"a/b/x.txt": b"\0\1"}
    with pytest.raises(ConfigError, match="s3://bucket/x: expected a directory or gs://"):
        paths.write_whole("s3://bucket/x", "")


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_content_and_nothing_else(
    tmp_path, monkeypatch, step, problem
):
    paths.write_whole(tmp_path / "x.json", "old")

    def half(self, data):
        if step == "write_bytes":
            pathlib.Path(self).write_bytes(data[:2])
        raise problem

    monkeypatch.setattr(GPath, step, half)
    if isinstance(problem, OSError):
        message = rf"^{tmp_path}/x.json: the disk .* is full .*No space left.* Do this\.$"
        with pytest.raises(WorkdirError, match=message):
            paths.write_whole(tmp_path / "x.json", "newer", "Do this.")
    else:
        with pytest.raises(KeyboardInterrupt):
            paths.write_whole(tmp_path / "x.json", "newer")
    assert files(tmp_path) == {"x.json": b"old"}


def test_a_kill_leaves_the_old_content_beside_a_temporary(tmp_path, monkeypatch):
    """Nothing is cleaned up then: the temporary's name says what it is."""
    paths.write_whole(tmp_path / "x.json", "old")
    monkeypatch.setattr(GPath, "replace", lambda self, target: None)
    monkeypatch.setattr(GPath, "unlink", lambda self, missing_ok: None)
    paths.write_whole(tmp_path / "x.json", "newer")
    left = files(tmp_path)
    assert left.pop("x.json") == b"old"
    assert [name.endswith(paths.TEMPORARY) for name in left] == [True]


def test_names_may_be_as_long_as_file_systems_take(tmp_path):
    paths.write_whole(tmp_path / ("ü" * 125 + ".json"), "x")
    assert files(tmp_path) == {"ü" * 125 + ".json": b"x"}


def test_many_may_write_one_file_at_once(tmp_path):
    contents = [bytes([n]) * 100_000 for n in range(8)]

    def write(content):
        for _ in range(10):
            paths.write_whole(tmp_path / "x.bin", content)
            assert (tmp_path / "x.bin").read_bytes() in contents

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(write, contents))
    assert list(files(tmp_path)) == ["x.bin"]


def test_a_place_that_takes_nothing_is_named_with_the_advice(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match=r"file/x: cannot be written: .*/file\)\. Do this"):
        paths.write_whole(tmp_path / "file" / "x", "", "Do this.")


def test_any_name_is_one_component_of_a_path(tmp_path):
    names = ["disc", "to/p", "to%2Fp", "[/x]", "日" * 80, "日" * 81]
    for name in names:
        paths.write_whole(tmp_path / f"fitted-{paths.component(name)}.safetensors", name)
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == sorted(names)
    assert paths.component("disc") == "disc"
