"""The benchmark of the coreset at tiny sizes, in this process."""

import importlib.util

import numpy as np
import pytest

from dsad.bench import coreset
from dsad.core.errors import ConfigError


@pytest.mark.slow
def test_compare_prints_every_route(capsys):
    assert coreset.main(["--rows=400", "--dim=16", "--percent=10", "--rounds=1"]) == 0
    text = capsys.readouterr().out
    for part in ("Gaussian: 40 of 400 × 16", "plain numpy", "public code's pass", "100.00%",
                 "with compilation", "floors:", "within 0.0e+00"):  # fmt: skip
        assert part in text, text


@pytest.mark.slow
def test_one_bank_alone_states_memory_and_time_left(capsys):
    bank = coreset.clustered(400, 16)
    assert (bank.shape, bank.dtype) == ((400, 16), np.float32)
    made = coreset.alone(coreset.Case("clustered", bank, 40, 0))
    np.testing.assert_array_equal(made.picks, coreset.by_numpy(made_case(bank), 40))
    assert "MiB beyond the bank" in capsys.readouterr().out


def made_case(bank):
    return coreset.Case("clustered", bank, 40, 0)


def test_the_public_pass_without_torch_picks_the_same(monkeypatch):
    case = made_case(coreset.gaussian(300, 16))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    np.testing.assert_array_equal(coreset.by_published(case, 40), coreset.by_numpy(case, 40))


def test_refuses_bad_flags():
    with pytest.raises(ConfigError, match="--rounds: expected an integer >= 1, found 0"):
        coreset.main(["--rounds=0"])
    with pytest.raises(ConfigError, match="unexpected argument"):
        coreset.main(["what"])
