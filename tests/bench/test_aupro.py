"""``dsad bench aupro`` at a tiny size: what it prints, and that its numbers agree."""

import pytest

from dsad.bench import aupro
from dsad.cli import main
from dsad.evaluation.metrics import streaming


@pytest.mark.slow
def test_all_routes_agree(capsys):
    found = aupro.compare(maps=4, size=64, rounds=1, peer_maps=4, limit=0.3)
    text = capsys.readouterr().out
    for label in aupro.TRANSFORMS:
        row = found[f"dsad counts: {label}"]
        assert row["bound"] <= streaming.TOLERANCE
        assert row["error"] <= row["bound"]
        assert row["value"] == pytest.approx(found["dsad sorts: s"]["value"], abs=2e-5)
    assert found["scikit-learn, weighted ROC"]["error"] < 1e-9
    assert "Floors" in text
    for label, _, _ in aupro.PEERS:
        assert label in text


def test_streamed_maps_leave_the_memory_alone(capsys):
    arguments = ["bench", "aupro", "--maps=4", "--size=32", "--stream=402", "--limit=0.05"]
    assert main.main(arguments) == 0
    text = capsys.readouterr().out
    assert f"{402 * 32 * 32:,}" in text
    found = aupro.stream(total=20, maps=4, size=32, limit=0.3)
    assert found["pixels"] == 20 * 32 * 32
    assert found["value"] == pytest.approx(found["expected"], abs=1e-12)
    assert found["resident"][-1] - found["resident"][0] < 20e6


@pytest.mark.parametrize(
    "flag", ["--maps=1", "--rounds=0", "--limit=x", "--limit=0", "--stream=-1", "extra"]
)
def test_unusable_flags_are_errors(capsys, flag):
    assert main.main(["bench", "aupro", flag]) == 2
    assert flag.partition("=")[0] in capsys.readouterr().err
