"""Tables for people: a row a method, best in bold, every text escaped for its medium."""

from __future__ import annotations

import html.parser
import re

import fake_run
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcr.evaluate.rates import CORRECTED
from dcr.plots.tables import latex, layout, markdown, save_table, styled

ATTACKS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "a | b",
    r"\input{/etc/passwd}",
    "50 % of $x_1$ {a}~^ & #",
    "**bold** `code` _it_",
    "first\nsecond",
)


def test_layout_makes_a_row_a_method_with_intervals_marks_and_the_best():
    frame = fake_run.tables()["table1"]
    texts, best = layout(frame)
    assert texts.columns.tolist() == ["method", "compliance ↑, as published", "DSR ↑, forms equal"]
    assert texts["method"].tolist() == list(fake_run.METHODS)
    row = frame.iloc[0]
    assert texts.iloc[0, 1] == f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]†"
    assert best.to_numpy().sum() == frame["best"].sum() and not best["method"].any()
    beside = dict(zip(CORRECTED, (0.5, 0.25, 0.75), strict=True))
    texts, _ = layout(frame.assign(**beside))
    expected = f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}] / 0.50 [0.25, 0.75]†"
    assert texts.iloc[0, 1] == expected
    unknown = layout(frame.assign(**dict.fromkeys(CORRECTED, np.nan)))[0]
    assert unknown.equals(layout(frame)[0])
    part = frame.drop(index=1).assign(
        low=np.nan
    )  # a missing cell is blank, an unknown interval too
    texts, _ = layout(part)
    assert texts.iloc[0, 2] == "" and texts.iloc[0, 1] == f"{row['value']:.2f}†"
    two = pd.concat([frame.assign(reading=np.nan), frame.assign(reading="N")], ignore_index=True)
    assert len(layout(two)[0]) == 2 * len(fake_run.METHODS)  # as read back: "" is missing
    plain, best = layout(pd.DataFrame({"a": [0.123, np.nan], "b": ["x", None], "n": [3, 4]}))
    assert plain.to_numpy().tolist() == [["0.12", "x", "3"], ["", "", "4"]]
    assert not best.to_numpy().any()


class Tags(html.parser.HTMLParser):
    """The tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_text_is_escaped_for_html_markdown_and_latex(attack):
    frame = pd.DataFrame({attack: [attack, "0.1 [0.0, 0.2]"], "value ↑": [0.5, 0.25]})
    page = styled(frame, attack).to_html()
    known = {"style", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert Tags(page).found <= known
    lines = markdown(frame, attack).strip().split("\n")
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in lines[2:]]
    assert len(lines) == 6 and set(cells) == {3}
    assert not re.search(r"(?<!\\)(<|\[(?!\d)|[*_`])", "".join(lines[2:5:2]))
    tex = latex(frame, attack)
    assert r"\input" not in tex and r"\toprule" in tex
    commands = set(re.findall(r"\\[a-zA-Z]+", tex))
    allowed = {"textbackslash", "textasciitilde", "textasciicircum", "uparrow", "begin", "end"}
    allowed |= {"caption", "toprule", "midrule", "bottomrule"}
    assert commands <= {"\\" + c for c in allowed}


@given(st.text(max_size=30), st.text(max_size=30))
@settings(max_examples=40, deadline=None)
def test_any_text_keeps_the_table_a_table(cell, head):
    frame = pd.DataFrame({"a" + head: [cell]})
    assert Tags(styled(frame).to_html()).found <= {
        "style",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    lines = markdown(frame).strip("\n").split("\n")
    assert len(lines) == 3
    assert [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines] == [2, 2, 2]
    assert latex(frame).count(r"\\") == 2


def test_best_is_bold_everywhere_and_files_are_written(tmp_path):
    frame = fake_run.tables()["table1"]
    best = frame[frame["best"]].iloc[0]
    text = f"{best['value']:.2f} [{best['low']:.2f}, {best['high']:.2f}]"
    assert "font-weight: bold" in styled(frame).to_html()
    save_table(frame, tmp_path / "table1", "All of it")
    assert f"**{text}†**" in (tmp_path / "table1.md").read_text(encoding="utf-8")
    tex = (tmp_path / "table1.tex").read_text(encoding="utf-8")
    assert rf"\bfseries {text}$^\dagger$" in tex and r"\caption{All of it}" in tex
    assert styled(frame, "a").to_html() == styled(frame, "a").to_html()
    assert styled(frame, "a").uuid != styled(frame, "b").uuid  # two on a page do not mix
