"""One table, four forms: styled for a notebook, an HTML fragment, Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pandas as pd

from dcr.data.files import write_atomic

BOLD = "**"  # stands around the best value of a column in every table's cells
_INTERVAL = re.compile(r" (\[-?[\d.]+, -?[\d.]+\])")
_TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "_": r"\_",
        "#": r"\#",
        "$": r"\$",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "†": r"$^\dagger$",
        "ℓ": r"$\ell$",
        "×": r"$\times$",
        "−": r"$-$",
    }
)


def text_of(value: object) -> str:
    """What a cell shows: "" for a missing value, two digits for a float."""
    return (
        ""
        if value is None or value != value
        else f"{value:.2f}"
        if isinstance(value, float)
        else str(value)
    )


def html_of(value: object) -> str:
    """Escaped text, with the best value in bold and the interval small on its own line."""
    safe = html.escape(text_of(value))
    safe = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", safe)
    return _INTERVAL.sub(r"<br><small>\1</small>", safe)


def tex_of(value: object) -> str:
    """LaTeX, with the best value in bold."""
    parts = text_of(value).translate(_TEX).split(BOLD)
    return "".join(rf"\textbf{{{p}}}" if i % 2 else p for i, p in enumerate(parts))


def styled(frame: pd.DataFrame, caption: str):
    """A pandas Styler for the notebook; every text is escaped, only our own bold and line breaks are markup."""
    plain = frame.map(html_of)
    plain.columns = [html.escape(str(c)) for c in plain.columns]
    if (
        plain.index.name
        or plain.index.dtype == object
        or pd.api.types.is_string_dtype(plain.index.dtype)
    ):
        plain.index = pd.Index([html.escape(str(i)) for i in plain.index], name=plain.index.name)
    return (
        plain.style.set_uuid("t")
        .set_caption(html.escape(caption))
        .set_table_styles(
            [
                {
                    "selector": "caption",
                    "props": "caption-side: top; text-align: left; font-weight: bold",
                },
                {
                    "selector": "td, th",
                    "props": "padding: 2px 8px; text-align: left; vertical-align: top",
                },
            ]
        )
    )


def fragment(frame: pd.DataFrame) -> str:
    """An HTML table, escaped, for the report."""
    named = frame.reset_index() if frame.index.name else frame
    return (
        named.map(html_of)
        .rename(columns=lambda c: html.escape(str(c)))
        .to_html(index=False, border=0, escape=False)
    )


def save_table(frame: pd.DataFrame, path: Path, caption: str) -> None:
    """Write `<path>.csv`, `.md` and `.tex` (booktabs)."""
    write_atomic(path.with_suffix(".csv"), frame.to_csv())
    head = [str(frame.index.name or ""), *map(str, frame.columns)]
    rows = [
        [str(i), *(text_of(v) for v in row)]
        for i, row in zip(frame.index, frame.to_numpy().tolist(), strict=True)
    ]
    lines = [
        "| " + " | ".join(c.replace("|", r"\|") for c in row) + " |"
        for row in [head, ["---"] * len(head), *rows]
    ]
    write_atomic(path.with_suffix(".md"), "\n".join([f"**{caption}**", "", *lines]) + "\n")
    tex = [
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{tex_of(caption)}}}",
        rf"\begin{{tabular}}{{{'l' * len(head)}}}",
        r"\toprule",
        " & ".join(map(tex_of, head)) + r" \\",
        r"\midrule",
        *(" & ".join(map(tex_of, row)) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    write_atomic(path.with_suffix(".tex"), "\n".join(tex) + "\n")
