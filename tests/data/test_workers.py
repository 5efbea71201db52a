"""Worker processes: the same batches and positions as without, and an end to all of them."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dsad.core.errors import ConfigError, DataError
from dsad.data import records_builder
from dsad.data.base import DataConfig, Fault, FaultError, load
from dsad.data.pipeline import make_pipeline
from tests.data import trees
from tests.helpers import alone

FACTS = ("foreground_box", "original_size")


@pytest.fixture(autouse=True)
def nothing_left():
    """What a failed test leaves running does not fail the next one."""
    yield
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


@pytest.fixture
def source(tmp_path):
    return load(trees.mvtec(tmp_path)).source("train")


def iterator(source, workers=0, batch_size=4, **kwargs):
    made = make_pipeline(
        source, trees.batch_spec(20, FACTS), cache="none", batch_size=batch_size, seed=5,
        workers=workers,
        **kwargs,
    )  # fmt: skip
    return made.iterator()


def take(batches, count):
    return [next(batches) for _ in range(count)]


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for x, y in ((a, b), (a["facts"], b["facts"])):
            assert x.keys() == y.keys()
            for name in x.keys() - {"facts"}:
                assert x[name].dtype == y[name].dtype
                np.testing.assert_array_equal(x[name], y[name])


@pytest.mark.slow
def test_a_run_goes_on_with_other_workers(source):
    """Saved without workers, resumed with two, saved again, resumed without."""
    whole = take(iterator(source), 9)
    first = iterator(source)
    same(take(first, 2), whole[:2])
    second = iterator(source, workers=2)
    second.set_state(first.get_state())
    assert second.get_state() == {"next_index": 2}
    same(take(second, 5), whole[2:7])
    assert second.get_state() == {"next_index": 7}
    third = iterator(source)
    third.set_state(second.get_state())
    same(take(third, 2), whole[7:])
    assert len(multiprocessing.active_children()) == 2
    second.close()
    assert not multiprocessing.active_children()
    with pytest.raises(ValueError, match="closed"):
        next(second)


@pytest.mark.slow
def test_any_number_of_workers_and_processes(source, tmp_path):
    """From files, records and canvases; process p of P reads the p-th part of every batch."""
    config = load(trees.mvtec(tmp_path))
    sources = [source]
    for side in (0, 20):
        out = str(tmp_path / f"records{side}")
        records_builder.write(records_builder.plan(config, side), out)
        sources.append(load(DataConfig(name="records", root=out)).source("train"))
    whole = take(iterator(source), 5)
    for found, workers in zip(sources, (3, 1, 1), strict=True):
        batches = iterator(found, workers=workers)
        same(take(batches, 5), whole)
        batches.close()
    parts = [iterator(s, workers=1, process_index=p, process_count=2)
             for p, s in enumerate(sources[1:])]  # fmt: skip
    for part in parts:
        part.set_state({"next_index": 3})  # as a single process has saved it
    for expected in whole[3:]:
        halves = [next(part) for part in parts]
        for name in ("index", "epoch", "image", "size", "category"):
            joined = np.concatenate([half[name] for half in halves])
            np.testing.assert_array_equal(joined, expected[name])
    for part in parts:
        part.close()


def test_a_fault_keeps_its_list_between_processes():
    import pickle

    faults = tuple(
        Fault(check="K8", severity="error", path=f"{i}.png", message="broken") for i in range(2)
    )
    raised = FaultError(*faults, where="folder in here")
    again = pickle.loads(pickle.dumps(raised))
    assert again.faults == faults
    assert str(again) == str(raised)


def test_an_unreadable_image_is_named_by_the_main_process(source, tmp_path):
    (tmp_path / "disc/train/good/001.png").write_bytes(b"no image")
    batches = iterator(source, workers=1, batch_size=6)
    with pytest.raises(DataError, match=r"^disc/train/good/001.png: \[K8\] cannot be decoded"):
        take(batches, 2)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_worker_that_dies_is_no_hang(source):
    batches = iterator(source, workers=2)
    take(batches, 1)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"workers=2 ended .* out of memory, or /dev/shm"):
        take(batches, 100)
    assert not multiprocessing.active_children()


def test_workers_need_something_to_read(source):
    for cache in ("device", "host"):
        with pytest.raises(ConfigError, match=rf'workers: expected 0 with cache="{cache}".*nd 2'):
            DataConfig(cache=cache, workers=2)
        with pytest.raises(ConfigError, match=r"config.data.workers=2: expected 0 with cache"):
            make_pipeline(
                source, trees.batch_spec(20), cache=cache, batch_size=4, seed=0, workers=2
            )
    with pytest.raises(ConfigError, match=r"data.workers: expected an integer >= 0, found -1"):
        DataConfig(cache="none", workers=-1)
    with pytest.raises(ConfigError, match=r"data.prefetch: expected an integer >= 1, found 0"):
        DataConfig(prefetch=0)


_RUN = """
import multiprocessing, os, signal, sys
from tests.data.test_workers import iterator
from dsad.data.base import DataConfig, load

if __name__ == "__main__":
    source = load(DataConfig(name="mvtec", root=sys.argv[1])).source("train")
    batches = iterator(source, workers=2)
    for _ in range(3):  # by then both have delivered one
        next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[2] == "signal":  # a terminal signals the whole group, the training goes on
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)
            os.kill(child.pid, signal.SIGTERM)
        for _ in range(20):
            next(batches)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    batches.close()
"""


def _running(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", ["signal", "kill"])
def test_workers_live_as_long_as_the_run(source, tmp_path, how):
    script = tmp_path / "run.py"
    script.write_text(_RUN)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), how],
        env=alone(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == (-signal.SIGKILL if how == "kill" else 0), done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(map(_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_running, pids))


_SHORT = """
import sys
from tests.data.test_workers import iterator
from dsad.data.base import DataConfig, load

if __name__ == "__main__":
    source = load(DataConfig(name="mvtec", root=sys.argv[1])).source("train")
    batches = iterator(source, workers=2)
    kept = [next(batches) for _ in range(5)]  # they live as long as the interpreter
    view = kept[0]["image"][1:]
    places = {word for line in open("/proc/self/maps") for word in line.split()[5:6]}
    print(*(place for place in places if place.startswith("/dev/shm/psm_")))
    if sys.argv[2] == "close":
        batches.close()
    print(sum(int(batch["image"].sum()) for batch in kept), int(view.sum()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/dev/shm").is_dir(), reason="needs Linux")
@pytest.mark.parametrize("how", ["close", "leave"])
def test_shared_memory_goes_with_the_run(source, tmp_path, how):
    """No name is left in /dev/shm, and nobody has to clean up and complain about it."""
    script = tmp_path / "run.py"
    script.write_text(_SHORT)
    whole = take(iterator(source), 5)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), how],
        env={**alone(), "PYTHONWARNINGS": "default"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr
    assert "Exception ignored" not in done.stderr
    expected = sum(int(batch["image"].sum()) for batch in whole), whole[0]["image"][1:].sum()
    names, sums = done.stdout.splitlines()
    assert sums.split() == [str(number) for number in expected]
    assert len(names.split()) >= 5
    assert not [name for name in names.split() if pathlib.Path(name).exists()]
