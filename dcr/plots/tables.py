"""One table for people, four ways: a pandas Styler (HTML), Markdown, LaTeX (booktabs) and CSV.

A tidy frame with columns method, column, value (low, high, corrected, best, mark) is laid out a row
a method, "value / corrected" in a cell; any other is shown as it is. Every text is escaped for its
medium.
"""

import html
import re
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from dcr.data.files import content_key, write_atomic

KEYS = ("claim", "where", "source", "model", "method", "reading")  # what names a row
_MARKDOWN = re.compile(r"([\\`*_<>|]|\[(?![-+−]?\d))")  # "[0.79, 0.90]" opens no link
_TEX = {
    **{c: "\\" + c for c in "&%_#${}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"↑": r"$\uparrow$", "↓": r"$\downarrow$", "†": r"$^\dagger$", "ℓ": r"$\ell$"},
    **{"×": r"$\times$", "−": "$-$", "κ": r"$\kappa$", "≥": r"$\geq$"},
}
_STYLES: Any = [
    {"selector": "caption", "props": "caption-side: top; text-align: left; font-weight: bold"},
    {"selector": "td, th", "props": "text-align: left; padding: 2px 8px; max-width: 34em"},
]


def text_of(value: object) -> str:
    """A cell's text: "" for a missing value, two digits for a float."""
    if value is None or value != value:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _numbers(frame: pd.DataFrame, value: str, low: str, high: str) -> pd.Series:
    """ "0.44 [0.40, 0.48]" of each row; an unknown interval, or a missing value, is left out."""
    text = frame[value].map(text_of)
    for i in frame.index[frame[low].notna()] if low in frame else ():
        text[i] += f" [{frame[low][i]:.2f}, {frame[high][i]:.2f}]"
    return text


def layout(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(texts, which of them are best): a row a method, or the frame as it is, without its index."""
    if not {"column", "value"} <= set(frame):
        texts = frame.map(text_of)
        return texts, pd.DataFrame(False, texts.index, texts.columns)
    text = _numbers(frame, "value", "low", "high")
    if "corrected" in frame:
        beside = _numbers(frame, "corrected", "corrected_low", "corrected_high")
        text += (" / " + beside).where(beside != "", "")
    mark: Any = frame["mark"].fillna("").astype(str) if "mark" in frame else ""
    best: Any = frame["best"].astype(bool) if "best" in frame else False
    keys = [c for c in KEYS if c in frame]
    wide = frame.assign(text=text + mark, best=best).fillna(dict.fromkeys(keys, ""))
    wide = wide.pivot_table(
        index=keys, columns="column", values=["text", "best"], sort=False, aggfunc="first"
    )
    order = list(dict.fromkeys(frame["column"]))
    cells = wide["text"][order].fillna("").reset_index().rename_axis(columns=None)
    return cells, wide["best"][order].reset_index().isin([True])


def styled(frame: pd.DataFrame, caption: str = "") -> Styler:
    """The table for a notebook or a page: escaped, best values bold, the same HTML every time."""
    texts, bold = layout(frame)
    style = texts.style.format(escape="html").format_index(escape="html", axis=1)
    weight = bold.map(lambda b: "font-weight: bold" if b else "")
    style = style.apply(lambda _: weight, axis=None).hide(axis="index")
    style = style.set_uuid(content_key(caption))
    return style.set_caption(html.escape(caption)).set_table_styles(_STYLES)


def markdown(frame: pd.DataFrame, caption: str = "") -> str:
    """A Markdown table below its caption; no text in it opens markup."""

    def plain(value: object) -> str:
        return _MARKDOWN.sub(r"\\\1", " ".join(str(value).split()))

    texts, bold = layout(frame)
    cells = texts.map(plain)
    cells = cells.mask(bold & (cells != ""), "**" + cells + "**").rename(columns=plain)
    table = cells.to_markdown(index=False, disable_numparse=True)
    return f"**{plain(caption)}**\n\n{table}\n" if caption else f"{table}\n"


def latex(frame: pd.DataFrame, caption: str = "") -> str:
    """A LaTeX table (booktabs); no text in it is a command."""

    def plain(value: object) -> str:
        return "".join(_TEX.get(c, c) for c in str(value))

    texts, bold = layout(frame)
    weight = bold.map(lambda b: "font-weight: bold" if b else "").rename(columns=plain)
    style = texts.map(plain).rename(columns=plain).style.hide(axis="index")
    style = style.apply(lambda _: weight, axis=None)
    return style.to_latex(hrules=True, convert_css=True, caption=plain(caption) or None)


def save_table(frame: pd.DataFrame, path: str | Path, caption: str = "") -> None:
    """Write `<path>.md` and `<path>.tex`."""
    write_atomic(Path(f"{path}.md"), markdown(frame, caption))
    write_atomic(Path(f"{path}.tex"), latex(frame, caption))
