"""Figures of a run folder by one command, and the report: the run's numbers, escaped, complete,
honest."""

from __future__ import annotations

import json
import shutil

import fake_run
import pandas as pd
import pytest

from dcr.book import report
from dcr.book.report import draw, effect, write_report
from dcr.errors import DCRError
from dcr.study.registry import FIGURES, load_all

load_all()
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with some tables, drawn and reported once; copy it to change it."""
    root = fake_run.write_run(tmp_path_factory.mktemp("runs") / "run")
    claims = fake_run.tables()["claims"].replace("DCR complies more than STL", SCRIPT)
    claims.to_csv(root / "tables" / "claims.csv", index=False)
    (root / "notebooks" / "02_refinement.running.ipynb").write_text("{}")
    write_report(root)
    return root


def test_one_command_gives_the_same_bytes_again(run, tmp_path):
    """Deleting the pictures and drawing once more: figures, data, tables and index, byte for
    byte."""
    names = ("plane", "same_rows", "gap", "claims")
    for name in names:
        (tmp_path / "reference").mkdir(exist_ok=True)
        shutil.copy(run / "tables" / f"{name}.csv", tmp_path / "reference")
    missing = draw(tmp_path / "reference", tmp_path)
    assert set(missing) == set(FIGURES) - set(names)
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    assert {"plane.png", "plane.svg", "README.md"} <= set(first)
    assert "plane.csv" not in first  # the data stands in reference/, and the index links there
    assert "(reference/plane.csv)" in first["README.md"].decode()
    for path in tmp_path.glob("*.png"):
        path.unlink()
    draw(tmp_path / "reference", tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == first


def test_data_stands_beside_each_figure_and_the_index_lists_all(run):
    index = (run / "figures" / "README.md").read_text(encoding="utf-8")
    for name, entry in FIGURES.items():
        if name not in fake_run.SMALL:
            assert f"- not drawn: {name} (no table" in index
            continue
        data = (run / "figures" / f"{name}.csv").read_bytes()
        assert data == (run / "tables" / f"{name}.csv").read_bytes()
        assert f"[{name}]({name}.png) ([data]({name}.csv))" in index
        assert (f"![{name}]" in index) == (name in report.MAIN)
        told = ". ".join(entry.caption.split(". ")[:2]).rstrip(".")
        assert (told in index) == (name in report.MAIN)
    assert (
        "- not drawn: search (no table; run dcr grid search --run-dir RUN, then dcr table" in index
    )
    assert len(report.MAIN) == 12 and set(report.MAIN) <= set(FIGURES)


def test_page_is_self_contained_escaped_and_opens_with_plane_and_claims(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(set(fake_run.SMALL) & set(FIGURES)) >= 10
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert "&lt;script&gt;alert(1)" in page and "&lt;i&gt;embedded" in page
    assert page.index('id="plane"') < page.index('id="claims"') < page.index("<nav>")
    assert 'href="notebooks/01_representations.ipynb"' in page and ".running" not in page
    assert "prefers-color-scheme: dark" in page and "0.10 [0.05, 0.15]" in page


def test_page_says_when_a_run_is_too_small_to_show_anything(run):
    claims = fake_run.tables()["claims"]
    assert effect(claims).startswith("Of 2 claims of the paper, as published: 2 with an interval")
    wide = claims.assign(low=-0.2, high=0.4)
    assert "too small to show an effect" in effect(wide)
    worse = claims.assign(low=[-0.4] + [0.1] * 5, high=[-0.1] + [0.3] * 5)
    assert "1 with an interval above 0, 1 below" in effect(worse)
    second = claims["reading"].unique()[1]
    around = claims.assign(low=claims["low"].mask(claims["reading"] == second, -0.5))
    assert effect(around).endswith(
        f"; {second}: 0 with an interval above 0, 0 below, 2 that hold it."
    )


def test_pictures_are_drawn_anew_only_where_a_table_changed(run, tmp_path, monkeypatch):
    root = shutil.copytree(run, tmp_path / "run")
    drawn = []
    left_out = dict.fromkeys(set(FIGURES) - set(fake_run.SMALL), "no table")
    monkeypatch.setattr(report, "draw", lambda *a: drawn.append(a) or left_out)
    write_report(root)
    assert drawn == []
    (root / "tables" / "gap.csv").write_text(
        fake_run.tables()["gap"].assign(auroc=0.5).to_csv(index=False)
    )
    write_report(root)
    assert len(drawn) == 1


def test_what_is_missing_or_broken_is_said(tmp_path):
    with pytest.raises(DCRError, match="no tables here; give a run directory"):
        write_report(tmp_path)
    root = tmp_path / "run"
    (root / "tables").mkdir(parents=True)
    fake_run.tables()["gap"].drop(columns="auroc").to_csv(root / "tables" / "gap.csv", index=False)
    fake_run.tables()["same_rows"].to_csv(root / "tables" / "same_rows.csv", index=False)
    page = write_report(root).read_text(encoding="utf-8")
    assert "figure gap: its table lacks" in page and "plane: no table" in page
    (root / "tables" / "same_rows.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DCRError, match="same_rows.csv: no table"):
        write_report(root)


def test_manifest_of_a_run_is_on_the_page(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert json.loads((run / "manifest.json").read_text())["methods"][1] in page
    assert pd.read_csv(run / "figures" / "plane.csv").shape[0] == len(fake_run.tables()["plane"])
