"""``dsad bench neighbors`` at a tiny size."""

import sys

import numpy as np
import pytest

from dsad.cli import bench
from dsad.core.errors import ConfigError

TINY = ["neighbors", "--queries=40", "--rows=90", "--depth=8", "--k=2", "--rounds=1"]


def test_prints_everyone_and_the_floors(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # as if it were not installed
    assert bench.main(TINY) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("dsad exact", "dsad certified", "scikit-learn", "k = 2", "GFLOP/s", "GB/s"):
        assert part in text
    assert "FAISS IndexFlatL2: not installed: pip install faiss-cpu" in text


def test_every_search_agrees_with_float64():
    from dsad.bench import neighbors

    rng = np.random.default_rng(0)
    queries, bank = (rng.standard_normal((n, 8)).astype(np.float32) for n in (40, 90))
    for name, make in neighbors._makers().items():
        if name.startswith("dsad"):
            for mean in (0, 30):
                assert neighbors._error(make, queries, bank, 2, mean) < 1e-5

    def wrong(queries, bank, k):
        return lambda: (np.ones((len(queries), k)), None)

    assert neighbors._error(wrong, queries, bank, 2, 0) > 0.1


def test_bad_flags():
    for flag, message in (("--k=one", "--k: expected integers"), ("--rows=0", "--rows: expected")):
        with pytest.raises(ConfigError, match=message):
            bench.main(["neighbors", flag])
    with pytest.raises(ConfigError, match="unexpected argument"):
        bench.main(["neighbors", "what"])
