"""Damaged data sets: every one is refused by name or can be read, never anything else.

``python -m tests.data.test_fuzz COUNT [START]`` tells of all cases and ends at no defect.
"""

import collections
import csv
import faulthandler
import functools
import importlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback

import pytest

from dsad.core.config import members
from dsad.core.errors import ConfigError, DataError
from dsad.data.base import DataConfig, load
from dsad.data.checks import check
from dsad.data.pipeline import make_pipeline
from tests.data import mutations, trees

#: Seconds for one case, and megabytes that all together may take.
LIMIT, MEMORY = 120, 1500


def listed(root, suffix):
    """Images with labels and masks in a list."""
    config = trees.labelled(root)
    rows = []
    for split in ("train", "test"):
        for r in load(config).source(split).records:
            label = "bad" if r.label else "good"
            rows.append({"path": r.path, "label": label, "mask": "".join(r.masks), "group": r.kind,
                         "category": r.category, "kind": r.kind})  # fmt: skip
            rows[-1]["group"] = r.path if r.label == 0 else ""
    file = root / f"list{suffix}"
    with file.open("w", newline="") as stream:
        if suffix == ".csv":
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            stream.write("\n".join(json.dumps(row) for row in rows))
    return DataConfig(name="folder", manifest=str(file))


def sets():
    """How small data sets of files are written, by name."""
    found = {
        "folder unlabelled": lambda root: trees.folder(root),
        "list.csv": lambda root: listed(root, ".csv"),
        "list.jsonl": lambda root: listed(root, ".jsonl"),
        "imagenet tars": lambda root: trees.imagenet(root, "tars"),
        "imagenet folder": lambda root: trees.imagenet(root, "folder"),
    }
    for member in members("data"):
        case = importlib.import_module(f"tests.contracts.datasets.{member}")
        if member not in ("synthetic", "records"):
            for name in getattr(case, "NAMES", (member,)):
                found[name] = functools.partial(case.small, name)
    return found


SETS = sets()


class Fuzz:
    """Cases by number, below a folder that holds a sound tree of each data set."""

    def __init__(self, folder):
        self.folder = folder
        self.sound = {}
        self.counts = collections.Counter()

    def config(self, name, root):
        """A fresh copy of the sound tree at ``root``."""
        sound = self.folder / "sound" / name.replace(":", "-")
        if name not in self.sound:
            sound.mkdir(parents=True)
            config = SETS[name](sound)
            assert check(config).ok, name
            self.sound[name] = config
        shutil.copytree(sound, root, copy_function=os.link)
        keys = {k: v.replace(str(sound), str(root)) for k, v in vars(self.sound[name]).items()
                if isinstance(v, str)}  # fmt: skip
        return DataConfig(**{**vars(self.sound[name]), **keys})

    def __call__(self, number):
        """One case; its outcome."""
        rng = random.Random(f"case {number}")
        name, root = rng.choice(sorted(SETS)), self.folder / "case"
        config = self.config(name, root)
        what = [mutations.damaged(rng, root) for _ in range(rng.choice((1, 1, 1, 2)))]
        told = f"{number} {name}: " + ", ".join(f"{k} {str(p)[-80:]!r}" for k, p in what)
        late = functools.partial(_late, told)
        old = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        try:
            outcome = read(config, [path for _, path in what])
        except BaseException as problem:
            problem.add_note(told)
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
            for folder, _, _ in os.walk(root):
                os.chmod(folder, 0o700)
            shutil.rmtree(root)
        self.counts[outcome] += 1
        return outcome


def _late(told, number, frame):
    """Threads that hang cannot be stopped: the process ends, and says where."""
    print(f"no end after {LIMIT} s: {told}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True, file=sys.__stderr__)
    os._exit(70)


def read(config, damaged):
    """Check and read a damaged data set; what comes of it."""
    try:
        report = check(config)
        texts = [str(f) for f in report.faults if f.severity == "error"]
        told = " ".join(map(str, report.faults))
        told.encode()  # can be printed
    except (ConfigError, DataError) as problem:
        report, texts, told = None, [str(problem)], str(problem)
    refused = ""
    try:
        data = load(config)
        for split in data.splits:
            if len(source := data.source(split)):
                spec = trees.batch_spec(20, label=True, mask=True)
                pipeline = make_pipeline(source, spec, cache="host", batch_size=4, seed=0)
                assert pipeline.store is not None
                assert len(pipeline.store["image"]) == len(source)
            elif split == "train":
                assert "[K0]" in told, "no training image, and nobody says so"
    except (ConfigError, DataError) as problem:
        refused = str(problem)
        texts.append(refused)
    assert not (refused and report and report.ok), f"found sound, but: {refused}"
    assert all(texts)
    if texts:
        words = {word for path in damaged for word in _words(path)}
        assert any(w in text for text in texts for w in words), f"names nothing: {texts}"
    if report is None:
        return "refused by the config"
    if report.ok:
        return "read with warnings" if report.faults else "read"
    return "refused when loaded" if refused else "found by the full check alone"


def _words(path):
    """Names by which a fault may tell of a path: its own, those of the folders above it."""
    parts = [os.fsencode(p).decode("utf-8", "backslashreplace") for p in path.parts[3:]]
    return {*parts, path.stem}


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


def _run(fuzz, numbers):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in numbers:
        fuzz(number)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEMORY, f"{grown:.0f} MB"


@pytest.mark.parametrize("part", range(4))
def test_damaged_sets(fuzz, part):
    _run(fuzz, range(50 * part, 50 * part + 50))
    assert len(fuzz.counts) > 2


#: Cases that found a defect once: a tar that an error did not name.
KNOWN = (1598, 1771, 2786, 4087)


def test_cases_that_found_a_defect(fuzz):
    _run(fuzz, KNOWN)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_damaged_sets(fuzz, part):
    _run(fuzz, range(100 * part, 100 * part + 100))


def main(count=200, start=0):
    import time
    import warnings

    warnings.simplefilter("error")
    kinds, defects = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(pathlib.Path(folder))
        begin = time.time()
        for number in range(start, start + count):
            try:
                fuzz(number)
                if number % 250 == 249:
                    print(number + 1, dict(fuzz.counts), flush=True)
            except Exception as problem:
                last = [f for f in traceback.extract_tb(problem.__traceback__)
                        if "/dsad/" in f.filename or "test_fuzz" in f.filename][-1]  # fmt: skip
                key = f"{type(problem).__name__} {pathlib.Path(last.filename).name}:{last.lineno}"
                defects[key] += 1
                if defects[key] <= 2:
                    print(
                        f"DEFECT {key}: {str(problem)[:300]} | {getattr(problem, '__notes__', '')}",
                        flush=True,
                    )
        for name, times in (fuzz.counts + defects + kinds).most_common():
            print(f"{times:6} {name}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"{count} cases, {time.time() - begin:.1f} s, peak {peak} MB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
