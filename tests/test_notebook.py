"""Notebook parameters, papermill from any folder, escaping, and that nbval notices a changed number."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from dcr.book.reproduce import reproduce
from dcr.book.start import show, start
from dcr.errors import DCRError

ROOT = Path(__file__).resolve().parent.parent


def test_start_refuses_unknown_parameters_and_wrong_types(tmp_path):
    assert (
        start(
            {"profile": "quick", "seed": 3, "run_dir": str(tmp_path), "overrides": ""}
        ).config.seed
        == 3
    )
    with pytest.raises(DCRError, match="unknown notebook parameter 'sead'; known: profile, seed"):
        start({"profile": "quick", "sead": 3})
    with pytest.raises(DCRError, match="seed='3' a whole number"):
        start({"profile": "quick", "seed": "3"})
    with pytest.raises(DCRError, match="profile 'fast' is unknown"):
        start({"profile": "fast"})


def test_misspelt_parameter_fails_through_papermill_from_another_folder(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            str(ROOT / "notebooks" / "05_figures.ipynb"),
            "out.ipynb",
            "-p",
            "sead",
            "3",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode != 0 and "unknown notebook parameter 'sead'" in done.stderr


def test_figures_notebook_runs_alone_from_an_empty_run_directory(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            str(ROOT / "notebooks" / "05_figures.ipynb"),
            "out.ipynb",
            "-p",
            "run_dir",
            str(tmp_path / "run"),
            "-p",
            "profile",
            "quick",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    text = (tmp_path / "out.ipynb").read_text()
    assert "run notebook 04_evaluation" in text and "all checks passed" in text


def test_tables_are_escaped():
    page = show(pd.DataFrame({"text": ["<script>alert(1)</script>"]}), "<b>").to_html()
    assert (
        "<script>" not in page
        and "&lt;script&gt;" in page
        and "<b>" not in page.replace("<body>", "")
    )


def test_nbval_notices_a_changed_number(tmp_path):
    """The deterministic part of a committed notebook, cut out: passes as it is, fails with one digit changed."""
    source = json.loads((ROOT / "notebooks" / "03_alignment.ipynb").read_text(encoding="utf-8"))
    checked = next(
        i for i, c in enumerate(source["cells"]) if "NBVAL_CHECK_OUTPUT" in "".join(c["source"])
    )
    source["cells"] = source["cells"][: checked + 1]
    good, bad = tmp_path / "good.ipynb", tmp_path / "bad.ipynb"
    good.write_text(json.dumps(source))
    cell = source["cells"][checked]["outputs"][0]
    text = "".join(cell["text"])
    digit = next(c for c in text if c.isdigit())
    cell["text"] = text.replace(digit, str((int(digit) + 1) % 10), 1)
    bad.write_text(json.dumps(source))

    def nbval(path):
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "--nbval-lax",
                "--nbval-current-env",
                "-c",
                "/dev/null",
                str(path),
            ],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=tmp_path,
        ).returncode

    assert nbval(good) == 0 and nbval(bad) == 1


def test_reproduce_says_which_notebook_failed(tmp_path, monkeypatch):
    from dcr.book import reproduce as module

    broken = tmp_path / "notebooks"
    shutil.copytree(ROOT / "notebooks", broken)
    path = broken / "05_figures.ipynb"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["cells"][2]["source"] = "raise ValueError('stop here')"
    path.write_text(json.dumps(content))
    monkeypatch.setattr(module, "notebooks_dir", lambda: broken)
    with pytest.raises(DCRError, match="05_figures: cell .* failed: ValueError: stop here"):
        reproduce("quick", run_dir=str(tmp_path / "run"), only=("05",))
    with pytest.raises(DCRError, match="profile 'nope' is unknown"):
        reproduce("nope")


def test_a_part_without_figures_ends_without_a_report(tmp_path, monkeypatch):
    """One notebook alone, before 05 has drawn anything, is no error."""
    from dcr.book import reproduce as module

    short = tmp_path / "notebooks"
    short.mkdir()
    content = json.loads(
        (ROOT / "notebooks" / "01_representations.ipynb").read_text(encoding="utf-8")
    )
    content["cells"] = [
        c for c in content["cells"] if "parameters" in c["metadata"].get("tags", [])
    ]
    (short / "01_representations.ipynb").write_text(json.dumps(content))
    monkeypatch.setattr(module, "notebooks_dir", lambda: short)
    assert (
        reproduce("quick", run_dir=str(tmp_path / "run"), only=("01",))
        == tmp_path / "run" / "notebooks"
    )
    assert not (tmp_path / "run" / "report.html").exists()
