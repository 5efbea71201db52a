"""The notebook stands alone: from a wheel, in an empty folder, and it is stored without outputs."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import venv

import nbformat
import pytest

import dsad
from tests.helpers import ROOT

PATH = ROOT / "colab" / "quickstart.ipynb"
BOOK = nbformat.read(PATH, as_version=4)
CODE = [cell for cell in BOOK.cells if cell.cell_type == "code"]
#: What the cells may import beside the standard library; Pillow comes with dsad.
ALLOWED = {"dsad", "numpy", "IPython", "PIL"}


def test_outputs_are_stripped():
    for cell in CODE:
        assert not cell.outputs
        assert cell.execution_count is None


def test_cells_use_nothing_deeper_than_the_facade():
    tree = ast.parse("\n".join(cell.source for cell in CODE))
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    tops = {name.partition(".")[0] for name in names}
    assert tops - sys.stdlib_module_names == ALLOWED
    assert [name for name in names if name.startswith("dsad")] == ["dsad"]
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "dsad"
    }
    assert used == {"fit", "load", "pretrain", "evaluate"} <= set(dsad.__all__)


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Runs the first cell where dsad is missing; gives the arguments of every call of pip."""

    def run(versions, codes, **environment):
        calls = []

        def pip(argv, check=False):
            calls.append(argv[len([sys.executable, "-m", "pip", "install", "-q"]) :])
            code = codes.pop(0)
            assert not (check and code)
            return subprocess.CompletedProcess(argv, code)

        class Distribution:
            def __init__(self, name, version):
                self.name, self.version = name, version

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.setattr(
            "importlib.metadata.distributions",
            lambda: [Distribution(*item) for item in versions.items()],
        )
        monkeypatch.setattr(subprocess, "run", pip)
        monkeypatch.delenv("DSAD_SOURCE", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        exec(compile(CODE[0].source, "cell", "exec"), {})
        return calls

    return run


def test_an_accelerator_that_fits_is_kept(install):
    tpu = {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.40", "jaxtyping": "1", "numpy": "2"}
    pins = ["jax==0.10.2", "jaxlib==0.10.2", "libtpu==0.0.40"]
    assert install(tpu, [0], DSAD_SOURCE="git+x") == [["git+x", *pins]]


def test_one_that_is_too_old_is_replaced_with_its_plugin(install):
    cuda = {"jax": "0.7.2", "jaxlib": "0.7.2", "jax_cuda12_plugin": "0.7.2", "jax-cuda12-pjrt": "0"}
    first, second = install(cuda, [1, 0], DSAD_SOURCE="a.whl")
    assert "jax-cuda12-plugin==0.7.2" in first
    assert second == ["a.whl", "jax[cuda12]"]
    assert install({"jax": "0.7.2", "libtpu": "0"}, [1, 0], DSAD_SOURCE="b")[1] == ["b", "jax[tpu]"]
    assert install({"jax": "0.7.2"}, [1, 0], DSAD_SOURCE="b")[1] == ["b"]


def test_a_wheel_beside_it_is_enough_and_nothing_is_said(install, tmp_path):
    with pytest.raises(SystemExit, match="REPOSITORY"):
        install({}, [])
    wheel = tmp_path / "dsad-0.1.0-py3-none-any.whl"
    wheel.touch()
    assert install({}, [0]) == [[str(wheel)]]


#: An editable install of dsad, and what a new environment has by itself.
NOT_SHARED = re.compile(r"_?dsad|__editable__|pip\b|setuptools|_?distutils")


def environment(place: pathlib.Path) -> pathlib.Path:
    """The Python of a new environment with all that this one has but dsad; its pip works."""
    venv.create(place / "venv", with_pip=True)
    shared = place / "shared"
    shared.mkdir()
    for entry in pathlib.Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not NOT_SHARED.match(entry.name):
            (shared / entry.name).symlink_to(entry)
    (target,) = (place / "venv" / "lib").glob("python*/site-packages")
    (target / "shared.pth").write_text(f"{shared}\n")
    return place / "venv" / "bin" / "python"


RUN = """
import nbformat, nbclient
book = nbformat.read("quickstart.ipynb", as_version=4)
first = book.cells[next(i for i, c in enumerate(book.cells) if "VARIANT =" in c.source)]
assert 'VARIANT = ""' in first.source
first.source = first.source.replace('VARIANT = ""', 'VARIANT = "smoke"')
nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
nbformat.write(book, "done.ipynb")
"""


@pytest.mark.slow
def test_it_runs_in_an_empty_folder_from_a_wheel(tmp_path):
    folder = tmp_path / "leerer Ordner"
    folder.mkdir()
    shutil.copy(PATH, folder)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True)
    python = environment(tmp_path)
    alone = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "MPLBACKEND")}
    # Nothing but the wheel is installed, and no kernel but that of the new environment is there.
    alone |= {"PIP_NO_INDEX": "1", "JUPYTER_DATA_DIR": str(tmp_path), "JUPYTER_PATH": ""}
    done = subprocess.run(
        [str(python), "-c", RUN], cwd=folder, env=alone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    where = subprocess.run(
        [str(python), "-c", "import dsad; print(dsad.__file__)"], cwd=folder, env=alone,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(tmp_path / "venv"))
    cells = [c for c in nbformat.read(folder / "done.ipynb", as_version=4).cells if "outputs" in c]
    outputs = [output for cell in cells for output in cell.outputs]
    data = [output.get("data", {}) for output in outputs]
    assert sum("image/png" in each for each in data) == 6  # the new pictures, and each with its map
    text = "".join(output.get("text", "") for output in outputs)
    verdicts = re.findall(r"^(plain|scratched) \d+\.png: (good|defect), score", text, re.M)
    assert verdicts == [("plain", "good")] * 2 + [("scratched", "defect")] * 3
    assert len(re.findall(r"^(?:un|pre)trained .*image_auroc \d\.\d{3}", text, re.M)) == 2
    page = next(each["text/html"] for each in data if "srcdoc=" in each.get("text/html", ""))
    assert "Defect localization" in page
    assert str(tmp_path) not in page
    assert "file://" not in page
