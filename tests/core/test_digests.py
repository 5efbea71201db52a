"""Digests of folders: every change of a file is noticed, named, and nothing else is."""

import hashlib
import json

import pytest

from dsad.core import digests
from dsad.core.digests import DigestError

CONTENT = {"a.bin": b"one", "sub/b.bin": b"two" * 10**6, "sub/deep/c.bin": b""}


@pytest.fixture
def folder(tmp_path):
    for name, content in CONTENT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    digests.write(tmp_path)
    return tmp_path


def test_every_file_has_its_sha_256(folder):
    want = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    assert json.loads((folder / "digests.json").read_text()) == want
    digests.check(folder)
    digests.write(folder)  # those of the file itself are not among them
    assert json.loads((folder / "digests.json").read_text()) == want


@pytest.mark.parametrize("name", CONTENT)
def test_a_change_is_named_in_its_part_only(folder, name):
    (folder / name).write_bytes(CONTENT[name] + b"x")
    with pytest.raises(DigestError, match=rf"^{folder}/{name}: its SHA-256 is \w+"):
        digests.check(folder)
    below = "sub/" if name == "a.bin" else "a"
    digests.check(folder, below)
    raised = []
    for part in range(2):
        try:
            digests.check(folder, part=part, parts=2)
        except DigestError:
            raised.append(part)
    assert raised == [list(CONTENT).index(name) % 2]


def test_what_is_missing_is_named(folder):
    (folder / "a.bin").unlink()
    with pytest.raises(DigestError, match=rf"a file is missing: .*{folder}/a.bin"):
        digests.check(folder)
    for content in ("[]", "{", "\xff"):
        (folder / "digests.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(DigestError, match=rf"{folder}/digests.json: "):
            digests.check(folder)
    (folder / "digests.json").unlink()
    with pytest.raises(DigestError, match=rf"{folder}/digests.json: no such file"):
        digests.check(folder)


def test_a_folder_that_cannot_be_read_is_no_damage(folder):
    (folder / "a.bin").unlink()
    (folder / "a.bin").mkdir()
    with pytest.raises(IsADirectoryError):
        digests.check(folder)
