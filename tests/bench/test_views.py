"""``dsad bench views`` at a tiny size: a row for every recipe, whose numbers fit together."""

import importlib.util

import jax
import numpy as np
import pytest

from dsad.bench import views
from dsad.cli import main

TINY = ["bench", "views", "--side=16", "--canvas=20", "--batch=2", "--rounds=1"]
NAMES = ("moco", "simclr", "supervised", "weak", "ds2, view 1", "ds2, view 2")


def numbers(cells):
    return [float(cell.replace(",", "")) for cell in cells]


@pytest.mark.slow
def test_every_recipe_has_a_row_beside_its_peer(capsys):
    assert main.main(TINY) == 0
    text = capsys.readouterr().out
    rows = {}
    for line in text.splitlines():
        if line.startswith("│"):
            rows[line.split("│")[1].strip()] = [c.strip() for c in line.split("│")[2:-1]]
    assert tuple(rows) == (*NAMES, views.TRIPLET, views.BLEND)
    for name in NAMES:
        milliseconds, speed, core, wall, peer, ratio = numbers(rows[name])
        assert speed == pytest.approx(2e3 / milliseconds, rel=0.3)
        assert ratio == pytest.approx(core / peer, rel=0.1, abs=0.01)
        assert wall > 0
    milliseconds, speed = numbers(rows[views.TRIPLET][:2])
    assert speed == pytest.approx(6e3 / milliseconds, rel=0.3)
    assert rows[views.BLEND][3:] == ["", "", ""]
    assert all(len(line) <= 80 for line in text.splitlines() if line[0] in "┏│└")
    words = " ".join(text.split())
    kind = "torchvision" if importlib.util.find_spec("torchvision") else "Pillow"
    assert f"The peer: {kind} views, one after the other" in words
    assert "SmoothBlend takes " in words


def test_all_make_views_of_the_same_shape():
    images = np.zeros((3, 20, 20, 3), np.uint8)
    configs = views.view_configs(16)
    assert tuple(configs) == NAMES
    for name, call in views.programs(images, configs, 16).items():
        made = jax.eval_shape(call)
        if name == views.TRIPLET:
            assert {n: a.shape for n, a in made.items()} == {
                **dict.fromkeys(("anchor", "positive", "negative"), (3, 16, 16, 3)), "peak": (3,),
            }  # fmt: skip
        else:
            assert made.shape == (3, 16, 16, 3), name
    for name, call in views._peers(images, configs).items():
        assert np.shape(call()) == (3, 3, 16, 16), name


@pytest.mark.parametrize("flag", ["--rounds=0", "--batch=0"])
def test_flags_out_of_range_are_refused(flag, capsys):
    assert main.main(["bench", "views", flag]) == 2
    assert f"{flag[:-2]}: expected an integer >= 1, found 0" in capsys.readouterr().err
