"""Every notebook runs, from the first cell to the last, and carries no outputs."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
# Fewer steps, points of a plot and budgets, each of them compiled: the same cells in a third of the time.
SMALLER = {
    "convert.ipynb": {"=200": "=50", "=60": "=20", "[1, 2, 4]": "[1]"},
    "memory.ipynb": {
        "(8, 32, 128)": "(8, 128)",
        "(1024, 4096, 16_384)": "(1024, 4096)",
        '("400MB", "250MB", "120MB", "90MB")': '("120MB",)',
    },
    "quickstart.ipynb": {"(4, 16, 64)": "(4, 64)"},
    "vision.ipynb": {"STEPS, BATCH = 300": "STEPS, BATCH = 60", "(4, 12, 24, 48)": "(4, 48)"},
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_are_stripped(path):
    assert all(not cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    for written, smaller in SMALLER[path.name].items():
        assert any(written in cell.source for cell in notebook.cells), f"{written} is not in {path.name}"
        for cell in notebook.cells:
            cell.source = cell.source.replace(written, smaller) if cell.cell_type == "code" else cell.source
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
