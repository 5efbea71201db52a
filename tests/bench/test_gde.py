"""The density benchmark at a tiny size: it measures, checks, and names what is missing."""

import importlib.util

import pytest

from dsad.cli import main


def test_bench_gde_checks_what_it_times(capsys):
    argv = ["--images=8", "--side=2", "--channels=12", "--components=4", "--rounds=1"]
    assert main.main(["bench", "gde", *argv]) == 0
    text = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    assert set(rows) == {"dsad", "scikit-learn", "scikit-learn, 1 thread"}
    for row in rows.values():
        seconds, ratio, error = (float(c) for c in row.split("│")[2:5])
        assert seconds >= 0
        assert ratio > 0
        assert error < 1e-5
    assert "floors:" in text
    assert "4 Gaussians of 8 × 12 features" in text


def test_bench_gde_without_scikit_learn(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    argv = ["--images=8", "--side=2", "--channels=12", "--components=4", "--rounds=1"]
    assert main.main(["bench", "gde", *argv]) == 0
    assert "not installed: pip install scikit-learn" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--rounds=0", "--side=0"])
def test_bench_gde_refuses(flag, capsys):
    assert main.main(["bench", "gde", flag]) == 2
    assert f"{flag[:-2]}: expected an integer >= 1, found 0" in capsys.readouterr().err
