"""What a data set of files is depends on nothing but paths below its root and contents."""

import contextlib
import dataclasses
import os
import pathlib
import random
import shutil
import tempfile

import hypothesis
import hypothesis.strategies as st
import pytest

from dsad.data.base import indexed
from dsad.data.checks import check
from tests.data.test_fuzz import SETS

ROOTS = (
    "data", "Prüfung ä", "a[b]*?", "#1 %20 100%", "-dash", "~tilde", "日本 \U0001f600",
    "{category}", "it's \"it\"", "train", "good", "images.png", "x\ny", " ",
)  # fmt: skip
LINKS = ("none", "root", "folder", "files")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the same files lie."""

    root: str
    link: str
    relative: bool
    seed: int


LAYOUTS = st.builds(
    Layout, root=st.sampled_from(ROOTS), link=st.sampled_from(LINKS), relative=st.booleans(),
    seed=st.integers(0, 2**32),
)  # fmt: skip


class _Entries:
    """What ``os.scandir`` returns, of given entries."""

    def __init__(self, entries):
        self.entries = iter(entries)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.entries)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    close = __exit__


@contextlib.contextmanager
def shuffled(seed):
    """Folders are listed in any order, whatever the file system does."""
    rng = random.Random(seed)
    scandir, listdir = os.scandir, os.listdir

    def scanned(path="."):
        with scandir(path) as entries:
            found = list(entries)
        rng.shuffle(found)
        return _Entries(found)

    def listed(path="."):
        found = listdir(path)
        rng.shuffle(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", scanned)
        patch.setattr(os, "listdir", listed)
        yield


@pytest.fixture(scope="module", params=SETS)
def plain(request, tmp_path_factory):
    """A sound tree with strays, its config, and room for what these tell."""
    root = tmp_path_factory.mktemp("plain") / "root of the plain tree"
    root.mkdir()
    config = SETS[request.param](root)
    found = sorted(p for p in root.rglob("*") if p.is_file())
    for file in random.Random(request.param).sample(found, min(3, len(found))):
        shutil.copy(file, file.with_stem(f"{file.stem} (copy)"))
        (file.parent / ".hidden.png").write_bytes(b"")
    return root, config, {}


def laid_out(plain, base, layout):
    """The files once more, as a layout has them; the config."""
    plain_root, config, _ = plain
    rng = random.Random(layout.seed)
    root, aside = base / layout.root, base / "aside of it"
    real = aside / "root" if layout.link == "root" else root
    found = sorted(p.relative_to(plain_root) for p in plain_root.rglob("*") if p.is_file())
    rng.shuffle(found)
    for path in found:
        (real / path).parent.mkdir(parents=True, exist_ok=True)
        os.link(plain_root / path, real / path)
        os.utime(real / path, (rng.randrange(2**31), rng.randrange(2**31)))
    aside.mkdir(exist_ok=True)
    moved = []
    if layout.link == "root":
        root.symlink_to(real)
    elif layout.link == "files":
        moved = [root / path for path in found[: rng.randrange(1, 6)]]
    elif folders := sorted(p for p in root.rglob("*") if p.is_dir() and layout.link == "folder"):
        moved = [rng.choice(folders)]
    for i, place in enumerate(moved):
        place.rename(aside / f"{i} {place.name}")
        place.symlink_to(aside / f"{i} {place.name}")
    start = f"../{base.name}/{layout.root}" if layout.relative else str(root)
    keys = {k: v.replace(str(plain_root), start) for k, v in vars(config).items()
            if isinstance(v, str)}  # fmt: skip
    return dataclasses.replace(config, **keys)


def told(config, roots, *, full):
    """Everything that a data set says of itself, without the place of its root."""
    data = check(config) if full else indexed(config)
    faults = []
    for fault in map(str, data.faults):
        for root in filter(None, roots):
            fault = fault.replace(root, "ROOT")
        faults.append(fault)
    if full:
        return sorted(faults), data.rows, data.skipped, data.protocol["split_hash"]
    records = {split: data.source(split).records for split in data.splits}
    return sorted(faults), records, data.categories, data.protocol["split_hash"]


def compare(plain, layout, *, full):
    plain_root, config, expected = plain
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        changed = laid_out(plain, pathlib.Path(folder), layout)
        if full not in expected:
            expected[full] = told(config, [str(plain_root)], full=full)
        with shuffled(layout.seed):
            found = told(changed, [f"{folder}/{layout.root}", changed.root], full=full)
    assert found == expected[full]


def _property(examples, *, full):
    @hypothesis.settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(layout=LAYOUTS)
    def test(plain, layout):
        compare(plain, layout, full=full)

    return test


test_index_of_the_same_files = _property(4, full=False)
test_index_of_the_same_files_often = pytest.mark.slow(_property(20, full=False))
test_check_of_the_same_files = pytest.mark.slow(_property(4, full=True))
