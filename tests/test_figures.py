"""Figures and tables from tidy tables alone: numbers drawn, bytes repeat, missing stages are said, profiles never mix."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
import pytest

from dcr import plots, style, tables
from dcr.errors import DCRError
from dcr.figures import SOURCES, draw_all, draw_tables
from dcr.report import CAPTIONS, write_report


def metric_rows(profile: str = "p") -> pd.DataFrame:
    rows = []
    for method, shift in (("STL", 0.0), ("DCR", 0.1), ("question-mark", 0.05)):
        for benchmark, metric in (("oktest", "compliance"), ("coconot", "compliance"), ("advbench", "dsr"), ("q-harm", "dsr")):
            for form in ("all", "question", "imperative", "balanced"):
                for name in (metric, "refusal_rate"):
                    rows.append({"profile": profile, "method": method, "seed": 0, "benchmark": benchmark, "metric": name, "form": form,
                                 "value": 0.5 + shift, "low": 0.4 + shift, "high": 0.6 + shift, "n": 50, "judge": "phrases",
                                 "step": -1, "in_distribution": benchmark == "coconot"})
    return pd.DataFrame(rows)


@pytest.fixture
def run(tmp_path):
    """A run directory with a small table for every figure."""
    folder = tmp_path / "tables"
    folder.mkdir()
    layers = pd.DataFrame({"layer": [1, 2] * 2, "auroc": [0.6, 0.7] * 2, "low": 0.5, "high": 0.8, "pairing": ["sources (paper)"] * 2 +
                           ["matched pairs"] * 2})
    data = {
        "question_shares": pd.DataFrame({"set": ["a", "b"], "label": ["toxic", "general"], "question_share": [0.1, 0.9], "n": [5, 6]}),
        "separability_probe_base": layers,
        "separability_surface_base": pd.DataFrame({"baseline": ["length"] * 2, "auroc": 0.55,
                                                   "pairing": ["sources (paper)", "matched pairs"]}),
        "separability_transfer_base": layers.assign(tested_on="matched pairs"),
        "refinement_DCR": pd.DataFrame({"step": [0, 5], "cross_similarity": [0.9, 0.1], "within_similarity": [0.9, 0.8],
                                        "probe_auroc": [0.6, 0.9], "method": "DCR"}),
        "losses": pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0], "method": "STL", "stage": "align"}),
        "trajectory_rejection": pd.DataFrame({"step": [0, 0, 4, 4], "label": ["toxic", "general"] * 2, "probability": [0.1, 0.0, 0.9, 0.2],
                                              "method": "STL"}),
        "trajectory_kernel": pd.DataFrame({"step": [0, 4], "class_a": "toxic", "class_b": "seemingly_toxic", "normalised": [0.9, 0.8],
                                           "normalised_low": [0.8, 0.7], "normalised_high": [1.0, 0.9], "method": "STL"}),
        "plane": pd.DataFrame({"method": ["STL"] * 2, "step": [0, 4], "dsr": [0.1, 0.8], "compliance": [1.0, 0.4]}),
        "metrics": metric_rows(),
        "cost": pd.DataFrame({"name": ["STL"], "kind": ["align"], "seconds": [10.0], "peak_memory_mib": [1.0]}),
    }
    for name, table in data.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    return tmp_path


def test_every_figure_is_drawn_with_labels_and_saved_with_its_data(run):
    drawn, missing = draw_all(run / "tables", run / "figures")
    assert missing == {} and set(drawn) == {"overview", *SOURCES} <= set(CAPTIONS)
    for name, figure in drawn.items():
        assert (run / "figures" / f"{name}.png").stat().st_size > 3000 and (run / "figures" / f"{name}.svg").exists()
        if name not in ("overview", "rates_by_form"):
            assert figure.axes[0].get_xlabel(), name
    assert all((run / "figures" / f"{t}.csv").exists() for needed, _ in SOURCES.values() for t in needed)


def test_pictures_are_the_same_bytes_twice(run):
    def digests():
        draw_all(run / "tables", run / "figures")
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (run / "figures").iterdir()}

    assert digests() == digests()


def test_plotted_numbers_are_the_tables():
    points = pd.DataFrame({"method": ["STL"] * 2, "step": [0, 4], "dsr": [0.1, 0.8], "compliance": [1.0, 0.4]})
    line = plots.plane(points).axes[0].lines[0]
    np.testing.assert_allclose(line.get_xydata(), [[0.1, 1.0], [0.8, 0.4]])


def test_a_missing_stage_is_said_and_the_rest_drawn(run):
    (run / "tables" / "plane.csv").unlink()
    drawn, missing = draw_all(run / "tables", run / "figures")
    assert "run notebook 04_evaluation" in missing["plane"] and set(drawn) == {"overview", *SOURCES} - {"plane"}


def test_mixed_profiles_are_refused():
    mixed = pd.concat([metric_rows("a"), metric_rows("b")])
    for make in (tables.table1, plots.rates_by_form):
        with pytest.raises(DCRError, match="mixes profiles"):
            make(mixed)


def test_every_method_and_class_has_its_own_look():
    assert len(set(style.METHOD_COLOURS.values())) == len(style.METHOD_COLOURS) == len(set(style.METHOD_MARKERS.values()))
    assert set(style.CLASS_COLOURS) == set(style.CLASS_LINES) == {"toxic", "seemingly_toxic", "general"}


def test_table1_marks_best_in_distribution_and_means():
    long = tables.table1(metric_rows())
    best = long[long["best"]].set_index("benchmark")["method"]
    assert best["oktest"] == "DCR" and best["mean DSR"] == "DCR"
    wide = tables.wide(long)
    assert wide.loc["DCR", "coconot compl. ↑ (n=50)"] == "**0.60** [0.50, 0.70]†"
    assert wide.index.tolist() == ["STL", "DCR", "question-mark"]


def test_tables_are_saved_in_three_formats_beside_the_papers_numbers(run):
    made = draw_tables(metric_rows(), run / "tables")
    assert set(made["table1_paper"].index) == {"this run", "the paper's (secondary notes)"}
    tex, md = ((run / "tables" / f"table1.{k}").read_text() for k in ("tex", "md"))
    assert r"\toprule" in tex and r"\textbf{0.60}" in tex and r"$^\dagger$" in tex and "question-mark" in md
    paper = made["table1_paper"].loc["the paper's (secondary notes)"]
    assert paper.query("method == 'DCR' and model == 'Qwen2.5-1.5B'")["xstest-safe"].item() == 0.98 and (paper["mark"] == "N").all()
    assert made["table1_paper"].loc["this run", "phtest"].isna().all()


def test_report_is_self_contained_and_escaped(run):
    with pytest.raises(DCRError, match="no figures yet"):
        write_report(run)
    draw_all(run / "tables", run / "figures")
    draw_tables(metric_rows().replace("STL", "<b>STL</b>"), run / "tables")
    page = write_report(run).read_text()
    assert page.count("data:image/png;base64,") == len(SOURCES) + 1 and "<script" not in page
    assert "http://" not in page and "https://" not in page and "&lt;b&gt;STL" in page and "<b>STL" not in page
