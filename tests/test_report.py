"""The report: self-contained, escaped, with the run's own numbers, and saying what is missing."""

from __future__ import annotations

import json

import fake_run
import pytest

from dcr.book.figures import PICTURES, draw_all
from dcr.book.report import STORY, findings, write_report
from dcr.errors import DCRError


def make_report(root):
    """A made-up run with figures, tables, an executed notebook and the report."""
    run = fake_run.copy_of_drawn(root)
    (run / "notebooks").mkdir()
    (run / "notebooks" / "01_representations.ipynb").write_text("{}")
    (run / "notebooks" / "02_refinement.running.ipynb").write_text("{}")
    return write_report(run)


def test_report_is_self_contained_escaped_and_tells_the_story(tmp_path):
    with pytest.raises(DCRError, match="no figures yet"):
        write_report(tmp_path)
    page = make_report(tmp_path / "run").read_text()
    drawn = fake_run.drawn()[1]
    assert page.count("data:image/png;base64,") == len(drawn) and "<script" not in page
    assert (
        "http://" not in page
        and "https://" not in page
        and "&lt;b&gt;STL" in page
        and "<b>STL" not in page
    )
    assert (
        all(heading.split("?")[0] in page for heading, _, _ in STORY)
        and "Beside the paper&#39;s numbers" in page
    )
    assert 'href="notebooks/01_representations.ipynb"' in page and "running" not in page
    assert '"profile": "p"' in page.replace("&#34;", '"')


def test_every_figure_has_its_place_in_the_story():
    assert {name for _, _, names in STORY for name in names} >= set(PICTURES)


def test_findings_are_the_runs_numbers(tmp_path):
    run = fake_run.write_run(tmp_path)
    told = findings(run)
    assert "DCR's mean compliance changes by +0.10 and its mean DSR by +0.00" in told[0]
    assert any(s.startswith("question-mark: mean compliance 0.60") for s in told)
    (run / "tables" / "metrics.csv").unlink()
    assert findings(run) == []


def test_missing_figures_are_named_in_the_report(tmp_path):
    run = fake_run.write_run(tmp_path)
    (run / "tables" / "curves.csv").unlink()
    draw_all(run / "tables", run / "figures", only=("overview", "refusal_rates"))
    (run / "manifest.json").write_text(json.dumps({}))
    assert (
        "refusal_rates: no curves yet; run notebook 04_evaluation" in write_report(run).read_text()
    )
