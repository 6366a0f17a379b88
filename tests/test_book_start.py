"""Notebook parameters: only what papermill was told to set is checked, no other variable."""

from __future__ import annotations

import nbformat
import pandas as pd
import papermill
import pytest

from dcr.book import start as module
from dcr.book.start import injected, show, start
from dcr.errors import DCRError

PARAMETERS = 'profile = "quick"\nseeds = "0"\nrun_dir = ""\noverrides = ""'
STUB = """import dcr.book.start as module
module.Experiment = lambda **given: given
print("TOLD", sorted(module.start(globals()).items()))"""


@pytest.fixture
def told(monkeypatch):
    """What `Experiment` was called with."""
    found = {}
    monkeypatch.setattr(module, "Experiment", lambda **given: found.update(given) or found)
    return found


def test_only_parameters_reach_the_experiment(told):
    mine = {"profiles": ["a"], "seed": 3, "In": ["x = 1", "# Parameters of mine\nalpha = 2"]}
    start({"profile": "quick", "seeds": "0-4", "run_dir": "here", "overrides": "", **mine})
    assert told == {"profile": "quick", "seeds": "0-4", "run_dir": "here", "overrides": ""}
    told.clear()
    assert start({}) == {"profile": "reference"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("run_dir", v) for v in (123, None, 1.5, ["a"], {"a": 1})),
        *(("profile", v) for v in (3, True, None, ["quick"])),
        *(("seeds", v) for v in (True, 1.5, None, {"a": 1}, [0, 1])),
        *(("overrides", v) for v in (3, True, None, ["refine.layer=0.5"])),
    ],
)
def test_odd_types_are_refused_by_name(told, name, value):
    with pytest.raises(DCRError, match=f"notebook parameter {name}=.* must be .*papermill"):
        start({"profile": "quick", name: value})
    assert not told


@pytest.mark.parametrize(
    "wrong",
    [
        *({"overrides": o} for o in ("refine.layer=[1", "refine.layer", "nope.x=1", "a: {b")),
        *({"seeds": s} for s in ("one", "4-1", "-1", "0,,1x", -2)),
        *({"profile": p} for p in ("quik", "", "../quick")),
    ],
)
def test_wrong_values_get_the_command_lines_refusal(tmp_path, wrong):
    with pytest.raises(DCRError):
        start({"profile": "quick", "run_dir": str(tmp_path / "run")} | wrong)
    assert not (tmp_path / "run").exists()


def test_seeds_may_be_a_number(told):
    assert start({"profile": "quick", "seeds": 3})["seeds"] == 3


def test_what_papermill_set_is_read_from_its_last_cell(told):
    added = ["# Parameters\nprofile = 'quick'\nsead = 3\n", "y = 2"]
    assert injected(added) == ["profile", "sead"]
    with pytest.raises(DCRError, match="unknown notebook parameter 'sead'; known: profile, seeds"):
        start({"profile": "quick", "sead": 3, "In": added})
    start({"profile": "quick", "sead": 3, "In": [*added, "# Parameters\nseeds = 1\n"]})


def notebook(*cells: str) -> nbformat.NotebookNode:
    """The parameters cell, then code cells."""
    first = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    book = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "python3"}
    book.metadata["language_info"] = {"name": "python"}
    return book


def execute(folder, monkeypatch, book, **parameters) -> str:
    """Everything printed by a notebook that papermill ran, in a kernel with a startup file."""
    startup = folder / "ipython" / "profile_default" / "startup" / "00.py"
    startup.parent.mkdir(parents=True, exist_ok=True)
    startup.write_text("favourite = 1\nsead = 2\nrun_dirs = ['a']\n")
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    nbformat.write(book, folder / "in.ipynb")
    done = papermill.execute_notebook(
        str(folder / "in.ipynb"), str(folder / "out.ipynb"), parameters, progress_bar=False
    )
    return "".join(o.get("text", "") for c in done.cells for o in c.get("outputs", []))


def test_misspelt_parameter_fails_through_papermill(tmp_path, monkeypatch):
    with pytest.raises(papermill.PapermillExecutionError) as error:
        execute(tmp_path, monkeypatch, notebook(STUB), profile="quick", sead=3)
    assert error.value.ename == "DCRError" and "unknown notebook parameter 'sead'" in str(error)


def test_cells_run_twice_with_a_readers_own_variables_through_papermill(tmp_path, monkeypatch):
    """Startup file, neighbours of the parameters' names, and Run All twice: nothing is refused."""
    own = "profile_names = ['a']; seeds_used = 3; run_directory = 1"
    book = notebook(STUB, own, PARAMETERS, STUB)
    text = execute(tmp_path, monkeypatch, book, seeds="0-4", run_dir="/a b")
    lines = [line for line in text.split("\n") if line.startswith("TOLD")]
    assert "('run_dir', '/a b'), ('seeds', '0-4')" in lines[0] and len(lines) == 2
    assert "('seeds', '0')" in lines[1]


def test_tables_are_shown_escaped():
    page = show(pd.DataFrame({"text": ["<script>alert(1)</script>"]}), "<b>").to_html()
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>" not in page
