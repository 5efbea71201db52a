"""What a terminal of 80 columns shows, and what a pipe gets instead."""

import dataclasses
import io
import re

import numpy as np
import pytest
from rich.console import Console

from dsad.cli import main
from dsad.cli.demo import comparison, gains
from dsad.cli.evaluate import decisions, table, threshold_table
from dsad.terminal import console
from tests.evaluation.test_localize import Planted
from tests.evaluation.test_support import run

COLUMNS = 80


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when they are told to."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console.sys, "stdout", screen := Screen())
    return screen


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("name", sorted(main.COMMANDS))
def test_help_fits(name, capsys):
    with pytest.raises(SystemExit):
        main.main([name, "--help"])
    main.main(["--help"])
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if len(line) > COLUMNS] == []


def test_a_terminal_has_one_line_that_changes(monkeypatch):
    screen = terminal(monkeypatch)
    with console.progress("pretraining", console.console()) as tell:
        tell(0, 12345, "compiling …")
    frames = [line for line in re.split(r"[\r\n]+", plain(screen.getvalue())) if line.strip()]
    assert "pretraining  ────────  0/12345  0:00  compiling …" in [f.rstrip() for f in frames]
    assert "/?" not in screen.getvalue()
    assert max(map(len, frames)) <= COLUMNS
    assert plain(screen.getvalue()).count("\n") == 1


def test_a_pipe_gets_a_line_now_and_then(clock):
    out = io.StringIO()
    with console.progress("fitting", Console(file=out, width=40, soft_wrap=True)) as tell:
        tell(0, 100, "compiling …")
        clock[0] += 60
        tell(10, 100, "features")
        for done in range(20, 90, 10):
            clock[0] += 6
            tell(done, 100, "features")
        tell(100, 100, "scores")
        tell(100, 100, "metrics")
    assert out.getvalue().splitlines() == [
        "fitting: 0/100 compiling … (0 s)",
        "fitting: 10/100 features (60 s)",
        "fitting: 40/100 features (78 s, 36 s left)",
        "fitting: 70/100 features (96 s, 18 s left)",
        "fitting: 100/100 scores (102 s, 0 s left)",
    ]


@pytest.mark.parametrize("begin", [0, 500])
def test_the_rest_is_told_by_the_pace_without_compiling(clock, begin):
    """A run that goes on at step 500 did not make these steps in a moment."""
    task = console._Task("pretraining")
    task.update(begin, 1000, "compiling …")
    clock[0] += 300
    task.update(begin + 10, 1000, "")
    assert task.left is None
    clock[0] += 20
    task.update(begin + 20, 1000, "")
    assert task.left == pytest.approx(2 * (980 - begin))


def test_a_line_keeps_numbers_whole(clock):
    task = console._Task("pretraining")
    note = "loss 10.125  std 0.98  1234 images/s  MFU 31%  input 13%"
    task.update(0, 200000, note)
    clock[0] += 10
    task.update(100, 200000, note)
    clock[0] += 50
    task.update(200, 200000, note)
    for width in range(50, 140):
        line = task.line(width)
        assert len(line) <= width
        assert "27:45:00 left" in line
        tail = line.partition("left")[2].strip()
        assert note.startswith(tail) or tail.endswith("…"), line
        if width >= 62:
            assert note[len(tail) :].startswith(("  ", "")), line
            assert tail.split("  ") == note.split("  ")[: len(tail.split("  "))], line
    task.update(1, 2, "12/200 picks, about 8 s left, 缺陷" + 60 * "é")
    assert task.line(66).endswith("12/200 picks, about 8 s left")


def test_text_wraps_between_words_and_commands_stay_whole(monkeypatch, capsys):
    command = "  dsad predict 'a folder/" + 80 * "x" + "' IMAGES --out=DIR"
    text = "a sentence " * 12 + "/a/path/" + 90 * "y" + " with words behind it"
    out = console.console()
    out.print(f"{text}\n{command}")
    assert capsys.readouterr().out == f"{text}\n{command}\n"
    screen = terminal(monkeypatch)
    console.console().print(f"{text}\n{command}")
    lines = screen.getvalue().splitlines()
    assert lines[-1] == command
    assert " ".join(lines[:-1]).split() == text.split()
    assert [x for x in lines[:-1] if len(x) > COLUMNS] == ["/a/path/" + 90 * "y"]


def test_tables_and_decisions_of_an_evaluation_fit(monkeypatch):
    """Long names fold; no number is cut."""
    name = "Gehäuse_vorne_links_mit_langem_Namen"
    results = run(
        Planted(categories=(name, "b"), strength=9), false_alarm_rate=0.2, holdout=3, seeds=(0, 1)
    )
    screen = terminal(monkeypatch)
    out = console.console()
    out.print(table(results))
    out.print(threshold_table(results))
    for line in decisions(results):
        out.print(line)
    lines = plain(screen.getvalue()).splitlines()
    assert max(map(len, lines)) <= COLUMNS
    assert "…" not in screen.getvalue()
    for metric in results.metric_names:
        if not metric.endswith("_f1_max"):
            assert f"{results.mean[metric]:.3f}" in screen.getvalue()
            if std := results.std["mean"][metric]:
                assert f"±{f'{std:.3f}'.removeprefix('0')}" in screen.getvalue()
    assert np.isfinite(results.std["mean"]["pixel_auroc"])


def test_a_wrong_flag_beside_the_short_name_of_a_config_is_the_fault(tmp_path, capsys):
    argv = ["pretrain", "--config=mae:smoke", f"--workdir={tmp_path}/w", "--overwrite=perhaps"]
    assert main.main(argv) == 2
    told = capsys.readouterr().err
    assert "--overwrite=perhaps: Non-boolean argument to boolean flag" in told
    assert "get_config" not in told


def test_the_demo_compares_its_encoders_in_80_columns():
    results = run(Planted(categories=("[speckle]", "washer"), strength=9))
    out = io.StringIO()
    named = {"untrained": results, "pretrained": results}
    Console(file=out, width=COLUMNS, markup=False).print(comparison(named))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= COLUMNS
    rows = [line for line in lines if "untrained" in line]
    assert len(rows) == 3
    for metric in ("image_auroc", "pixel_auroc", "aupro_30"):
        assert f"{results.mean[metric]:.3f}" in rows[-1]


def test_the_demo_says_what_was_gained_and_keeps_unlike_defects_apart():
    first = run(Planted(categories=("speckle", "washer"), strength=9))
    kinds = [
        {
            "a": {"warp": {"aupro_30": x}, "spot": {"aupro_30": 1.0}},
            "b": {"warp": {"aupro_30": 0.5}},
        }
        for x in (0.5, 0.3)
    ]
    before, after = (
        dataclasses.replace(first, mean={**first.mean, "aupro_30": x}, kinds=k)
        for x, k in zip((0.25, 0.5), kinds, strict=True)
    )
    assert gains(before, after) == [
        "Pretraining: mean AUPRO 0.250 before, 0.500 after (+0.250)",
        "Defects drawn unlike any corruption: warp 0.500 → 0.400",
    ]
    assert len(gains(first, first)) == 1
    without = dataclasses.replace(first, mean={**first.mean, "aupro_30": None})
    assert gains(without, without) == []
