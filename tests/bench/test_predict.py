"""``dsad bench predict`` at a tiny size."""

import numpy as np
import pytest

from dsad.bench import _measure, predict
from dsad.cli import bench
from dsad.core.errors import ConfigError, DsadError

TINY = ["predict", "--images=2", "--side=64", "--rounds=1", "--batch=2"]


def test_prints_dsad_alone_where_there_is_no_torch(capsys, monkeypatch):
    monkeypatch.setattr(_measure, "installed", lambda module: False)
    assert bench.main(TINY) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Drawn images and a small bank: give --bottle=DIR --weights=FILE" in text
    assert 'torch: not installed: pip install torch, or the extra "dsad[torch]"' in text
    for part in ("│ dsad │", "│ dsad predict │", "bank 12 × 384", "MB on disk",
                 "2 files, batches of 2", "Floor of float32 operations"):  # fmt: skip
        assert part in text, part
    assert "│ torch │" not in text


def test_the_peer_computes_the_same(capsys, monkeypatch):
    """Scores and maps are compared before anything is timed."""
    pytest.importorskip("torch")
    assert bench.main(TINY) == 0
    assert "│ torch │" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(predict, "TOLERANCE", 1e-9)
    with pytest.raises(DsadError, match="nothing was timed"):
        bench.main(TINY)


def test_disagreement_is_told_before_timing():
    one = np.ones((4, 4), np.float32)
    predict._agree([(1.0, one)], [(1.0005, one * 1.0005)])
    for other in ((1.01, one), (1.0, one * 1.01), (float("nan"), one)):
        with pytest.raises(DsadError, match="differ by"):
            predict._agree([(1.0, one)], [other])


def test_bad_flags():
    with pytest.raises(ConfigError, match="--images: expected an integer >= 2, found 1"):
        bench.main(["predict", "--images=1"])
    with pytest.raises(ConfigError, match="unexpected argument"):
        bench.main(["predict", "what"])
