"""Table 1 and its neighbours from metric rows: best value, marks, means, seeds, three formats, the paper's numbers."""

from __future__ import annotations

import fake_run
import pandas as pd
import pytest

from dcr.book.figures import draw_tables
from dcr.errors import DCRError
from dcr.plots.table_formats import fragment, html_of, tex_of
from dcr.tables import table1 as tables


def test_table1_marks_best_in_distribution_and_means():
    long = tables.table1(fake_run.metric_rows())
    assert long.query("benchmark == 'oktest' and best")["method"].tolist() == ["base"]
    wide = tables.wide(long)
    assert wide.loc[
        "base", "oktest compl. ↑ (n=50)"
    ] == "**0.95** [0.90, 1.00]" and wide.index.tolist() == list(fake_run.METHODS)
    assert wide.loc["DCR", "coconot compl. ↑ (n=50)"] == "0.70 [0.65, 0.75]†"
    assert wide.columns[0].startswith("mean") and wide.columns[-1].startswith("q-harm")
    outside = long.query("benchmark == 'mean compliance, out of distribution'").set_index("method")[
        "value"
    ]
    assert outside["STL"] == pytest.approx(0.6)  # oktest only: coconot is training data of DCR
    assert long.query("benchmark == 'mean DSR'").set_index("method")["n"]["STL"] == 100


def test_seeds_are_averaged_and_profiles_refused():
    seeds = pd.concat([fake_run.metric_rows(seed=s) for s in range(3)])
    row = tables.table1(seeds).query("benchmark == 'advbench' and method == 'STL'").iloc[0]
    assert (
        row["value"] == pytest.approx(0.71) and row["seeds"] == 3 and row["high"] - row["low"] > 0.1
    )
    with pytest.raises(DCRError, match="mixes profiles"):
        tables.table1(pd.concat([fake_run.metric_rows("a"), fake_run.metric_rows("b")]))


def test_balanced_table_pools_a_set_with_its_swapped_version():
    rows = fake_run.metric_rows()
    swapped = rows[rows["benchmark"] == "advbench"].assign(
        benchmark="advbench/swapped",
        form=lambda t: t["form"].replace("imperative", "question"),
        value=0.1,
        low=0.0,
        high=0.2,
    )
    long = tables.table1(pd.concat([rows, swapped]), "balanced")
    value = long.query("benchmark == 'advbench' and method == 'STL'")["value"].item()
    assert (
        value == pytest.approx((0.7 + 0.1) / 2)
        and not long["benchmark"].str.contains("swapped").any()
    )
    assert not tables.table1(pd.concat([rows, swapped]))["benchmark"].str.contains("swapped").any()


def test_tables_are_saved_in_three_formats_beside_the_papers_numbers(tmp_path):
    found = fake_run.tables()
    made = draw_tables(found["metrics"], tmp_path, found)
    assert {
        "table1",
        "table1_balanced",
        "table1_paper",
        "table_capabilities",
        "table_quality",
        "table_cost",
    } == set(made)
    tex, md = ((tmp_path / f"table1.{k}").read_text() for k in ("tex", "md"))
    assert (
        r"\toprule" in tex
        and r"\textbf{0.95}" in tex
        and r"$^\dagger$" in tex
        and "question-mark" in md
        and r"$\uparrow$" in tex
    )
    assert (
        tex.count("{") == tex.count("}")
        and len({line.count("|") for line in md.splitlines() if line.startswith("|")}) == 1
    )
    back = pd.read_csv(tmp_path / "table1.csv", index_col=0)
    assert back.loc["DCR", "coconot compl. ↑ (n=50)"].endswith("†")
    assert set(made["table1_paper"].index) == {"this run", "the paper's (secondary notes)"}
    paper = made["table1_paper"].loc["the paper's (secondary notes)"]
    dcr = paper.query("method == 'DCR' and model == 'Qwen2.5-1.5B'").iloc[0]
    assert (
        dcr["xstest-safe ↑"] == "**0.98**†"
        and (paper["mark"] == "N").all()
        and dcr["safety ↑"] == "**0.81**"
    )
    assert paper.query("model == 'Qwen2.5-7B'")["safety ↑"].eq("").all()
    ours = made["table1_paper"].loc["this run"].set_index("method")
    assert (
        ours["phtest ↑"].eq("").all() and ours["safety ↑"].eq("").all()
    )  # only two of the five safety sets: no mean of five
    assert ours.loc["DCR", "coconot ↑"] == "0.70 [0.65, 0.75]†"
    ability = made["table_capabilities"]
    assert ability.loc["DCR", "piqa acc ↑ (n=100)"].startswith("**0.40**")
    assert ability.loc["STL", "held-out answers perplexity ↓ (n=100)"].startswith("**0.30**")
    assert (
        made["table_quality"].loc["DCR", "seemingly toxic: win rate against STL ↑"]
        == "**0.55** [0.45, 0.65]"
    )
    assert (
        made["table_quality"].filter(like="Qwen2.5-1.5B").loc["DCR"].item() == "51.8"
        and made["table_cost"].iloc[0, -1] == "900"
    )


def test_paper_csv_holds_what_the_paper_page_says():
    paper = tables.paper_table()
    assert (
        len(paper) == 11
        and (paper["mark"] == "N").all()
        and paper["win_rate_vs_stl"].notna().sum() == 6
    )
    assert paper.query("model == 'LLaMA-3-8B' and method == 'SCANS'")["phtest"].item() == 0.90


def test_cells_are_escaped_in_every_format():
    frame = pd.DataFrame(
        {"a & b": ["<script>", "**0.5** [0.4, 0.6]"]}, index=pd.Index(["x_y", "<i>"], name="method")
    )
    page = fragment(frame)
    assert (
        "<script>" not in page
        and "&lt;script&gt;" in page
        and "<b>0.5</b>" in page
        and "&lt;i&gt;" in page
        and "a &amp; b" in page
    )
    assert (
        html_of("a<b") == "a&lt;b"
        and tex_of("50 % of $x_1$ {a}~^")
        == r"50 \% of \$x\_1\$ \{a\}\textasciitilde{}\textasciicircum{}"
    )
    styled = tables.styled(frame, "<b>caption").to_html()
    assert "<script>" not in styled and "&lt;b&gt;caption" in styled and "<i>" not in styled


def test_missing_columns_are_named():
    with pytest.raises(DCRError, match="capabilities: no column task"):
        tables.ability_table(
            pd.DataFrame(
                {
                    "method": ["a"],
                    "metric": ["acc"],
                    "value": [1.0],
                    "low": [0.0],
                    "high": [1.0],
                    "n": [1],
                }
            )
        )
    with pytest.raises(DCRError, match="no rows for form 'fragment'"):
        tables.table1(fake_run.metric_rows(), "fragment")
