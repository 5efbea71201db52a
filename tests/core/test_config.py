"""What messages and constants of the core promise to all packages."""

import random

from dsad.augment import views
from dsad.core.config import listed
from dsad.models import family
from tests.helpers import ROOT


def test_the_statistics_of_imagenet_stand_in_one_place():
    assert views.ViewConfig().mean == views.IMAGENET_MEAN == family.Preprocessing().mean
    assert views.ViewConfig().std == views.IMAGENET_STD == family.Preprocessing().std
    sources = (p for p in (ROOT / "dsad").rglob("*.py") if "0.485, 0.456" in p.read_text())
    assert [p.name for p in sources] == ["pixels.py"]


def test_lists_in_messages_have_numbers_in_their_order():
    want = ["7z", "Layer2", "block0", "block02", "block2", "block2.5", "block10", "blocks", "x"]
    mixed = random.Random(0).sample(want, len(want))
    assert listed(mixed) == ", ".join(want)
    assert listed(["b10a2", "b10a10", "b9", 3]) == "3, b9, b10a2, b10a10"
    assert listed(["", "²", "1"]) == ", 1, ²"
    assert listed([]) == "(none)"
