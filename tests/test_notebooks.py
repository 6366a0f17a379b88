"""The committed notebooks: a page lists their questions, and nbval notices a changed number."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from papermill import inspect_notebook

from dcr.book.start import PARAMETERS

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


def code_of(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_cells_are_short_define_nothing_and_keep_no_mark_of_another_mode(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert len(cell.source.split("\n")) <= 15, cell.id
        assert "NBVAL_" not in cell.source, cell.id
    for cell in code_of(path):
        lines = cell.source.split("\n")
        tree = ast.parse("\n".join(line for line in lines if not line.startswith("%%")))
        defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        assert not any(isinstance(node, defined) for node in ast.walk(tree)), cell.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_every_picture_is_followed_by_what_to_see_in_it(path):
    told = True
    for cell in nbformat.read(path, as_version=4).cells:
        picture = cell.cell_type == "code" and "experiment.figure(" in cell.source
        if picture or cell.source.startswith("## "):
            assert told, f"nothing is said before {cell.id}"
            told = not picture
        elif cell.cell_type == "markdown" or "print(" in cell.source:
            told = True
    assert told


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_outputs_that_nbval_leaves_out_are_pictures_and_widgets(path):
    shown = ("experiment.figure(", "explore")
    for cell in code_of(path):
        if "nbval-ignore-output" in cell.metadata.get("tags", []):
            assert any(name in cell.source for name in shown), cell.id
            assert "experiment.table(" not in cell.source, cell.id


def test_toys_run_without_a_model_and_without_a_live_run():
    toys = [c.source for path in NOTEBOOKS for c in code_of(path) if "toy" in c.source]
    assert len(toys) >= 4 and not any("live" in t or ".base()" in t for t in toys)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_papermill_reads_every_parameter(path):
    assert set(inspect_notebook(str(path))) == set(PARAMETERS)


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
