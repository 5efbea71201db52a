"""Names that look like markup are shown as they are."""

import io

import pytest
from rich.console import Console

from dsad.cli import main
from dsad.cli.evaluate import table
from dsad.terminal import console
from tests.data import trees
from tests.evaluation.test_localize import Planted
from tests.evaluation.test_support import run

CATEGORY, KIND = "[red]y", "[bold]:bug:"


@pytest.fixture
def root(tmp_path):
    """A data set, below a folder whose path reads like the end of a style."""
    root = tmp_path / "[" / "x]"
    for path, array in trees.mvtec_files((CATEGORY, "plain")):
        trees.save(root / path.replace("dent", KIND), array)
    return root


@pytest.mark.slow
def test_names_pass_through_the_commands(root, capsys):
    data = ("--config.data.name=mvtec", f"--config.data.root={root}")
    assert main.main(["check-data", *data]) == 0
    assert CATEGORY in capsys.readouterr().out
    (root / CATEGORY / "train" / "good" / "notes.txt").write_text("stray")
    runs = [root.parent.parent / "runs" / name for name in ("[/x]", "b")]
    for folder in runs:
        argv = ["--config.backbone=resnet18", "--config.weights=random",
                "--config.evaluation.image_size=32",
                "--config.evaluation.false_alarm_rate=0.3", "--config.evaluation.holdout=2",
                f"--config.data.categories=('{CATEGORY}',)"]  # fmt: skip
        given = (*data, f"--workdir={folder}", "--name=[/x]")
        assert main.main(["evaluate", *argv, *given]) == 0
        text = capsys.readouterr().out
        for shown in (CATEGORY, KIND, f"written: {folder}/results.json", "[/x]: ", "notes.txt"):
            assert shown in text, shown
    out = root / "[/y].html"
    assert main.main(["report", *map(str, runs), f"--out={out}"]) == 0
    assert str(out) in capsys.readouterr().out
    page = out.read_text()
    assert CATEGORY in page
    assert KIND in page


def test_names_in_tables_and_bars(capsys):
    results = run(Planted(categories=("[/x]", "[red]y")))
    console.console().print(table(results, "[/title]"))
    text = capsys.readouterr().out
    for name in ("[/x]", "[red]y", "[/title]"):
        assert name in text
    screen = io.StringIO()
    with console.progress("[/x]", Console(file=screen, force_terminal=True, width=120)) as tell:
        tell(1, 2, "[/y]: scores")
    assert "[/x]" in screen.getvalue()
    assert "[/y]: scores" in screen.getvalue()
