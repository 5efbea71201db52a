"""``dsad bench input`` at a tiny size, and the peer's views."""

import importlib.util
import random

import numpy as np
import pytest
from PIL import Image

from dsad.augment.views import ViewConfig
from dsad.bench import _host_views, input
from dsad.cli import bench
from dsad.core.errors import ConfigError
from tests.helpers import dsad

MISSING = "torch DataLoader: not installed: pip install torch torchvision"


@pytest.mark.slow
def test_prints_every_mode_and_the_peer(tmp_path):
    """In a process of its own, with one device."""
    (tmp_path / "images/set").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(input.picture(40, 50, i)).save(tmp_path / f"images/set/{i}.png")
    run = dsad(
        "bench", "input", "--root=images", "--canvas=32", "--batch=2", "--batches=1", "--rounds=1",
        "--steps=1", "--workers=1", "--config=configs/mae.py:smoke", cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    text = " ".join(run.stdout.split())
    assert "root: 4 images, the first 50×40" in text
    assert "root: waiting for the input in 1 steps" in text
    for mode in ("device", "host", "none: files", "none: records", "none: files, 1 workers"):
        assert text.count(f"│ {mode} │") == 2, mode
    for side in (32, 64):
        assert f"none: canvases {side} │" in text
        assert f"none: canvases {side}, 1 workers │" in text
    peer = "torch DataLoader, " if importlib.util.find_spec("torch") else MISSING
    assert peer in text


def test_time_is_that_of_the_batches_alone():
    def numbers():
        for i in range(100):
            drawn.append(i)
            yield i

    drawn = []
    found = input.spent(numbers, warm=3, count=5, batch=4)
    assert drawn == list(range(8))
    assert found.images == 20
    assert found.wall >= 0
    assert found.cpu >= 0


def test_the_peers_view_is_a_crop_normalised(monkeypatch):
    plain = ViewConfig(side=16, jitter_probability=0.0, blur_probability=0.0, flip=0.0)
    image = Image.fromarray(np.full((40, 60, 3), (255, 0, 51), np.uint8))
    view = _host_views.PillowView(plain)(image)
    expected = (np.asarray([1.0, 0.0, 0.2]) - plain.mean) / plain.std
    assert view.shape == (3, 16, 16)
    np.testing.assert_allclose(
        view, np.broadcast_to(expected[:, None, None], view.shape), rtol=1e-5
    )
    random.seed(0)
    boxes = np.asarray([_host_views._crop((60, 40), plain) for _ in range(300)])
    sizes = boxes[:, 2:] - boxes[:, :2]
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= (60, 40)).all()
    area, aspect = sizes.prod(1) / 2400, sizes[:, 0] / sizes[:, 1]
    assert 0.06 < area.min() < 0.15
    assert area.max() > 0.6
    assert 0.65 < aspect.min() < 0.85
    assert 1.15 < aspect.max() < 1.5


def test_the_peers_view_changes_colours():
    """Jitter alone: another image, of the same size and within range; grey when nothing is left."""
    image = Image.fromarray(input.picture(16, 16, 0))
    random.seed(1)
    changed = np.asarray(_host_views._jitter(image, (0.4, 0.4, 0.2, 0.1)), int)
    assert abs(changed - np.asarray(image, int)).mean() > 3
    same = np.asarray(_host_views._jitter(image, (0.0, 0.0, 0.0, 0.0)), int)
    assert abs(same - np.asarray(image, int)).max() <= 4  # through HSV and back
    grey = ViewConfig(side=8, jitter_probability=0.0, blur_probability=1.0, grey_probability=1.0,
                      mean=(0.0,) * 3, std=(1.0,) * 3)  # fmt: skip
    view = _host_views.PillowView(grey)(image)
    np.testing.assert_array_equal(view[0], view[1])
    np.testing.assert_array_equal(view[0], view[2])


def test_bad_flags():
    with pytest.raises(ConfigError, match="--workers: expected an integer >= 1, found 0"):
        bench.main(["input", "--workers=0"])
    with pytest.raises(ConfigError, match="unexpected argument 'more'"):
        bench.main(["input", "more"])
