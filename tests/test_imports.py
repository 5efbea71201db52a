"""The one-way rule of imports, and which packages may know which library."""

import ast
import pathlib
import subprocess
import sys

import pytest

import dsad
from dsad.assembly import api

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "dsad"

BELOW = {
    "core", "ops", "augment", "models", "objectives", "data", "detectors", "evaluation", "train",
}  # fmt: skip
MAY_IMPORT = {
    "core": set(),
    "ops": {"core"},
    "augment": {"core", "ops"},
    "models": {"core", "ops"},
    "objectives": {"core", "ops", "augment", "models"},
    "data": {"core"},
    "detectors": {"core", "ops", "models", "augment"},
    "evaluation": {"core", "ops", "data", "detectors", "models"},
    "train": {"core"},
    "terminal": {"core"},
    "assembly": {*BELOW, "terminal"},
    "plan": {*BELOW, "terminal", "assembly", "bench"},
    "bench": {*BELOW, "terminal", "assembly"},
    "cli": {*BELOW, "terminal", "assembly", "plan", "bench"},
}
ONLY_IN = {
    "flax": "models/",
    "orbax": "train/_orbax.py",
    "grain": "data/pipeline.py",
    "tensorboardX": "train/writer.py",
    "tensorflow_datasets": "data/records.py",
    "array_record": "data/records.py",
}
NEVER_IN = {"data/": {"jax", "flax", "optax"}}

FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: pathlib.Path) -> set[str]:
    """Absolute names of all imports, also those inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_package_is_covered():
    packages = {p.parent.relative_to(PACKAGE).parts[0] for p in FILES if p.parent != PACKAGE}
    assert packages == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    where = path.relative_to(PACKAGE)
    own = where.parts[0] if len(where.parts) > 1 else None
    for name in imported(path):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == "dsad" and target in MAY_IMPORT and own in MAY_IMPORT and target != own:
            assert target in MAY_IMPORT[own], f"{where} imports {name}"
        if top in ONLY_IN:
            assert str(where).startswith(ONLY_IN[top]), f"{where} imports {name}"
        for prefix, banned in NEVER_IN.items():
            if str(where).startswith(prefix):
                assert top not in banned, f"{where} imports {name}"


def test_the_rule_sees_an_upward_import(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from dsad.train import loop\n")
    assert {"dsad.train", "dsad.train.loop"} <= imported(bad)


#: Rooms in which methods meet those who use them: what is optional there is declared in a seam.
DECLARED = ("objectives", "detectors", "evaluation", "train", "assembly", "bench", "cli", "data")


def hooks(path: pathlib.Path) -> list[str]:
    """Places that look for something that no seam declares: by name, default or signature."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        asked = name == "hasattr" or name.endswith("inspect.signature")
        if asked or (name == "getattr" and len(node.args) == 3):
            lines.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return lines


@pytest.mark.parametrize("room", DECLARED)
def test_nothing_is_found_by_its_name(room):
    #: A private thread pool of a library, which offers no other way to wait for it.
    allowed = {"_del_thread_pool"}
    found = [line for path in (PACKAGE / room).rglob("*.py") for line in hooks(path)]
    assert not [line for line in found if not any(word in line for word in allowed)]


def test_the_rule_sees_a_hook(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("if hasattr(x, 'f'):\n    getattr(x, 'g', None)\n    getattr(x, name)\n")
    assert len(hooks(bad)) == 2


def test_the_package_alone_is_light_and_names_what_it_offers():
    code = (
        "import sys, dsad\n"
        "heavy = {'jax', 'numpy', 'flax', 'PIL', 'absl'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "assert not hasattr(dsad, 'nothing')\n"
        "assert {'evaluate', 'fit', 'load', 'pretrain'} <= set(dsad.__all__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert dsad.__all__ == api.__all__
    assert all(getattr(dsad, name) is getattr(api, name) for name in dsad.__all__)
