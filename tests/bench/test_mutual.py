"""``dsad bench mutual`` at a tiny size."""

import numpy as np
import pytest

from dsad.bench import mutual
from dsad.cli import bench
from dsad.core.errors import ConfigError
from dsad.ops.mutual import mutual_scores


def test_prints_both_and_the_floor(capsys, monkeypatch):
    monkeypatch.setattr(mutual._measure, "installed", lambda _: False)
    argv = ["--images=5", "--tokens=6", "--depth=4", "--peer_images=2", "--rounds=1"]
    assert bench.main(["mutual", *argv]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("dsad", "published pass, numpy", "GFLOP/s", "torch: not installed"):
        assert part in text


def test_both_find_the_same():
    tokens = mutual.tokens_of(6, 9, 5)
    found = mutual_scores(tokens, 2)
    np.testing.assert_allclose(mutual._by_numpy(tokens, 2, 4), found[:4], atol=1e-4)
    pytest.importorskip("torch")
    np.testing.assert_allclose(mutual._by_torch(tokens, 2, 4), found[:4], atol=1e-4)


def test_bad_flags():
    with pytest.raises(ConfigError, match="--images: expected"):
        bench.main(["mutual", "--images=1"])
