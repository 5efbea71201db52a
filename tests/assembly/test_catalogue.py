"""What is known of published data sets, as it is printed."""

import io

import pytest
from rich.console import Console

from dsad.assembly import catalogue
from dsad.cli import main
from dsad.core.errors import ConfigError
from dsad.data import about


def printed(show, *arguments):
    out = io.StringIO()
    show(*arguments, Console(file=out, width=80, soft_wrap=True, highlight=False))
    return out.getvalue()


def test_all_fit_80_columns_and_nothing_is_cut():
    text = printed(catalogue.print_all)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    words = " ".join(text.split())
    for name, item in about.every().items():
        assert name in words
        assert item.title in words
    for part in ("visa:fewshot", "mtd:random", "15 categories, 3,629 train, 467 good, 1,258 bad"):
        assert part in words
    assert "30 categories, 36,465 train, 114,585 test" in words
    assert "47 categories, 47 classes, 5,640 train" in words


def test_one_with_every_name_and_category():
    text = printed(catalogue.print_one, "visa:highshot")
    assert "licence:  CC BY 4.0\n" in text
    assert "  visa:fewshot: published, pool of 2-class few-shot" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["candle", "900", "100", "100"] in rows
    assert ["together", "8,659", "962", "1,200"] in rows
    assert "together" not in printed(catalogue.print_one, "realiad")  # two lists of the same images


def test_names_of_no_published_set():
    with pytest.raises(ConfigError, match=r"'vsia' is no published data set. Did you mean 'visa'"):
        printed(catalogue.print_one, "vsia")
    with pytest.raises(ConfigError, match="There is: adam3d, "):
        printed(catalogue.print_one, "folder")


def test_the_command_lists_without_checking(capsys):
    assert main.main(["check-data", "--list"]) == 0
    assert "More of one: dsad check-data --list --config.data.name=NAME" in capsys.readouterr().out
    assert main.main(["check-data", "--list", "--config.data.name=dtd"]) == 0
    text = capsys.readouterr().out
    assert "dtd:10: training images of official split 10" in text
    assert "K14" not in text
