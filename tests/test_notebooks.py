"""The committed notebooks: a page lists their questions, and nbval notices a changed number."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("0*.ipynb"))


def test_lab_opens_on_a_page_that_lists_every_notebook_with_its_question():
    page = nbformat.read(FOLDER / "index.ipynb", as_version=4).cells[0].source
    for path in NOTEBOOKS:
        first = nbformat.read(path, as_version=4).cells[0].source.split("\n")[0]
        number, question = first.removeprefix("# ").split(". ", 1)
        assert f"{number}. [{question}]({path.name})" in page
    assert "tree/index.ipynb" in (FOLDER.parent / "Makefile").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_keep_no_widget_state_and_no_run_of_papermill(path):
    book = nbformat.read(path, as_version=4)
    assert not {"widgets", "papermill"} & set(book.metadata)
    assert not any("papermill" in c.metadata for c in book.cells)
    assert not any(o.get("name") == "stderr" for c in book.cells for o in c.get("outputs", []))


def test_nbval_notices_a_changed_number(tmp_path):
    """A checked cell cut out of a notebook: passes with its output, fails with one digit
    changed."""
    cell = nbformat.v4.new_code_cell("print('rate', 0.25)", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="rate 0.25\n")]
    book = nbformat.v4.new_notebook(cells=[cell])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "python3"}
    nbformat.write(book, tmp_path / "good.ipynb")
    cell.outputs[0].text = "rate 0.35\n"
    nbformat.write(book, tmp_path / "bad.ipynb")
    asked = "-m pytest -q -p no:cacheprovider --nbval --nbval-current-env -c /dev/null".split()
    done = subprocess.run([sys.executable, *asked, "good.ipynb", "bad.ipynb"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=240)  # fmt: skip
    assert "1 failed, 1 passed" in done.stdout, done.stdout
