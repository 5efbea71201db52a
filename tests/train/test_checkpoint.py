"""Checkpoints: which stay, when, what survives kills, damage and full disks, and other meshes."""

import asyncio
import contextlib
import errno
import functools
import gc
import os
import pathlib
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsad.core import digests, paths
from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.launch_local import free_port
from dsad.train.checkpoint import CheckpointConfig, Checkpointer
from dsad.train.loop import train
from dsad.train.state import TrainState
from tests.helpers import alone
from tests.train import test_loop


@pytest.fixture
def opened():
    """Opens checkpointers and closes them after the test, also when it fails."""
    found = []

    def open_(path, **config):
        how = {k: config.pop(k) for k in ("read_only", "say") if k in config}
        found.append(Checkpointer(path, CheckpointConfig(**config), **how))
        return found[-1]

    yield open_
    while found:
        found.pop().close()


def state(step, size=64, seed=None):
    """A state whose numbers tell its step."""
    g = np.random.default_rng(step if seed is None else seed)
    values = jnp.asarray(g.standard_normal((size, 32), np.float32))
    return TrainState(
        step=jnp.int32(step), params={"w": values}, extra={"n": jnp.float32(step)},
        opt_state={"m": values[:8] * 2},
    )  # fmt: skip


def abstract(tree, sharding=None):
    place = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def save(checkpointer, *steps, **how):
    for step in steps:
        checkpointer.save(state(step, **how), {"at": step}, {})
    checkpointer.wait()


def equal(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


# --- which stay, and when


def test_permanent_ones_stay_and_the_newest_of_the_others(tmp_path, opened):
    checkpointer = opened(tmp_path, keep=2, permanent=10)
    save(checkpointer, 3, 6, 9, 10, 12, 15, 20, 21)
    assert checkpointer.steps() == [10, 15, 20, 21]
    assert CheckpointConfig(keep=1).removed([7, 3, 5]) == [3, 5]
    assert CheckpointConfig(keep=1, permanent=1).removed([3, 5, 7]) == []


@pytest.mark.parametrize(
    "bad", [{"every": 0}, {"keep": 0}, {"permanent": -1}, {"minutes": -1.0}, {"minutes": np.nan}]
)
def test_impossible_policies_are_refused(bad):
    with pytest.raises(ConfigError, match=rf"config\.checkpoint\..*{next(iter(bad))}"):
        CheckpointConfig(**bad)


def run_with_clock(tmp_path, opened, times, **config):
    """Steps after which a run saved whose clock shows ``times`` after its steps."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    _, start, step = test_loop.parts(test_loop.Line(), mesh)
    saved, batches = [], test_loop.Batches()
    checkpointer = opened(tmp_path, **config)
    original = checkpointer.save

    def saving(state, *args, **how):
        saved.append(int(state.step))
        original(state, *args, **how)
        checkpointer.wait()  # so that the next question never finds it busy

    checkpointer.save = saving
    run = test_loop.loop(
        tmp_path, step, mesh, batches, checkpointer=checkpointer, total_steps=len(times),
        now=lambda: times[batches.at - 1],
    )  # fmt: skip
    train(run, start)
    return saved


def test_the_clock_adds_checkpoints_to_those_by_step(tmp_path, opened):
    #        step 1   2   3    4    5    6    7    8    9   10
    times = [100, 130, 159, 161, 200, 221, 280, 282, 290, 500]
    # A minute after the start (100): 161. By step at 5 (200); a minute later: not 221, not 259 but
    # 280. The last step is saved whatever the time.
    try:
        found = run_with_clock(tmp_path, opened, times, every=5, minutes=1.0)
        assert found == [4, 5, 7, 10]
        assert run_with_clock(tmp_path / "off", opened, times, every=5) == [5, 10]
    finally:
        while test_loop.OPENED:
            test_loop.OPENED.pop().close()


def test_by_step_also_where_a_permanent_one_is_due(tmp_path, opened):
    checkpointer = opened(tmp_path, every=4, permanent=6)
    assert [s for s in range(1, 13) if checkpointer.due(s)] == [4, 6, 8, 12]


def test_a_running_write_holds_up_neither_the_loop_nor_the_clock(tmp_path, opened):
    notes = []
    checkpointer = opened(tmp_path, minutes=1.0, say=notes.append)
    go_on, finish = threading.Event(), checkpointer._finish
    checkpointer._finish = lambda: (go_on.wait(60), finish())
    assert not checkpointer.overdue(0.0)
    checkpointer.save(state(1), {}, {}, now=0.0)
    assert checkpointer.busy  # save came back, though the background is held
    assert not checkpointer.overdue(1e6)
    threading.Timer(1.5, go_on.set).start()
    checkpointer.save(state(2), {}, {}, now=1e6)  # asked by step: waits for the first, and says so
    checkpointer.wait()
    assert checkpointer.steps() == [1, 2]
    assert len(notes) == 1
    assert "config.checkpoint.every" in notes[0]
    assert not checkpointer.overdue(1e6 + 59)
    assert checkpointer.overdue(1e6 + 60)


def test_what_is_saved_is_the_state_at_that_moment(tmp_path, opened):
    """The step donates its state: its memory is written over while the writer is at work."""
    checkpointer = opened(tmp_path)
    now = state(1, size=2**16)
    before = jax.tree.map(np.array, now)
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    checkpointer.save(now, {}, {})
    for _ in range(5):
        now = update(now)
    jax.block_until_ready(now)
    checkpointer.wait()
    assert equal(checkpointer.restore(abstract(before))[0], before)


# --- kills and damage


def test_halves_are_never_seen_and_go_at_the_next_start(tmp_path, opened):
    save(opened(tmp_path), 3, 6)
    folder = tmp_path / "checkpoints"
    for name in ("9.orbax-checkpoint-tmp", "12.orbax-checkpoint-tmp-17", "deleted-2"):
        (folder / name / "state").mkdir(parents=True)
    assert opened(tmp_path, read_only=True).latest() == 6
    assert len(list(folder.glob("*-*"))) == 3  # a reader leaves them alone
    again = opened(tmp_path)
    assert again.steps() == [3, 6]
    assert not list(folder.glob("*-*"))
    save(again, 9)
    assert equal(again.restore(abstract(state(9)))[0], state(9))


def test_a_kill_while_an_old_one_is_deleted_leaves_no_part_of_it(tmp_path, opened, monkeypatch):
    """The files of a directory go one by one; a kill in between must leave no half checkpoint."""
    checkpointer = opened(tmp_path, keep=1)
    save(checkpointer, 1)
    listed = []

    def killed(self, *args, **how):
        victim = next(p for p in pathlib.Path(self).rglob("*") if p.is_file())
        victim.unlink()
        listed.append(opened(tmp_path, read_only=True).steps())
        raise OSError("stands for the kill")

    monkeypatch.setattr(type(checkpointer.directory), "rmtree", killed)
    save(checkpointer, 2)
    monkeypatch.undo()
    assert listed == [[2]]
    assert opened(tmp_path).steps() == [2]


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def flipped(whole):
    """One bit, in the middle."""
    at = len(whole) // 2
    return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]


DAMAGE = {
    "flipped": flipped,
    "emptied": lambda whole: b"",
    "halved": lambda whole: whole[: len(whole) // 2],
    "deleted": lambda whole: None,
}


def damaged(folder, ways=tuple(DAMAGE)):
    """(what was done, path), with one file of a checkpoint damaged in one way at a time."""
    names = files(folder)
    # Holds nothing: that it is there says that all others are.
    names.remove(folder / "commit_success.txt")
    assert len(names) > 10
    for path in names:
        whole = path.read_bytes()
        for how in ways:
            content = DAMAGE[how](whole)
            path.unlink() if content is None else path.write_bytes(content)
            yield how, path
        path.write_bytes(whole)


def test_any_damage_to_any_file_is_named_with_the_way_back(tmp_path, opened):
    """What goes on reads all of them; what only uses the weights does not need the rest."""
    save(opened(tmp_path), 3, 6)
    reader, broken = opened(tmp_path, read_only=True), tmp_path / "checkpoints" / "6"
    for how, path in damaged(broken):
        reads = [lambda: reader.restore(abstract(state(6)))]
        if broken / "meta" not in path.parents:
            reads.append(reader.weights)
        for read in reads:
            with pytest.raises(WorkdirError) as caught:
                read()
            text = str(caught.value)
            assert text.startswith(f"{broken}: this checkpoint is damaged: "), (how, path)
            assert how == "flipped" or str(path) in text, (how, path)
            assert f"rm -r {broken}" in text
            assert "continues at step 3" in text
        assert equal(reader.weights(3)[0], state(3).params)
    assert equal(reader.restore(abstract(state(6)))[0], state(6))


def test_without_digests_damage_would_be_read_as_numbers(tmp_path, opened, monkeypatch):
    """What they are for: the library itself notices some of it only."""
    save(opened(tmp_path), 3)
    reader = opened(tmp_path, read_only=True)
    monkeypatch.setattr(digests, "check", lambda *args, **how: None)
    wrong = []
    for _, path in damaged(tmp_path / "checkpoints" / "3", ["flipped"]):
        with contextlib.suppress(WorkdirError):
            if not equal(reader.weights()[0], state(3).params):
                wrong.append(path)
    assert wrong


def test_one_that_was_written_without_digests_is_refused(tmp_path, opened):
    save(opened(tmp_path), 3, 6)
    (tmp_path / "checkpoints" / "6" / digests.NAME).unlink()
    with pytest.raises(WorkdirError, match=r"6/digests.json: no such file.*SHA-256.*at step 3"):
        opened(tmp_path, read_only=True).weights()


@pytest.mark.parametrize("index", ["{}", "further"])
def test_a_file_that_the_digests_do_not_know_is_damage(tmp_path, opened, index):
    save(opened(tmp_path), 3, 6)
    folder = tmp_path / "checkpoints" / "6"
    if index == "further":
        (folder / "state" / "d").mkdir(exist_ok=True)
        (folder / "state" / "d" / "more").write_text("")
    else:
        (folder / digests.NAME).write_text(index)
    with pytest.raises(WorkdirError, match=r"digests.json does not know this file.*at step 3"):
        opened(tmp_path).restore(abstract(state(6)))


def test_nobody_sees_one_whose_digests_are_being_written_and_nobody_waits(
    tmp_path, opened, monkeypatch
):
    checkpointer, write, go_on = opened(tmp_path), digests.write, threading.Event()
    monkeypatch.setattr(digests, "write", lambda folder: (go_on.wait(60), write(folder)))
    checkpointer.save(state(1), {}, {})
    assert checkpointer.busy
    assert checkpointer.steps() == []
    go_on.set()
    checkpointer.wait()
    assert checkpointer.steps() == [1]


def test_a_clock_that_jumps_while_one_is_written_changes_nothing(tmp_path, opened, monkeypatch):
    """By a year, after any look at it, in whatever thread: limits of time would be over."""
    real, looks = time.time, 0

    def now():
        nonlocal looks
        looks += 1
        return real() + 366 * 86400 * (looks > jump)

    for jump in range(0, 60, 2):
        looks = 0
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", now)
            save(checkpointer := opened(tmp_path / str(jump)), 3)
        assert looks > jump
    assert equal(checkpointer.restore(abstract(state(3)))[0], state(3))


OUTSIDE = {
    "device memory": jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."
    ),
    "host memory": MemoryError("Unable to allocate 16 GiB"),
    "rights": PermissionError(errno.EACCES, "Permission denied", "state/manifest.ocdbt"),
    "disk": OSError(errno.EIO, "Input/output error"),
    "stale handle": OSError(errno.ESTALE, "Stale file handle"),
    "403": ValueError(
        'PERMISSION_DENIED: Error opening "zarr" driver: Error reading "step/.zarray": HTTP '
        "response code: 403 [tensorstore_spec='{compressor: 1}']"
    ),
    "503": ValueError('UNAVAILABLE: Error reading "corrupt/step/.zarray": HTTP response code: 503'),
    "a condition": ValueError(
        'FAILED_PRECONDITION: Error reading "truncated/crc/0.0": HTTP response code: 412 '
        "[tensorstore_spec='{compressor: 1}']"
    ),
    "unknown": RuntimeError("cannot schedule new futures after shutdown"),
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
@pytest.mark.parametrize("what", OUTSIDE)
def test_what_is_no_damage_never_advises_to_delete(tmp_path, opened, monkeypatch, what, wrapped):
    save(opened(tmp_path), 3, 6)
    reader = opened(tmp_path, read_only=True)

    def fail(*args, **how):
        if not wrapped:
            raise OUTSIDE[what]
        try:
            raise FileNotFoundError("a file that is looked for first")
        except FileNotFoundError:
            raise Exception("Encountered error while reading array index: ...") from OUTSIDE[what]

    with monkeypatch.context() as patch:
        patch.setattr(reader._orbax, "restore", fail)
        for read in (lambda: reader.restore(abstract(state(6))), reader.weights):
            with pytest.raises(WorkdirError) as caught:
                read()
            text = str(caught.value)
            assert f"checkpoints/6: could not be read: {paths.cause(OUTSIDE[what])}; the" in text
            assert "left as it is" in text
            assert "damaged" not in text
            assert "rm -r" not in text
            assert ("more devices" in text or "more memory" in text) == (what == "device memory")
    assert equal(reader.restore(abstract(state(6)))[0], state(6))


def test_what_a_running_training_removed_meanwhile_is_no_damage(tmp_path, opened, monkeypatch):
    writer = opened(tmp_path)
    save(writer, 3, 6)
    reader = opened(tmp_path, read_only=True)
    monkeypatch.setattr(reader, "_require", lambda step: (writer._path(6).rmtree(), 6)[1])
    with pytest.raises(WorkdirError, match=r"6: could not be read: No such file"):
        reader.restore(abstract(state(6)))


@pytest.mark.parametrize("part", ["meta", "state", "state/d", "state/_METADATA"])
def test_a_part_that_is_missing_is_damage(tmp_path, opened, part):
    save(opened(tmp_path), 3, 6)
    (tmp_path / "checkpoints" / "6" / part).rename(tmp_path / "away")
    reader = opened(tmp_path, read_only=True)
    read = reader.weights
    if part == "meta":  # needed to go on only
        assert equal(read()[0], state(6).params)
        read = functools.partial(reader.restore, abstract(state(6)))
    with pytest.raises(WorkdirError, match=r"6: this checkpoint is damaged: .*rm -r .*step 3"):
        read()


def test_going_back_from_a_damaged_one_as_the_message_says(tmp_path, opened):
    save(opened(tmp_path), 3, 6)
    for path in files(tmp_path / "checkpoints" / "6"):
        path.write_bytes(b"")
    with pytest.raises(WorkdirError, match="damaged") as caught:
        opened(tmp_path).restore(abstract(state(6)))
    with pytest.raises(WorkdirError, match=r"run:DIR@3"):
        opened(tmp_path, read_only=True).weights()
    command = str(caught.value).partition("remove it (")[2].partition(")")[0]
    subprocess.run(command.split(), check=True)
    again = opened(tmp_path)
    found, meta = again.restore(abstract(state(3)))
    assert equal(found, state(3))
    assert meta == {"data": {"at": 3}}
    save(again, 6)
    assert equal(again.restore(abstract(state(6)))[0], state(6))


def test_a_resumed_run_goes_on_from_the_newest_that_is_whole(tmp_path, opened):
    said, folder = [], tmp_path / "checkpoints"
    save(opened(tmp_path, keep=3), 3, 6, 9)
    for step in (6, 9):
        largest = max(files(folder / str(step)), key=lambda p: p.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    again = opened(tmp_path, say=said.append)
    found, meta = again.restore_newest(abstract(state(3)))
    assert equal(found, state(3))
    assert meta == {"data": {"at": 3}}
    assert [text.partition(": this checkpoint is damaged")[0] for text in said] == [
        str(folder / "9"), str(folder / "6"),
    ]  # fmt: skip
    assert sorted(p.name for p in folder.glob("damaged-*")) == ["damaged-6", "damaged-9"]
    save(again, 6)
    assert equal(opened(tmp_path).restore_newest(abstract(state(6)))[0], state(6))
    for path in files(folder / "3"):
        path.write_bytes(b"")
    (folder / "6").rename(folder / "elsewhere")
    with pytest.raises(WorkdirError, match="no older one: start again with --overwrite"):
        opened(tmp_path).restore_newest(abstract(state(3)))
    assert (folder / "3").is_dir()


# --- other meshes

SHAPES = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (8, 1), (4, 2), (1, 8)]


def placed(tree, shape):
    """A tree of arrays on a mesh of that shape, all but scalars split over fsdp."""
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1]), devices)
    specs = (PartitionSpec("fsdp") if x.ndim else PartitionSpec() for x in jax.tree.leaves(tree))
    shardings = jax.tree.unflatten(
        jax.tree.structure(tree), [NamedSharding(mesh, s) for s in specs]
    )
    return jax.device_put(tree, shardings)


@pytest.mark.parametrize("before", SHAPES, ids=str)
def test_a_state_goes_from_every_mesh_to_every_other(tmp_path, opened, before):
    checkpointer = opened(tmp_path)
    checkpointer.save(placed(state(5), before), {"at": 40}, {})
    checkpointer.wait()
    for after in SHAPES:
        like = placed(state(0), after)
        want = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        found, meta = checkpointer.restore(want)
        assert equal(found, state(5))
        assert meta == {"data": {"at": 40}}
        for x, w in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            assert x.sharding.is_equivalent_to(w.sharding, x.ndim)
        rows = {s.data.shape[0] for s in found.params["w"].addressable_shards}
        assert rows == {64 // after[1]}
    params, extra, step = opened(tmp_path, read_only=True).weights()
    assert equal((params, extra), (state(5).params, state(5).extra))
    assert step == 5


ALONE = """
import sys
import numpy as np
from dsad.core import distributed
distributed.start(coordinator=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from dsad.core.errors import WorkdirError
from dsad.core.mesh import MeshConfig, make_mesh, replicated
from dsad.train.checkpoint import CheckpointConfig, Checkpointer
from tests.train.test_checkpoint import abstract, state

def read():
    if distributed.index() == 1:
        return "something else"
    reader = Checkpointer(sys.argv[3], CheckpointConfig(), read_only=True)
    params, extra, step = reader.weights(5)
    np.testing.assert_array_equal(params["w"], np.load(sys.argv[4]))
    reader.close()
    return step

found = distributed.together(read)  # collectives that do not match would end the program here
print(distributed.gather_objects(found))
checkpointer = Checkpointer(sys.argv[3], CheckpointConfig())
mesh = replicated(make_mesh(MeshConfig()))
for step in (6, 5):
    try:
        checkpointer.restore(abstract(state(step), mesh), step)
        print(step, "restored")
    except WorkdirError as error:
        print(step, error)
checkpointer.close()
"""


@pytest.mark.slow
@pytest.mark.multihost
def test_a_reader_needs_no_other_process_and_damage_is_told_by_all(tmp_path, opened):
    """One of two reads, the other goes straight on; then both restore, and share the checks.

    Each finds one of two files that lie next to each other in the order of names.
    """
    save(opened(tmp_path), 5, 6)
    broken = files(tmp_path / "checkpoints" / "6" / "state")[:2]
    for path in broken:
        path.write_bytes(flipped(path.read_bytes()))
    np.save(tmp_path / "w.npy", state(5).params["w"])
    coordinator = f"localhost:{free_port()}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE, coordinator, str(index), str(tmp_path),
             str(tmp_path / "w.npy")],
            env={**alone(), "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        for process in running:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
            first, second, third = out.splitlines()[-3:]
            assert first == "[5, 'something else']"
            assert f"6: this checkpoint is damaged: {broken[0]}: its SHA-256" in second
            assert third == "5 restored"
    finally:
        for process in running:
            process.kill()
            process.wait()


# --- full disks


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of so many kilobytes; skips the test where that is not allowed."""
    mounted = []

    def make(kilobytes):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("no mount command")
        if done.returncode:
            pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_stops_the_run_and_keeps_the_last_checkpoint(small_disk, opened):
    disk = small_disk(3000)
    checkpointer = opened(disk, permanent=1)
    save(checkpointer, 1, size=2**13)  # 1 MiB each
    save(checkpointer, 2, size=2**13)
    told = r"disk or quota is full .*\d \w+ free.*step 2; --resume"
    with pytest.raises(WorkdirError, match=told):
        save(checkpointer, 3, size=2**13)
    checkpointer.wait()  # told once
    again = opened(disk, permanent=1)
    assert again.steps() == [1, 2]
    assert equal(again.restore(abstract(state(2, 2**13)))[0], state(2, 2**13))
    again.directory.joinpath("1").rmtree()
    save(again, 3, size=2**13)
    assert equal(again.restore(abstract(state(3, 2**13)))[0], state(3, 2**13))


def test_a_failure_in_the_background_is_raised_by_the_next_save(small_disk, opened):
    disk = small_disk(1500)
    checkpointer = opened(disk)
    save(checkpointer, 1, size=2**13)
    checkpointer.save(state(2, 2**13), {}, {})
    with pytest.raises(WorkdirError, match="full"):
        checkpointer.save(state(3, 2**13), {}, {})
    assert checkpointer.steps() == [1]


def test_a_disk_that_becomes_read_only_is_named(small_disk, opened):
    disk = small_disk(3000)
    checkpointer = opened(disk)
    save(checkpointer, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(WorkdirError, match=rf"{disk}.*Read-only file system.*step 1; --resume"):
        save(checkpointer, 2)
    with pytest.raises(WorkdirError, match=rf"{disk}.*Read-only.*another --workdir"):
        opened(disk)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from dsad.core.errors import WorkdirError
from dsad.train.checkpoint import CheckpointConfig, Checkpointer
from tests.train.test_checkpoint import state
checkpointer = Checkpointer(sys.argv[1], CheckpointConfig())
checkpointer.save(state(1), {}, {})
checkpointer.save(state(2, size=2**13), {}, {})
try:
    checkpointer.wait()
except WorkdirError as error:
    print(error, checkpointer.steps())
"""


def test_a_write_beyond_a_limit_is_told_like_a_full_disk(tmp_path):
    """Needs no rights to mount: the limit is on the size of a file."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], env=alone(), capture_output=True, text=True
    )
    assert "disk or quota is full" in done.stdout, done.stderr
    assert f"{tmp_path}/checkpoints" in done.stdout
    assert "step 1; --resume" in done.stdout
    assert done.stdout.rstrip().endswith("[1]")


def test_a_place_below_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match=r"file/run/checkpoints: cannot be written: Not a dir"):
        Checkpointer(tmp_path / "file" / "run", CheckpointConfig())


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_the_start(
    tmp_path, opened, monkeypatch
):
    notes = []
    checkpointer = opened(tmp_path, keep=2, permanent=10, say=notes.append)
    each = sum(x.nbytes for x in jax.tree.leaves(state(1)))
    monkeypatch.setattr(paths, "free", lambda path: 3 * each - 1)
    with pytest.raises(WorkdirError, match=r"config.checkpoint.keep=2 .*need 27.7 kB"):
        checkpointer.check(abstract(state(1)), 100)
    monkeypatch.setattr(paths, "free", lambda path: 3 * each)
    checkpointer.check(abstract(state(1)), 9)
    assert not notes
    checkpointer.check(abstract(state(1)), 10)
    assert "the 1 permanent" in notes[0]
    save(checkpointer, 3)  # what is there already needs no more room
    monkeypatch.setattr(paths, "free", lambda path: 2 * each)
    checkpointer.check(abstract(state(1)), 9)


def test_what_was_raised_is_not_told_again_by_the_event_loop(tmp_path, opened, caplog):
    opened(tmp_path)
    loop = asyncio.new_event_loop()
    for text in ("Error writing in OCDBT database: No space left", "of somebody else"):
        loop.create_future().set_exception(ValueError(text))  # never retrieved
    gc.collect()
    loop.close()
    assert [str(record.exc_info[1]) for record in caplog.records] == ["of somebody else"]


@pytest.mark.slow
def test_the_command_ends_with_an_error_where_the_disk_fills_up(small_disk):
    disk = small_disk(6000)  # a checkpoint has 1.2 MB
    done = subprocess.run(
        [sys.executable, "-m", "dsad", "pretrain", "--config=mae:smoke", "--config.steps=40",
         "--config.checkpoint.every=1", "--config.checkpoint.permanent=1",
         f"--workdir={disk / 'run'}"],
        env=alone(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "will not all fit" in done.stdout  # said before the start
    assert done.stderr.splitlines()[-1].startswith(f"error: {disk}")
    assert "disk or quota is full" in done.stderr
    steps = [int(p.name) for p in (disk / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert f"step {max(steps)}; --resume" in done.stderr
    assert os.path.isdir(disk / "run" / "checkpoints" / str(max(steps)))
