"""What the benchmark topics share: the order of the runs, memory, flags and peers."""

import builtins
import mmap
import sys

import numpy as np
import pytest

from dsad.bench import _measure
from dsad.core.errors import ConfigError
from dsad.terminal import flags


def test_rounds_are_interleaved_and_first_calls_apart():
    called, told = [], []
    calls = {name: lambda name=name: called.append(name) or len(called) for name in "abc"}
    found = _measure.interleaved(
        calls,
        2,
        first=("b",),
        keep=True,
        tell=lambda number, name, run: told.append((number, name)),
    )
    assert "".join(called) == "babcabc"
    assert told == [(0, "b"), *((number, name) for number in (1, 2) for name in "abc")]
    assert [found[n].first is None for n in "abc"] == [True, False, True]
    assert found["b"].first.result == 1
    assert [r.result for r in found["c"].rounds] == [4, 7]
    assert found["c"].result == 7
    assert found["a"].median == np.mean([r.seconds for r in found["a"].rounds])
    called.clear()
    dropped = _measure.interleaved(calls, 1)
    assert "".join(called) == "abcabc"
    assert all(t.first.result is t.result is None for t in dropped.values())


def fresh():
    """32 MB that no earlier test has left to the allocator."""
    array = np.frombuffer(mmap.mmap(-1, 2**25), np.uint8)
    array[:] = 1
    return array


def test_memory_growth_is_seen():
    run = _measure.timed(fresh)
    assert run.growth >= 0.9 * run.result.size
    with _measure.growing() as growth:
        pass
    assert growth.bytes < 2**20


def test_resident_memory_without_proc_is_the_peak(monkeypatch):
    now = _measure.resident()

    def missing(*_, **__):
        raise FileNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", missing)
        peak = _measure.resident()
    assert now <= peak < 100 * now


def test_peers_that_are_not_installed(monkeypatch):
    assert _measure.installed("scipy")
    assert not _measure.installed("no_such_module")
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert not _measure.installed("scipy")


def test_flags_below_their_least():
    def parse(*argv):
        command = flags.Command("bench what", "a text.")
        command.integer("rows", 5, "Rows.", at_least=2)
        return command.parse(list(argv))[1].rows

    assert (parse(), parse("--rows=2")) == (5, 2)
    with pytest.raises(ConfigError, match="--rows: expected an integer >= 2, found 1"):
        parse("--rows=1")
    with pytest.raises(ConfigError, match="dsad bench what: unexpected argument 'more'"):
        parse("more")
