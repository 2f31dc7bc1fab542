"""Executes every notebook from the top on a fresh kernel; the last cell of each asserts its claim."""

from __future__ import annotations

import pathlib
import re

import nbclient
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code_cells(notebook):
    """Lists the code cells."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks_with_numbered_names():
    assert NOTEBOOKS
    assert all(re.fullmatch(r"\d\d_[a-z_]+\.ipynb", path.name) for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_the_top_and_its_last_cell_asserts(path):
    notebook = nbformat.read(path, as_version=4)
    assert len(notebook.cells) < 40
    assert "assert " in code_cells(notebook)[-1].source
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_outputs_of_a_full_run(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert any(cell.outputs for cell in cells)


def test_a_false_claim_fails():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 + 1 == 3")])
    with pytest.raises(CellExecutionError, match="AssertionError"):
        nbclient.NotebookClient(notebook, timeout=60).execute()
