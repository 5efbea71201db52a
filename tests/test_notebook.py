"""The notebook runs from top to bottom on reduced settings, and is stored without outputs."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import ROOT, alone

PATH = ROOT / "colab" / "quickstart.ipynb"


def test_outputs_are_stripped():
    for cell in nbformat.read(PATH, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


@pytest.mark.slow
def test_quickstart_runs(tmp_path, monkeypatch):
    for name, value in alone().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures inline, as in a notebook
    book = nbformat.read(PATH, as_version=4)
    settings = next(c for c in book.cells if c.source.startswith("VARIANT"))
    settings.source = settings.source.replace('VARIANT = ""', 'VARIANT = "smoke"')
    assert "smoke" in settings.source.splitlines()[0]
    NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    pictures = [
        output
        for cell in book.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 4
    assert (tmp_path / "dsad-quickstart" / "report.html").is_file()
