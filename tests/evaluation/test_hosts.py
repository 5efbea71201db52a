"""Evaluation over several processes: what they exchange, and equal results."""

import json
import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from dsad.cli.main import main as dsad_main
from dsad.core import distributed
from dsad.core.config import members
from dsad.core.errors import DsadError, MetricError
from dsad.evaluation import hosts as hosts_module
from dsad.evaluation import metrics, thresholds
from dsad.evaluation.hosts import ALONE, Hosts
from dsad.evaluation.metrics.spro import Saturation, units
from dsad.evaluation.scored import Scored
from dsad.launch_local import free_port
from tests.evaluation import hosts_worker
from tests.helpers import alone

# --- in threads -------------------------------------------------------------------------------


class Threads:
    """Calls a function in as many threads as there were processes, who gather as these do."""

    def __init__(self, monkeypatch, count):
        self.count, self.here = count, threading.local()
        self.meeting, self.slots = threading.Barrier(count, timeout=60), [None] * count
        self.sent = 0
        monkeypatch.setattr(distributed, "gather", self.gather)
        monkeypatch.setattr(distributed, "count", lambda: count)
        monkeypatch.setattr(distributed, "index", lambda: self.here.index)

    def gather(self, array):
        self.slots[self.here.index] = np.array(array)
        self.meeting.wait()
        assert len({(a.shape, a.dtype) for a in self.slots}) == 1
        made = np.stack(self.slots)
        self.sent = max(self.sent, made.nbytes)
        self.meeting.wait()
        return made

    def __call__(self, function):
        found = [None] * self.count

        def run(index):
            self.here.index = index
            try:
                found[index] = function(index, Hosts(several=True))
            except Exception as error:
                found[index] = error

        threads = [threading.Thread(target=run, args=(i,)) for i in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr(hosts_module, "BYTES", 3 * 2**11)
    return Threads(monkeypatch, 3)


def test_totals_are_exact_in_64_bits_and_sent_in_pieces(three):
    own = np.random.default_rng(0).integers(-(2**60), 2**60, (3, 7, 1001))
    for found in three(lambda i, hosts: hosts.total(own[i])):
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, own.sum(axis=0))
    assert three.sent <= 3 * 2**13
    assert three(lambda i, hosts: hosts.total(np.float64(i) / 4).item()) == [0.75] * 3


def test_process_0_gets_arrays_of_any_kind(three):
    rng = np.random.default_rng(0)
    every = {
        1: rng.random((40, 30), np.float32), 4: rng.random((3, 5)) > 0.5, 2: np.zeros((0, 3)),
        9: rng.random((33, 61))[:, ::2], 5: np.arange(7, dtype=np.float16), 7: np.int64(3),
    }  # fmt: skip
    parts = [{1: every[1], 7: every[7]}, {}, {n: every[n] for n in (9, 4, 2, 5)}]
    first, *others = three(lambda i, hosts: hosts.to_main(parts[i]))
    assert others == [{}, {}]
    assert set(first) == set(every)
    for number, array in every.items():
        assert first[number].dtype == array.dtype
        np.testing.assert_array_equal(first[number], array)
    assert three.sent <= 3 * 2**11


def test_rows_come_in_order_and_decisions_from_process_0(three):
    parts = [{3: "d", 0: "a"}, {}, {1: [0.1, None]}]
    assert three(lambda i, hosts: hosts.listed(parts[i])) == [["a", [0.1, None], "d"]] * 3
    assert three(lambda i, hosts: hosts.from_main([i])) == [[0]] * 3


def test_states_that_differ_by_rounding_become_those_of_process_0(three):
    base = {"a": np.float32([1, -0.0, np.nan]), "b": np.arange(5000.0)}

    def moved(index, hosts):
        state = {**base, "b": base["b"] + (1e-9 if index == 1 else 0.0)}
        return hosts.same([base["a"]]), hosts.same([state["b"]]), hosts.agreed(state)

    for same, differs, found in three(moved):
        assert (same, differs) == (True, False)
        assert found["a"].tobytes() == base["a"].tobytes()
        np.testing.assert_array_equal(found["b"], base["b"])
    unlike = three(lambda i, hosts: hosts.agreed([np.zeros(3 + (i == 2))]))
    assert all("different shapes" in str(error) for error in unlike)


def test_a_failure_of_one_is_raised_on_all(three):
    def fails(index, hosts):
        def work():
            if index == 1:
                raise MetricError("no such thing")
            return index

        return hosts.together(work)

    assert [str(e) for e in three(fails)] == ["process 1: no such thing"] * 3


def crowded(count=9):
    """Maps of unequal sizes that few leading bits tell apart, with masks; two are normal."""
    rng = np.random.default_rng(1)
    maps, masks = [], []
    for i in range(count):
        shape = 20 + i, 31 - i
        mask = np.zeros(shape, bool)
        if i % 4:
            mask[2 + i : 7 + i, 3:9] = True
            mask[-3:, -2:] = True
        scores = 100 + 0.1 * (rng.standard_normal(shape) + mask)
        maps.append(scores.astype(np.float32))
        masks.append(mask)
    return maps, masks


#: The images of three processes, of which one has none.
PARTS = ((0, 2, 3, 7), (), (1, 4, 5, 6, 8))


def test_counts_of_all_processes_give_the_numbers_of_one(three):
    maps, masks = crowded()
    settings = {"fpr_limit": (0.3, 0.05), "curve_points": 50, "method": "streaming"}
    expected = metrics.pixel_metrics(maps, masks, **settings)
    exact = metrics.pixel_metrics(maps, masks, (0.3, 0.05))

    def measured(index, hosts):
        own = PARTS[index]
        return metrics.pixel_metrics(
            [maps[i] for i in own], [masks[i] for i in own], hosts=hosts, **settings
        )

    for found in three(measured):
        assert found["error_bound"] <= 1e-5
        for name, value in exact.items():
            assert found[name] == pytest.approx(expected[name], abs=1e-12)
            assert abs(found[name] - value) <= 1e-5
        for name, axes in expected["curves"].items():
            for axis, values in axes.items():
                np.testing.assert_allclose(found["curves"][name][axis], values, atol=1e-12)


def test_channels_of_all_processes_give_the_numbers_of_one(three):
    maps, masks = crowded()
    rules = (Saturation(threshold=9, relative=False), Saturation(threshold=0.3, relative=True))
    pairs = [[m, np.roll(m, 2, 1)] if m.any() else [] for m in masks]  # they overlap
    every = units(maps, pairs, [rules[: len(pair)] for pair in pairs])
    settings = {"fpr_limit": (0.3, 0.05), "method": "streaming"}
    exact = metrics.channel_metrics(maps, every, (0.3, 0.05))

    def measured(index, hosts):
        own = PARTS[index]
        return metrics.channel_metrics(
            [maps[i] for i in own], [every[i] for i in own], hosts=hosts, **settings
        )

    for found in three(measured):
        assert found.pop("error_bound") <= 1e-5
        assert found == pytest.approx(exact, abs=1e-5)


def test_counting_tells_all_of_scores_that_are_not_finite(three):
    maps, masks = crowded()
    maps[4][0, 0] = np.nan

    def measured(index, hosts):
        own = PARTS[index]
        return metrics.pixel_metrics(
            [maps[i] for i in own], [masks[i] for i in own], method="streaming", hosts=hosts
        )

    for error in three(measured):
        assert isinstance(error, DsadError)
        assert "process 2: maps[1]: expected finite scores" in str(error)
    with pytest.raises(MetricError, match="all maps in one process"):
        metrics.pixel_metrics(maps, masks, hosts=Hosts(several=True))


@pytest.mark.parametrize("rate", [0.0, 0.003, 0.25, 0.5, 0.9999])
def test_pixel_threshold_of_all_processes_is_that_of_one(three, rate):
    rng = np.random.default_rng(2)
    maps = [rng.standard_normal((17, 9 + i)).astype(np.float32) * 10.0**i for i in range(9)]
    maps[0] = np.round(maps[0])  # ties, and both zeros
    for scores in (maps, [np.float32([[-1e-40, 0.0, -0.0, 2.0]])] * 9):
        expected = thresholds.pixel_threshold(scores, rate)
        found = three(
            lambda i, hosts, s=scores: thresholds.pixel_threshold(
                [s[n] for n in PARTS[i]], rate, hosts
            )
        )
        assert found == [expected] * 3


def scored(own, hosts):
    maps, masks = crowded()
    masks = [None if i == 5 else m for i, m in enumerate(masks)]
    labels = np.array([0, 1, 1, 1, 1, 1, 1, 1, 0])  # number 4 has an empty mask
    kinds = ["good", "x", "y", "x", "y", "x", "y", "x", "good"]
    return Scored(
        [maps[i] for i in own], [masks[i] for i in own], np.arange(9, dtype=np.float32), labels,
        kinds, hosts, own,
    )  # fmt: skip


def test_thresholds_and_counts_over_processes(three):
    whole = scored(range(9), ALONE)
    expected = thresholds.measure(whole, whole, 0.1), whole.counts()
    found = three(
        lambda i, hosts: (
            thresholds.measure(scored(PARTS[i], hosts), scored(PARTS[i], hosts), 0.1),
            scored(PARTS[i], hosts).counts(),
        )
    )
    assert expected[1]["anomalous_without_mask"] == 1
    assert expected[1]["anomalous_with_empty_mask"] == 1
    assert found == [expected] * 3


def test_part_of_the_images():
    part = scored((1, 4, 5, 6, 8), Hosts(several=True)).part([0, 4, 6, 8])
    maps, _ = crowded()
    assert list(part.own) == [1, 2, 3]
    assert [m.shape for m in part.maps] == [maps[i].shape for i in (4, 6, 8)]
    assert part.scores.tolist() == [0, 4, 6, 8]
    assert part.kinds == ["good", "y", "y", "good"]
    assert part.own_labels.tolist() == [1, 1, 0]


# --- in processes -----------------------------------------------------------------------------


def in_processes(folder, *cases, broken=""):
    """What two processes with two devices each print."""
    port, argv = free_port(), [sys.executable, "-m", "tests.evaluation.hosts_worker", str(folder)]
    running = [
        subprocess.Popen(
            [*argv, broken, str(i), "2", str(port), *cases],
            env={**alone(), "JAX_NUM_CPU_DEVICES": "2"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    texts = [process.communicate(timeout=400) for process in running]
    assert [p.returncode for p in running] == [0, 0], texts
    return [[t for t in out.splitlines() if t.startswith(cases)] for out, _ in texts]


def assert_same_numbers(one, two, at=""):
    """All numbers, texts and lists of two results, but for times and dates."""
    if isinstance(one, dict):
        assert set(one) == set(two), at
        for name in set(one) - {"seconds", "date", "code", "name", "features_from_cache"}:
            assert_same_numbers(one[name], two[name], f"{at}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(two), at
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same_numbers(a, b, f"{at}/{i}")
    elif isinstance(one, float):
        assert two == pytest.approx(one, rel=1e-6, abs=1e-6), at
    else:
        assert one == two, at


def assert_same_results(one, two):
    read = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    assert_same_numbers(*read)
    for name in ("gallery.npz", "curves.npz"):
        with np.load(one / name) as a, np.load(two / name) as b:
            assert set(a.files) == set(b.files)
            for key in set(a.files) - {"stamp_sha256"}:
                tolerance = 1 if a[key].dtype == np.uint8 else 2e-3
                np.testing.assert_allclose(
                    np.float64(a[key]), np.float64(b[key]), atol=tolerance, err_msg=key
                )
    maps = [sorted(p.relative_to(f) for p in f.rglob("anomaly_maps*/**/*")) for f in (one, two)]
    assert maps[0] == maps[1]


def check(tmp_path, *cases):
    """Two processes with two devices each against one with four."""
    told = in_processes(tmp_path / "two", *cases)
    assert told[0] == told[1]  # the numbers are known to both
    for case in cases:
        hosts_worker.evaluated(case, tmp_path / "one" / case, devices=jax.devices()[:4])
        assert_same_results(tmp_path / "one" / case, tmp_path / "two" / case)


@pytest.mark.slow
@pytest.mark.multihost
def test_two_processes_give_the_results_of_one(tmp_path):
    """Sorted and counted, with thresholds; saved maps."""
    check(tmp_path, "knn:exact", "knn:streaming")


@pytest.mark.slow
@pytest.mark.multihost
def test_every_detector_gives_the_results_of_one_process(tmp_path):
    """DSAD_TEST_DETECTORS=knn,padim tests these only."""
    cases = hosts_worker.DETECTORS
    # The 2-class detector trains a residual network on labelled images, which are not here.
    assert {case.partition("-")[0] for case in cases} == set(members("detectors")) - {"twoclass"}
    chosen = os.environ.get("DSAD_TEST_DETECTORS")
    check(tmp_path, *(c for c in cases if not chosen or c.partition("-")[0] in chosen.split(",")))


@pytest.mark.slow
@pytest.mark.multihost
def test_every_way_of_evaluating_gives_the_results_of_one_process(tmp_path):
    check(tmp_path, *hosts_worker.EXTRA)
    # Again, with the features of some images stored and of others not.
    stored = sorted((tmp_path / "two" / "features").rglob("*.features"))
    assert len(stored) == 28
    for path in stored[::3]:
        path.unlink()
    for expected in (18, 28):
        in_processes(tmp_path / "two", "knn:cached")
        assert_same_results(tmp_path / "one" / "knn:cached", tmp_path / "two" / "knn:cached")
        read = json.loads((tmp_path / "two" / "knn:cached" / "results.json").read_text())
        counts = [c["features_from_cache"] for c in read["categories"].values()]
        assert sum(n for c in counts for n in c.values()) == expected


@pytest.mark.slow
@pytest.mark.multihost
@pytest.mark.parametrize("path", ["a/test/good/2.png", "b/train/good/4.png"])
def test_a_broken_file_of_one_process_is_told_by_both(tmp_path, path):
    """It lies among the images of one of them; the other would wait for its features."""
    told = in_processes(tmp_path, "knn", broken=path)
    assert told[0] == told[1]
    assert told[0][0].startswith("knn: DsadError: process ")
    assert f"{path}: cannot be decoded" in told[0][0]
    assert not (tmp_path / "knn" / "results.json").exists()


SMALL = (
    "--config.data.name=synthetic", "--config.data.categories=('wood',)",
    "--config.data.synthetic.train=5", "--config.data.synthetic.good=3",
    "--config.data.synthetic.bad=1", "--config.data.synthetic.size=64",
    "--config.evaluation.image_size=64", "--config.evaluation.batch_size=8",
    "--config.weights=random",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.multihost
@pytest.mark.parametrize(("detector", "method"), [("patchcore", "exact"), ("knn", "streaming")])
def test_the_command_in_two_processes(tmp_path, detector, method, capsys):
    argv = ["evaluate", f"--config={detector}", f"--config.evaluation.method={method}", *SMALL]
    done = subprocess.run(
        [sys.executable, "-m", "dsad.launch_local", "-n", "2", "--devices", "2", "--", *argv,
         f"--workdir={tmp_path}/two"],
        env=alone(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[0] written:" in done.stdout
    assert "[1] written:" not in done.stdout
    assert dsad_main([*argv, "--config.mesh.data=8", f"--workdir={tmp_path}/one"]) == 0
    assert_same_results(tmp_path / "one", tmp_path / "two")
    names = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("one", "two")]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.multihost
def test_the_command_tells_of_a_broken_file_in_both_processes(tmp_path):
    rng = np.random.default_rng(0)

    def save(name, pixels):
        path = tmp_path / "data/nut" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        return path

    for kind, count in {"train/good": 5, "test/good": 3, "test/bent": 2}.items():
        for i in range(count):
            path = save(f"{kind}/{i:03}.png", rng.integers(0, 256, (40, 40, 3), np.uint8))
            if kind == "test/bent":
                mask = np.zeros((40, 40), np.uint8)
                mask[5:20, 5:20] = 255
                save(f"ground_truth/bent/{i:03}_mask.png", mask)
    path.write_bytes(path.read_bytes()[:-900])
    done = subprocess.run(
        [sys.executable, "-m", "dsad.launch_local", "-n", "2", "--devices", "2", "--", "evaluate",
         "--config.data.name=mvtec", f"--config.data.root={tmp_path}/data",
         "--config.evaluation.image_size=32", "--config.evaluation.batch_size=4",
         "--config.weights=random", f"--workdir={tmp_path}/out"],
        env=alone(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    for number in (0, 1):
        told = [t for t in done.stdout.splitlines() if t.startswith(f"[{number}] error:")]
        assert len(told) == 1, done.stdout
        assert "nut/test/bent/001.png: [K8] cannot be decoded" in told[0]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["config.json"]
