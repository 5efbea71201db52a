"""Runs in a bucket, against a stand-in that speaks HTTP to gcsfs and TensorStore alike.

It shows that paths, listings, checkpoints and metric files work without append, rename and
directories. It does not show the real service's authentication, latency, throttling or quotas.
"""

import dataclasses
import importlib.util
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dsad.assembly import runs, workdir
from dsad.cli import main
from dsad.core import paths
from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.metric_files import read_metrics
from dsad.core.types import RunInfo
from dsad.evaluation.results import read_results
from dsad.terminal import flags
from dsad.train.checkpoint import CheckpointConfig, Checkpointer
from dsad.train.writer import MetricWriter
from tests import gcs
from tests.cli.test_cli import SMALL
from tests.evaluation.test_maps import read_map
from tests.helpers import alone
from tests.train.test_checkpoint import (  # noqa: F401
    abstract,
    equal,
    flipped,
    opened,
    save,
    state,
)
from tests.train.test_writer import scalars

# Not importorskip: the library looks at its environment when it is imported.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None, reason="gs:// needs the extra gcs"
)


@pytest.fixture(scope="module")
def server():
    """One for all tests: the libraries read its address once per process."""
    with pytest.MonkeyPatch.context() as patch, gcs.serving("bucket") as store:
        for name, value in gcs.environment(store.url).items():
            patch.setenv(name, value)
        yield store


@pytest.fixture
def store(server):
    server.objects.clear()
    server.refuse = None
    return server


RUN = "gs://bucket/some/run"
INFO = RunInfo(total_steps=4, batch_size=8, samples=40, classes=2)


def test_paths_of_buckets_stay_as_they_are(tmp_path, monkeypatch):
    assert str(paths.directory(RUN) / "a") == f"{RUN}/a"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert str(paths.directory("~/x")) == f"{tmp_path}/x"
    assert str(paths.directory("y/../z")) == f"{tmp_path}/z"
    for bad in ("s3://bucket/x", "gs://", "gs:///"):
        with pytest.raises(ConfigError, match=bad):
            paths.directory(bad)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gs://bucket/x: .*pip install 'dsad\[gcs\]'"):
        workdir.claim("gs://bucket/x", "pretrain", {}, info=INFO)


def test_checkpoints_are_written_whole_restored_and_removed(store, opened):  # noqa: F811
    checkpointer = opened(RUN, keep=1, permanent=4)
    assert checkpointer.latest() is None
    save(checkpointer, 2, 4, 6, 8, 10, 12)
    assert checkpointer.steps() == [4, 8, 10, 12]
    found, meta = checkpointer.restore(abstract(state(8)), 8)
    assert equal(found, state(8))
    assert meta == {"data": {"at": 8}}
    assert not store.names("some/run/checkpoints/6/")  # nothing of the removed ones is left
    params, _, step = opened(RUN, read_only=True).weights()
    assert step == 12
    assert equal(params, state(12).params)
    with pytest.raises(WorkdirError, match="no such directory"):
        opened("gs://bucket/typo", read_only=True)


def test_a_half_in_a_bucket_is_never_seen_and_goes_at_the_next_start(store, opened):  # noqa: F811
    save(opened(RUN), 1, 2)
    del store.objects["bucket", "some/run/checkpoints/2/commit_success.txt"]
    assert opened(RUN, read_only=True).latest() == 1
    assert store.names("some/run/checkpoints/2/")
    again = opened(RUN)
    assert again.steps() == [1]
    assert not store.names("some/run/checkpoints/2/")
    save(again, 2)
    assert again.steps() == [1, 2]


def test_what_makes_one_whole_is_written_last(store, opened):  # noqa: F811
    """Behind the digests: without them nobody knows whether the rest is right."""
    written = []
    store.refuse = lambda method, bucket, name: written.append(name) if method != "DELETE" else None
    save(opened(RUN), 1)
    names = [n.removeprefix("some/run/checkpoints/1/") for n in written]
    assert names[-2:] == ["digests.json", "commit_success.txt"]


@pytest.mark.slow
def test_a_damaged_one_in_a_bucket_is_named(store, opened):  # noqa: F811
    save(opened(RUN), 1, 2)
    for name in set(store.names("some/run/checkpoints/2/")) - {
        "some/run/checkpoints/2/commit_success.txt"
    }:
        whole = store.objects["bucket", name]
        store.objects["bucket", name] = (flipped(whole[0]), 999)
        with pytest.raises(WorkdirError, match=rf"2: .*damaged.*gcloud storage rm -r {RUN}/check"):
            opened(RUN).restore(abstract(state(2)))
        store.objects["bucket", name] = whole
    for name in store.names("some/run/checkpoints/2/state/"):
        store.objects["bucket", name] = (store.objects["bucket", name][0][:10], 999)
    with pytest.raises(WorkdirError, match=rf"2: .*damaged.*gcloud storage rm -r {RUN}/check"):
        opened(RUN).restore(abstract(state(2)))


def test_removing_begins_with_what_makes_it_whole(store, opened):  # noqa: F811
    """A kill after any number of deletions leaves nothing that looks like a checkpoint."""
    checkpointer, deleted = opened(RUN, keep=1), []
    store.refuse = lambda method, bucket, name: deleted.append(name) if method == "DELETE" else None
    save(checkpointer, 1, 2)
    assert deleted[0] == "some/run/checkpoints/1/commit_success.txt"


@pytest.mark.parametrize("place", ["gs://nobody/run", "gs://bucket/closed"])
def test_a_bucket_that_cannot_be_written_is_refused_at_once(store, place):
    store.refuse = lambda method, bucket, name: 403 if "closed" in name else None
    with pytest.raises(WorkdirError, match=rf"^{place}/config.json: .*another --workdir"):
        workdir.claim(place, "pretrain", {"a": 1}, info=INFO)
    with pytest.raises(WorkdirError, match=rf"^{place}/checkpoints: cannot be written"):
        Checkpointer(place, CheckpointConfig())


def test_rights_that_end_during_a_run_stop_it_and_keep_the_last_one(store, opened):  # noqa: F811
    checkpointer = opened(RUN)
    save(checkpointer, 1)
    store.refuse = lambda method, bucket, name: 403 if "checkpoints/2" in name else None
    with pytest.raises(WorkdirError, match=rf"^{RUN}/checkpoints: cannot .*step 1; --resume"):
        save(checkpointer, 2)
    store.refuse = None
    assert equal(opened(RUN).restore(abstract(state(1)))[0], state(1))


def test_metrics_gather_in_parts_and_are_joined(store):
    now = [0.0]
    writer = MetricWriter(RUN, interval=60.0, clock=lambda: now[0])
    for step in range(1, 8):
        now[0] += 20.0
        writer.write(step, {"loss": 1.0 / step})
        if step == 4:
            writer.flush()  # as before a checkpoint
    # Written at 60 s (step 3), by the flush, and at 140 s; the process is killed here.
    rows = read_metrics(f"{RUN}/metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6, 7]
    writer.write(8, {"loss": 0.1})  # lost, but no checkpoint holds it
    assert len(read_metrics(f"{RUN}/metrics.jsonl")) == 7
    again = MetricWriter(RUN, resume_step=4)
    assert [r["step"] for r in read_metrics(f"{RUN}/metrics.jsonl")] == [1, 2, 3, 4]
    assert not store.names("some/run/metrics.jsonl.parts/0")
    again.write(5, {"loss": 0.5})
    again.close()
    rows = read_metrics(f"{RUN}/metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in rows[-2:]] == [(4, 0.25), (5, 0.5)]
    events = [store.objects["bucket", n][0] for n in store.names("some/run/tensorboard/")]
    assert {s: v for file in events for s, v in scalars(file)}[5] == {"loss": 0.5}


def test_large_metric_files_are_cut_into_parts(store, monkeypatch):
    monkeypatch.setattr("dsad.train.writer._PART", 100)
    writer = MetricWriter(RUN, interval=0.0)
    for step in range(20):
        writer.write(step, {"loss": 0.5})
    writer.close()
    parts = store.names("some/run/metrics.jsonl.parts/")
    assert len(parts) > 3
    assert all(len(store.objects["bucket", p][0]) < 200 for p in parts)
    assert [r["step"] for r in read_metrics(f"{RUN}/metrics.jsonl")] == list(range(20))


def test_a_bucket_is_claimed_like_a_directory(store):
    def claim(config, **how):
        return workdir.claim(RUN, "pretrain", config, info=INFO, **how)

    with pytest.raises(WorkdirError, match="nothing to resume"):
        claim({"a": 1}, resume=True)
    assert not workdir.holds_run(RUN)
    assert str(claim({"a": 1})) == RUN
    assert workdir.holds_run(RUN)
    assert workdir.read(RUN)["config"] == {"a": 1}
    with pytest.raises(WorkdirError, match="in use"):
        claim({"a": 1})
    store.put("bucket", "some/run/checkpoints/3/x", b"")
    with pytest.raises(WorkdirError, match=r"config.a: 1 → 2"):
        claim({"a": 2}, resume=True)
    claim({"a": 2}, overwrite=True)
    assert store.names() == ["some/run/config.json"]


def assert_equal(one, two, at=""):
    """Values of two results, but for times."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), at
        for name in one.keys() - {"seconds", "date", "stamp_sha256"}:
            assert_equal(one[name], two[name], f"{at}/{name}")
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, two, err_msg=at)
    else:
        assert one == two, at


@pytest.mark.slow
def test_an_evaluation_in_a_bucket_is_that_on_a_disk(store, tmp_path, monkeypatch):
    """Numbers, pictures, curves and maps; the backbone's run, its curves and the page too."""
    monkeypatch.chdir(tmp_path)  # where nothing called "gs:" may appear
    run, _, _ = flags.Command("x", "", config="mae").parse(["--config=mae:smoke"])
    workdir.claim(RUN, "pretrain", run.to_dict(), info=INFO)
    writer = MetricWriter(RUN)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0 / step})
    writer.close()

    remote, local = "gs://bucket/evaluations/here", tmp_path / "here"
    for place in (remote, local):
        argv = [a.replace("layer1", "block1") for a in SMALL]
        argv += ["--config.data.categories=('wood',)", "--config.evaluation.save_maps=png"]
        argv += [f"--config.backbone=run:{RUN}@0", "--config.weights=", f"--workdir={place}"]
        assert main.main(["evaluate", *argv]) == 0
    with pytest.raises(WorkdirError, match="in use"):
        workdir.claim(remote, "evaluate", {})
    files = {n.removeprefix("evaluations/here/") for n in store.names("evaluations/")}
    assert files == {p.relative_to(local).as_posix() for p in local.rglob("*.*")}
    assert {"results.json", "gallery.npz", "curves.npz", "anomaly_maps/stamp.json"} <= files
    one, two = (dataclasses.asdict(read_results(place)) for place in (remote, local))
    assert_equal(one, two)
    pictures = sorted(name for name in files if name.endswith(".png"))
    assert pictures
    for name in pictures:
        np.testing.assert_array_equal(
            read_map(f"{remote}/anomaly_maps/{name.partition('/')[2]}"),
            read_map(local / name),
        )

    page = tmp_path / "one.html"
    assert main.main(["report", remote]) == 0
    assert main.main(["report", remote, f"--out={page}"]) == 0
    assert store.objects["bucket", "evaluations/here/report.html"][0] == page.read_bytes()
    assert "3 steps" in page.read_text()
    assert 'aria-label="Loss"' in page.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "one.html"]


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_resumed_and_read(store, tmp_path):
    def command(place, *flags):
        return [
            sys.executable, "-m", "dsad", "pretrain", "--config=mae:smoke", "--config.steps=12",
            "--config.checkpoint.every=2", f"--workdir={place}", *flags,
        ]  # fmt: skip

    done = subprocess.run(command(tmp_path / "whole"), env=alone(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    process = subprocess.Popen(command(RUN), env=alone(), stderr=subprocess.PIPE)
    end = time.monotonic() + 240
    while not store.names("some/run/checkpoints/4/"):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = subprocess.run(command(RUN, "--resume"), env=alone(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout

    one = runs.backbone(f"run:{tmp_path / 'whole'}", "", 0)
    two = runs.backbone(f"run:{RUN}", "", 0)
    assert two.description.startswith(f"{RUN} step 12")
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = [read_metrics(f"{p}/metrics.jsonl") for p in (tmp_path / "whole", RUN)]
    assert [(r["step"], r["loss"]) for r in rows[0]] == [(r["step"], r["loss"]) for r in rows[1]]
