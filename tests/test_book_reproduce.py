"""`make reproduce`: notebooks in order through papermill, kept while nothing changed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import fake_run
import nbformat
import pytest

from dcr.book import reproduce as module
from dcr.book.reproduce import reproduce
from dcr.errors import DCRError


@pytest.fixture
def book(tmp_path, monkeypatch):
    """Two small notebooks in place of ours; returns (write one, root of the run)."""
    folder, root = tmp_path / "notebooks", tmp_path / "a run"
    folder.mkdir()
    model = SimpleNamespace(name="mine", revision="")
    config = SimpleNamespace(to_dict=lambda: {"profile": "embedded"}, model=model)
    (tmp_path / "model").write_text("weights")
    monkeypatch.setattr(module, "ledger_key", lambda config: ("data", ()))
    monkeypatch.setattr(module, "identity", lambda *a: (tmp_path / "model").read_text())
    said = {"config": {"profile": "embedded"}, "methods": ["STL", "ours"], "seeds": [0, 1]}
    said["config"]["every_seed"] = ["STL"]
    made = SimpleNamespace(root=root, seeds=(0, 1), config=config, live=True)
    made.manifest = lambda: (root / "manifest.json").write_text(json.dumps(said))
    monkeypatch.setattr(module, "Experiment", lambda *a, **k: made)
    monkeypatch.setattr(module, "notebooks_dir", lambda: folder)
    monkeypatch.setattr(module, "NOTEBOOKS", ("01_one", "02_two"))

    def write(name: str, *cells: str) -> None:
        first = nbformat.v4.new_code_cell('seeds = "9"', metadata={"tags": ["parameters"]})
        content = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
        content.metadata = {"kernelspec": {"name": "python3", "display_name": "python3"}}
        content.metadata["language_info"] = {"name": "python"}
        nbformat.write(content, folder / f"{name}.ipynb")

    return write, root


def test_notebooks_run_in_order_are_kept_and_run_again_when_changed(book, capfd):
    write, root = book
    write("01_one", "print('seeds', seeds, run_dir)")
    write("02_two", "import pathlib", "print(pathlib.Path.cwd().name)")
    fake_run.write_run(root, ("same_rows",))
    (root / "manifest.json").unlink()  # the notebooks write none
    assert reproduce("embedded") == root / "report.html"
    page = (root / "report.html").read_text()
    assert "seeds 0, 1; methods: STL, ours (first seed)." in page
    said = capfd.readouterr()
    assert "notebooks: 100%" in said.err and "5/5" in said.err  # one bar over the cells of both
    assert said.out.index("01_one: ") < said.out.index("02_two: ") < said.out.index("all: ")
    text = (root / "notebooks" / "01_one.ipynb").read_text()
    assert f"seeds 0,1 {root}" in text and not list(root.glob("notebooks/*running*"))
    write("02_two", "print('changed')")
    reproduce("embedded")
    out = capfd.readouterr().out
    assert "01_one: up to date" in out and "02_two: up to date" not in out
    assert "changed" in (root / "notebooks" / "02_two.ipynb").read_text()


@pytest.mark.parametrize("what", ["data", "model"])
def test_notebooks_run_again_where_data_or_weights_changed(
    book, monkeypatch, tmp_path, capfd, what
):
    write, _ = book
    write("01_one", "print('a number')")
    write("02_two", "print('another')")
    reproduce("embedded")
    if what == "model":
        (tmp_path / "model").write_text("other weights in the same folder")
    else:
        monkeypatch.setattr(module, "ledger_key", lambda config: ("a row less in a file", ()))
    capfd.readouterr()
    reproduce("embedded")
    assert "up to date" not in capfd.readouterr().out


def test_a_run_of_tables_alone_asks_for_no_data(book, monkeypatch, capfd):
    write, root = book
    write("01_one", "print('a table')")
    made = SimpleNamespace(**{**vars(module.Experiment()), "live": False})
    monkeypatch.setattr(module, "Experiment", lambda *a, **k: made)
    monkeypatch.setattr(module, "ledger_key", None)
    assert reproduce("reference", only=("01",)) == root / "notebooks"


def test_a_failing_cell_is_named_and_what_ran_is_kept(book):
    write, root = book
    write("01_one", "print('so far')", "raise ValueError('stop here')")
    with pytest.raises(DCRError, match="01_one: cell 4 failed: ValueError: stop here.*running"):
        reproduce("embedded", only=("01",))
    assert "so far" in (root / "notebooks" / "01_one.running.ipynb").read_text()
    write("01_one", "print('mended')")
    assert reproduce("embedded", only=("01",)) == root / "notebooks"  # no table, so no report
    assert not (root / "report.html").exists()


def test_any_notebook_is_run_by_its_number_and_an_unknown_one_is_told(book):
    write, root = book
    write("01_one", "print('first')")
    write("03_more", "print('third')")
    with pytest.raises(DCRError, match="only=3: no such notebook; known: 01_one, 03_more"):
        reproduce("embedded", only=("01", "3"))
    assert not root.exists()
    reproduce("embedded", only=("03",))
    assert [p.name for p in (root / "notebooks").glob("*.ipynb")] == ["03_more.ipynb"]
