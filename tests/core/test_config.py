"""What messages and constants of the core promise to all packages."""

from dsad.augment import views
from dsad.models import family
from tests.helpers import ROOT


def test_the_statistics_of_imagenet_stand_in_one_place():
    assert views.ViewConfig().mean == views.IMAGENET_MEAN == family.Preprocessing().mean
    assert views.ViewConfig().std == views.IMAGENET_STD == family.Preprocessing().std
    sources = (p for p in (ROOT / "dsad").rglob("*.py") if "0.485, 0.456" in p.read_text())
    assert [p.name for p in sources] == ["pixels.py"]
