"""The printed outcome of check-data."""

import io

import pytest
from rich.console import Console

from dsad.cli.check_data import run
from dsad.core.errors import ConfigError
from dsad.data.base import DataConfig, SyntheticConfig
from tests.data import trees


def printed(config, width=40):
    out = io.StringIO()
    code = run(config, Console(file=out, width=width))
    return code, out.getvalue()


def test_sound_set():
    code, text = printed(
        DataConfig(synthetic=SyntheticConfig(size=32, train=2, good=1, bad=1)), 120
    )
    assert code == 0
    assert "0 errors, 0 warnings: usable" in text
    for check in range(16):
        assert f"\nK{check} " in f"\n{text}"
    for category in ("speckle", "tiles", "washer", "weave", "wood"):
        assert category in text


def test_names_are_never_cut(tmp_path):
    config = trees.mvtec(tmp_path)
    name = "disc/train/good/" + 60 * "long_name_" + ".png"
    (tmp_path / "disc/train/good/000.png").rename(tmp_path / name[:240])
    long = name[:236] + ".png"
    (tmp_path / name[:240]).rename(tmp_path / long)
    (tmp_path / long).write_bytes(b"")
    (tmp_path / "disc/ground_truth/dent/000_mask.png").unlink()
    code, text = printed(config)
    assert code == 1
    assert f"{long}: [K8] the file has zero bytes" in text
    assert "disc/test/dent/000.png: [K1]" in text
    assert "2 errors, 0 warnings: NOT usable" in " ".join(text.split())


def test_warnings_do_not_fail(tmp_path):
    config = trees.mvtec(tmp_path)
    trees.save(tmp_path / "disc/ground_truth/dent/000_mask.png", 0 * trees.mask())
    code, text = printed(config, 100)
    assert code == 0
    assert "warning disc/ground_truth/dent/000_mask.png: [K5]" in text


def test_config_that_cannot_be_meant():
    with pytest.raises(ConfigError, match=r"config\.data\.root: empty"):
        printed(DataConfig(name="mvtec"))
