"""The printed outcome of check-data."""

import io
import shlex

import numpy as np
import pytest
from rich.console import Console

from dsad.cli.check_data import main, run
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


def test_no_size_is_cut_at_80_columns(tmp_path):
    config = trees.mvtec(tmp_path)
    trees.save(tmp_path / "disc/train/good/000.png", np.zeros((1357, 2468), np.uint8))
    _, text = printed(config, 80)
    rows = text.rpartition("  category")[2].partition("kinds: ")[0]
    assert max(map(len, rows.splitlines())) <= 80
    for span in ("24–2468", "16–1357"):
        assert span in rows.split()


def test_warnings_do_not_fail(tmp_path):
    config = trees.mvtec(tmp_path)
    trees.save(tmp_path / "disc/ground_truth/dent/000_mask.png", 0 * trees.mask())
    code, text = printed(config, 100)
    assert code == 0
    assert "warning disc/ground_truth/dent/000_mask.png: [K5]" in text


def test_config_that_cannot_be_meant():
    with pytest.raises(ConfigError, match=r"config\.data\.root: empty"):
        printed(DataConfig(name="mvtec"))


def test_equal_faults_are_told_once(tmp_path):
    """All faults of an image come at once, and of equal ones the first paths."""
    trees.good_and_bad(tmp_path)
    config = DataConfig(name="folder", normal=str(tmp_path / "good"))
    good = [tmp_path / "good" / f"new {i}.png" for i in range(7)]
    for i, path in enumerate(good):
        trees.save(path, np.dstack([trees.pixels(i), trees.pixels(i)])[..., :4])
    code, text = printed(config)
    assert code == 1
    assert "error   7 files: [K3] image mode RGBA" in text
    assert "and 2 more; --all shows them" in text
    assert text.count(".png\n") == 5
    out = io.StringIO()
    assert run(config, Console(file=out, width=40), every=True) == 1
    assert all(path.name in out.getvalue() for path in good)


def test_faults_of_all_masks_of_an_image_come_at_once(tmp_path):
    config = trees.mvtec(tmp_path)
    folder = tmp_path / "disc/ground_truth/dent"
    trees.save(folder / "000_mask.png", trees.mask()[:-3])
    (tmp_path / "disc/test/dent/000.png").write_bytes(b"no image")
    _, text = printed(config)
    assert "disc/test/dent/000.png: [K8]" in text
    trees.save(folder / "000_mask.png", trees.pixels(1))
    _, text = printed(config)
    assert "disc/test/dent/000.png: [K8]" in text
    assert "disc/ground_truth/dent/000_mask.png: [K3]" in text


@pytest.mark.parametrize("names", [("good", "bad"), ("OK", "NG")])
def test_a_folder_says_what_it_holds(names, tmp_path, capsys):
    place = tmp_path / "Prüf teile"
    trees.good_and_bad(place)
    for old, new in zip(("good", "bad"), names, strict=True):
        (place / old).rename(place / new)
    assert main([str(place)]) == 0
    hint = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert hint[:2] == ["dsad", "fit"]
    assert f"--config.data.normal={place / names[0]}" in hint
    assert f"--config.data.abnormal={place / names[1]}" in hint
    assert main([str(place / names[0])]) == 0
    hint = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert hint[2:4] == ["--config.data.name=folder", f"--config.data.normal={place / names[0]}"]


def test_a_folder_in_the_layout_of_mvtec(tmp_path, capsys):
    trees.mvtec(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert f"--config.data.root={tmp_path}" in capsys.readouterr().out.splitlines()[-1]


def test_a_folder_is_given_once(tmp_path):
    with pytest.raises(ConfigError, match="nix: no such folder"):
        main([str(tmp_path / "nix")])
    with pytest.raises(ConfigError, match="expected one folder"):
        main([str(tmp_path), "b"])
    with pytest.raises(ConfigError, match=r"or config\.data\.root, not both"):
        main([str(tmp_path), "--config.data.root=x"])
