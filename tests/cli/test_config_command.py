"""``dsad config``, and what is said of keys, commands, configs and variants that do not exist."""

import re

import ml_collections
import pytest

from dsad.cli import main
from dsad.terminal import flags, keys


def said(capsys, *argv):
    """Exit code, and all that is printed."""
    code = main.main(argv)
    out = capsys.readouterr()
    return code, out.out + out.err


def leaves(config, where="config"):
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from leaves(value, f"{where}.{name}")
        else:
            yield f"{where}.{name}"


@pytest.mark.parametrize("name", flags.shipped_configs())
def test_every_key_is_listed_with_value_type_and_meaning(name, capsys):
    code, text = said(capsys, "config", f"configs/{name}.py")
    assert code == 0
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    config, _, _ = flags.Command("x", "", config=name).parse([])
    blocks = {}
    for block in re.split(r"\n(?=\S|  \S)", text):
        path = re.match(r"  (config\.[\w.]+) = ", block)
        if path:
            assert path[1] not in blocks
            blocks[path[1]] = block.splitlines()
    assert set(blocks) == set(leaves(config))
    for path, lines in blocks.items():
        start = next(i for i, line in enumerate(lines) if "  [" in line)
        end = next(i for i, line in enumerate(lines) if i >= start and line.endswith("]"))
        assert len("".join(lines[end + 1 :]).strip()) > 8, path


def test_a_variant_shows_its_values_beside_the_defaults(capsys):
    code, text = said(capsys, "config", "configs/ds2.py:small", "--config.log_every=3", "every")
    assert code == 0
    assert "config.log_every = 3  [an integer >= 1; default 10]\n      updates per line" in text
    assert "config.checkpoint.every = 100  [an integer >= 1; default 500]" in text
    assert "config.probe.every = 0  [an integer >= 0]\n" in text
    assert "batch_size" not in text


def test_words_that_no_key_holds(capsys):
    code, text = said(capsys, "config", "knn", "fals_alarm_rate")
    assert code == 2
    assert "Did you mean evaluation.false_alarm_rate?" in text
    assert said(capsys, "config")[0] == 2


def test_meanings_are_read_from_the_classes():
    class Base:
        """A base.

        Attributes:
          one: what the base says
            on two lines.

        """

    class Derived(Base):
        """Derived.

        Attributes:
          two, three: ``two`` of both: with a colon.

        Raises:
          nothing: at all.

        """

    assert keys.meanings(Derived) == {
        "one": "what the base says on two lines.",
        **dict.fromkeys(("two", "three"), "two of both: with a colon."),
    }


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("--config.image_size=96", "config.image_size: .* --config.evaluation.image_size?"),
        (
            "--config.data.image_size=96",
            "config.data.image_size: .*--config.evaluation.image_size?",
        ),
        ("--config.evaluation.image_sise=96", "--config.evaluation.image_size?"),
        ("--config.data.nrmal=x", "config.data.nrmal: .* --config.data.normal?"),
        ("--config.detectr.k=2", "config.detectr: .* --config.detector.k?"),
        ("--config.evaluatoin.gallry=2", "--config.evaluation.gallery?"),
        ("--config.holdout=2", "--config.data.holdout or --config.evaluation.holdout?"),
        ("--config.data.seeds=2", "--config.data.seed or --config.seeds?"),
        ("--image_size=96", "unknown flag --image_size. Did you mean --config.evaluation.image_s"),
        ("--wrkdir=x", "Did you mean '--workdir'?"),
        ("--config.data=x", "config.data is a group; set its keys: abnormal, "),
    ],
)
def test_a_key_is_searched_at_every_level(argument, hint, capsys):
    code, text = said(capsys, "evaluate", argument)
    assert code == 2
    assert re.search(hint.replace(".", r"\.").replace(r"\.*", ".*").replace("?", r"\?"), text)


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        (["layers=stem,layer1, layer2"], ("stem", "layer1", "layer2")),
        (["layers=stem,layer1", "layers=layer2"], ("stem", "layer1", "layer2")),
        (["layers=layer2", "layers=stem,"], ("layer2", "stem")),
        (["layers=('stem','layer1')"], ("stem", "layer1")),
        (["layers=('stem,layer1',)"], ("stem,layer1",)),
        (["layers='stem,layer1'"], ("stem,layer1",)),
    ],
)
def test_commas_part_the_names_of_a_tuple_unless_quoted(arguments, layers):
    command = flags.Command("evaluate", "", config="configs/twoclass.py")
    given = [f"--config.detector.{argument}" for argument in arguments]
    config, _, _ = command.parse([*given, "--config.weights=a,b.npz", "--config.seeds=3,4"])
    assert (config.detector.layers, config.weights, config.seeds) == (layers, "a,b.npz", (3, 4))


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (("evalute",), "Did you mean 'evaluate'?"),
        (("checkdata",), "Did you mean 'check-data'?"),
        (("evaluate", "--config=configs/kn.py"), "Did you mean 'knn'?"),
        (("pretrain", "--config=configs/ds.py:smoke"), "Did you mean 'ds2'?"),
        (("pretrain", "--config=configs/ds2.py:smok"), "Did you mean 'smoke'?"),
        (("check-data", "--config.data.name=mvtek"), "Did you mean 'mvtec'?"),
        (("check-data", "--config.data.name=mtd:gruped"), "Did you mean 'grouped'?"),
        (("fit", "--config.detector.name=knm", "--out=x"), "Did you mean 'knn'?"),
    ],
)
def test_a_close_name_is_asked_for(argv, hint, capsys):
    code, text = said(capsys, *argv)
    assert code == 2
    assert hint in text
