"""The published settings of ISSTAD per category, a data file beside the configs."""

import collections
import json
import shutil

import pytest

from dsad.augment.isstad_corruption import CorruptionConfig
from dsad.core.config import build_dataclass
from dsad.data import mvtec
from dsad.terminal import flags

TABLES = json.loads((flags.config_directory() / "isstad_tables.json").read_text())
MPDD = {"bracket_black", "bracket_brown", "bracket_white", "connector", "metal_plate", "tubes"}
VISA = {
    "candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2", "pcb1",
    "pcb2", "pcb3", "pcb4", "pipe_fryum",
}  # fmt: skip
LOCO = {"breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors"}
SETS = [("mvtec", "main"), ("mvtec", "ext"), ("loco", "main"), ("visa", "ext"), ("mpdd", "ext")]
CORRUPTION = ("kind", "most_draw", "n_max", "limit_box", "remove_background")
REGIONS = {
    ("mvtec", "main"): set(mvtec.OFFICIAL),
    ("mvtec", "ext"): {
        "bottle", "cable", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile",
        "toothbrush",
    },
    ("loco", "main"): LOCO,
    ("visa", "ext"): {"candle", "macaroni2", "pcb1", "pcb2", "pcb3"},
    ("mpdd", "ext"): {"bracket_brown", "connector"},
}  # fmt: skip


def table(dataset, variant):
    """All keys of every category."""
    return {c: {**TABLES["default"], **e} for c, e in TABLES[dataset][variant].items()}


def differing(dataset, variant, keys):
    """Categories whose values of ``keys`` differ from the default."""
    default = tuple(TABLES["default"][k] for k in keys)
    found = {c: tuple(row[k] for k in keys) for c, row in table(dataset, variant).items()}
    return {c: values for c, values in found.items() if values != default}


def test_every_category_of_every_set_is_there():
    assert {d: set(TABLES[d]) for d in TABLES if d not in ("about", "default")} == {
        "mvtec": {"main", "ext"}, "loco": {"main"}, "visa": {"ext"}, "mpdd": {"ext"},
    }  # fmt: skip
    for variant in ("main", "ext"):
        assert set(TABLES["mvtec"][variant]) == set(mvtec.OFFICIAL)
    assert set(TABLES["loco"]["main"]) == LOCO
    assert set(TABLES["visa"]["ext"]) == VISA
    assert set(TABLES["mpdd"]["ext"]) == MPDD


@pytest.mark.parametrize(("dataset", "variant"), SETS)
def test_entries_are_valid_and_say_only_what_differs(dataset, variant):
    for entry in TABLES[dataset][variant].values():
        assert all(TABLES["default"][k] != v for k, v in entry.items())
        assert set(entry) <= set(TABLES["default"])
    for row in table(dataset, variant).values():
        build_dataclass(CorruptionConfig, {k: row[k] for k in CORRUPTION})
        assert all(isinstance(row[k], float) for k in "qab")
        assert isinstance(row["epochs"], int)


def test_the_default_is_that_of_the_corruption():
    own = CorruptionConfig()
    assert {k: TABLES["default"][k] for k in CORRUPTION} == {k: getattr(own, k) for k in CORRUPTION}
    assert [TABLES["default"][k] for k in ("q", "a", "b", "epochs")] == [0.1, 1.0, 1.0, 200]


@pytest.mark.parametrize(("dataset", "variant"), SETS)
def test_kinds(dataset, variant):
    found = {c for c, row in table(dataset, variant).items() if row["kind"] == "region"}
    assert found == REGIONS[dataset, variant]


def test_background_shapes_and_box():
    keys = ("remove_background", "n_max", "limit_box")
    assert differing("mvtec", "main", keys) == {
        "capsule": (False, 1, False), "carpet": (True, 1, False), "zipper": (True, 3, False),
    }  # fmt: skip
    assert differing("mvtec", "ext", keys) == {}
    on = (True, 3, True)
    assert differing("loco", "main", keys) == {"juice_bottle": on, "screw_bag": on}
    assert differing("visa", "ext", keys) == {
        "candle": (True, 3, False), "pipe_fryum": (True, 3, False),
        "fryum": on, "macaroni1": on, "macaroni2": on,
    }  # fmt: skip
    assert differing("mpdd", "ext", keys) == {}


def test_draws_and_epochs():
    often = {"capsule", "carpet", "grid", "transistor", "wood", "zipper"}
    assert differing("mvtec", "ext", ("most_draw",)) == dict.fromkeys(often, (5,))
    longer = {"bracket_black", "metal_plate", "tubes"}
    assert differing("mpdd", "ext", ("epochs",)) == dict.fromkeys(longer, (300,))
    for dataset, variant in SETS:
        if (dataset, variant) != ("mvtec", "ext"):
            assert differing(dataset, variant, ("most_draw",)) == {}
        if dataset != "mpdd":
            assert differing(dataset, variant, ("epochs",)) == {}


def test_exponents():
    def grouped(dataset, variant):
        out = collections.defaultdict(set)
        for category, values in differing(dataset, variant, "qab").items():
            out[values].add(category)
        return dict(out)

    assert grouped("mvtec", "main") == grouped("loco", "main") == {}
    assert grouped("mvtec", "ext") == {
        (0.1, 1, 0.01): {"cable"},
        (0.1, 1, 0.1): {"capsule", "carpet", "hazelnut", "leather", "transistor"},
        (0.1, 0.1, 1): {"screw", "wood", "zipper"},
    }
    assert grouped("visa", "ext") == {
        (0.1, 1, 0.01): {"candle", "capsules", "pcb1", "pcb3", "pipe_fryum"},
        (0.1, 0.1, 1): {"fryum"},
        (0.5, 1, 0.3): {"macaroni1"},
        (0.1, 1, 0.3): {"macaroni2"},
    }
    assert grouped("mpdd", "ext") == {
        (0.1, 1, 0.001): {"bracket_black"},
        (0.1, 1, 0.1): {"bracket_brown"},
        (0.1, 1, 0.01): {"bracket_white", "tubes"},
    }


def test_a_config_file_reads_the_table_beside_it(tmp_path):
    """The command loads configs by path, from any working directory."""
    shutil.copy(flags.config_directory() / "isstad_tables.json", tmp_path)
    (tmp_path / "mine.py").write_text(
        "import json, pathlib\n"
        "import ml_collections\n"
        "def get_config(category):\n"
        "    file = pathlib.Path(__file__).parent / 'isstad_tables.json'\n"
        "    tables = json.loads(file.read_text())\n"
        "    row = tables['default'] | tables['mvtec']['ext'][category]\n"
        "    return ml_collections.ConfigDict(row).lock()\n"
    )
    command = flags.Command("x", "", config=f"{tmp_path / 'mine.py'}:zipper")
    config, _, _ = command.parse([])
    assert (config.kind, config.most_draw, config.a) == ("patch", 5, 0.1)
    assert "isstad_tables" not in flags.shipped_configs()
