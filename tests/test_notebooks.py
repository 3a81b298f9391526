"""The notebooks run from top to bottom and show what they promise."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.small import slow_unless

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def accuracy(notebook: nbformat.NotebookNode) -> float:
    """The best kNN accuracy printed after an epoch."""
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    return max(float(percent) / 100 for percent in re.findall(r"kNN ([\d.]+) %", printed))


@pytest.mark.parametrize("path", slow_unless(NOTEBOOKS[:1].__contains__, NOTEBOOKS), ids=lambda path: path.stem)
def test_notebook_runs_and_learns(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    assert accuracy(notebook) > 0.85


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_outputs_and_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert accuracy(notebook) > 0.85
    assert path.stat().st_size < 300_000
