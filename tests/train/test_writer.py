"""Metric files: every logged step once, whatever kills and full disks do; events that open."""

import json
import struct
import subprocess

import pytest

from dsad.core import paths
from dsad.core.errors import WorkdirError
from dsad.core.metric_files import read_metrics
from dsad.train.writer import MetricWriter
from tests.train.test_checkpoint import small_disk  # noqa: F401


def crc32c(data):
    """Castagnoli's polynomial, bit by bit."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def masked(data):
    value = crc32c(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(content):
    """The records of an event file, with their checksums verified."""
    from tensorboardX.proto.event_pb2 import Event

    at = 0
    while at < len(content):
        length = content[at : at + 8]
        (size,) = struct.unpack("<Q", length)
        data = content[at + 12 : at + 12 + size]
        assert struct.unpack("<I", content[at + 8 : at + 12]) == (masked(length),)
        assert struct.unpack("<I", content[at + 12 + size : at + 16 + size]) == (masked(data),)
        yield Event.FromString(data)
        at += 16 + size


def scalars(content):
    """(step, {name: value}) of an event file that holds them."""
    for event in events(content):
        if event.summary.value:
            yield event.step, {v.tag: v.simple_value for v in event.summary.value}


def test_the_checksum_of_the_standard():
    assert crc32c(b"123456789") == 0xE3069283


def test_lines_and_events_tell_the_same(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(2, {"loss": 0.5, "lr": 0.25})
    writer.write(4, {"loss": 0.125})
    # Nothing is closed yet: this is what a kill would leave.
    rows = [{"step": 2, "loss": 0.5, "lr": 0.25}, {"step": 4, "loss": 0.125}]
    assert read_metrics(tmp_path / "metrics.jsonl") == rows
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    content = file.read_bytes()
    assert next(events(content)).file_version == "brain.Event:2"
    assert list(scalars(content)) == [(2, {"loss": 0.5, "lr": 0.25}), (4, {"loss": 0.125})]
    writer.close()


def test_a_resumed_run_drops_what_it_will_repeat(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in (2, 4, 6):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    writer = MetricWriter(tmp_path, resume_step=4)
    writer.write(6, {"loss": 0.0})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = [tuple(json.loads(line).values()) for line in lines]
    assert found == [(2, 2.0), (4, 4.0), (6, 0.0)]


def test_events_after_the_resumed_step_are_marked_as_gone(tmp_path):
    MetricWriter(tmp_path, resume_step=4).close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    marks = [e.step for e in events(file.read_bytes()) if e.HasField("session_log")]
    assert marks == [5]


def test_a_kill_while_the_lines_are_rewritten_loses_none(tmp_path, monkeypatch):
    writer = MetricWriter(tmp_path)
    writer.write(2, {"loss": 1.0})
    writer.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(paths.directory(tmp_path)), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricWriter(tmp_path, resume_step=0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_broken_line_in_the_middle_is_named_and_nothing_dropped(tmp_path):
    text = '{"step": 1}\nnonsense\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(WorkdirError, match=r"metrics.jsonl: line 2 is not JSON"):
        MetricWriter(tmp_path, resume_step=9)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_a_full_disk_is_an_error_and_no_silence(small_disk):  # noqa: F811
    disk = small_disk(100)
    writer = MetricWriter(disk)

    def many():
        for step in range(10_000):
            writer.write(step, {"loss": 0.123456789})

    with pytest.raises(WorkdirError, match=r"metrics.jsonl: the disk or quota is full"):
        many()
    assert [r["step"] for r in read_metrics(disk / "metrics.jsonl")][:3] == [0, 1, 2]
    with pytest.raises(WorkdirError, match="full"):
        MetricWriter(disk)


def test_a_directory_without_rights_is_an_error(small_disk):  # noqa: F811
    disk = small_disk(100)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(WorkdirError, match=rf"{disk}/metrics.jsonl: .*Read-only"):
        MetricWriter(disk)
