"""One look for every figure: colour-blind safe, a colour, line and marker a method, the same bytes.

Colours are Okabe and Ito's, a hue a family of methods; line and marker tell members apart in grey.
A marker that two methods share is of hues far apart, to the colour-blind too.
"""

import functools
import io
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dcr.data.files import write_atomic
from dcr.errors import DCRError
from dcr.study.registry import figure

Look = dict[str, Any]  # keyword arguments of `Axes.plot`: color, linestyle, marker
DASHES = ("-", "--", "-.", ":")
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C510A")
MARKERS = "osD^vPX<"
METHODS = {
    "base": ("#7f7f7f", "o"),
    "STL": ("#D55E00", "s"),
    "STL-aug": ("#E69F00", "D"),
    "STL-audited": ("#8C510A", "d"),
    "STL-pairs": ("#C9A000", "p"),
    "STL-token": ("#A50F15", ">"),
    "STL-pairs-token": ("#7F6000", (4, 1, 0)),
    "STL-routed": ("#4A2400", (8, 1, 0)),
    "DCR": ("#0072B2", "^"),
    "DCR-matched": ("#56B4E9", "v"),
    "DCR-keep": ("#08306B", "<"),
    "DCR-sham": ("#8DA0CB", (5, 0, 180)),
    "DCR-token": ("#4040E0", "H"),
    "SCANS": ("#CC79A7", "X"),
    "Surgical": ("#882255", "8"),
    "Gate": ("#009E73", "h"),
    "Token+Gate": ("#1B5E20", "D"),
    "Token+Gate-base": ("#66A61E", "P"),
    "Tied": ("#33A02C", "v"),
    "question-mark": ("#000000", "*"),
}
CLASSES: dict[Any, Look] = {
    "toxic": {"color": "#D55E00", "linestyle": "-", "marker": "o"},
    "seemingly_toxic": {"color": "#0072B2", "linestyle": "--", "marker": "^"},
    "general": {"color": "#009E73", "linestyle": ":", "marker": "s"},
}
FORMS: dict[Any, Look] = {
    "question": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "imperative": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "statement": {"color": "#009E73", "linestyle": ":", "marker": "^"},
}
SURE: dict[Any, Look] = {p: {"color": "#0072B2", "marker": "o"} for p in ("p < 0.05", "p ≥ 0.05")}
DPI = 160  # of saved PNGs
FIXED: Any = {"svg.hashsalt": "dcr-kit", "svg.fonttype": "none"}  # same ids and text in every SVG
STYLE: Any = FIXED | {
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.h_pad": 0.07,
    "figure.constrained_layout.w_pad": 0.07,
    "legend.fontsize": 9,
    "font.family": "DejaVu Sans",
}


def method_look(method: str) -> Look:
    """Fixed colour, line and marker of a method; a new name gets its own, always the same."""
    if method in METHODS:
        code, (colour, marker) = list(METHODS).index(method), METHODS[method]
    else:
        code = zlib.crc32(method.encode())
        colour = sns.husl_palette(17, l=0.45).as_hex()[code % 17]
        marker = "dH8s^v"[code % 6]
    return {"color": colour, "linestyle": DASHES[code % 4], "marker": marker}


def looks(names: Iterable[Any]) -> dict[Any, Look]:
    """The look of each name: of a class, form or method where they are such, else in turn."""
    names = list(names)
    for known in (CLASSES, FORMS, SURE):
        if set(names) <= set(known):
            return {n: known[n] for n in names}
    if set(names) & (set(METHODS) - {"question-mark"}):  # also the name of a baseline
        return {n: method_look(n) for n in names}
    mark = [MARKERS[(i + i // 8) % 8] for i in range(len(names))]  # a ninth is not the first again
    return {
        n: {"color": PALETTE[i % 8], "linestyle": DASHES[i % 4], "marker": mark[i]}
        for i, n in enumerate(names)
    }


def said(name: object) -> str:
    """A name as a reader reads it: "seemingly toxic"."""
    return str(name).replace("_", " ") if name in CLASSES else str(name)


def in_order(names: Iterable[Any]) -> list[Any]:
    """Names once each: methods and classes in their fixed order, others last, as they came."""
    place = {n: i for i, n in enumerate((*METHODS, *CLASSES, *SURE))}
    return sorted(dict.fromkeys(names), key=lambda n: place.get(n, len(place)))


def drawing(draw: Callable[[pd.DataFrame], Figure]) -> Callable[[pd.DataFrame], Figure]:
    """Register a figure under its function's name (no last "_"); its docstring is its caption.

    What is drawn raises DCRError for a missing column, no rows, or profiles that are mixed.
    """
    name = draw.__name__.removesuffix("_")

    @functools.wraps(draw)
    def styled(frame: pd.DataFrame) -> Figure:
        mixed = sorted(set(frame.get("profile", pd.Series(dtype=str)).astype(str)))
        if frame.empty or len(mixed) > 1:
            what = "its table has no rows" if frame.empty else f"profiles {', '.join(mixed)} mix"
            raise DCRError(f"figure {name}: {what}; make the table of one run again.")
        try:
            with (
                sns.plotting_context("paper", font_scale=1.15),
                sns.axes_style("whitegrid"),
                matplotlib.rc_context(STYLE),
            ):
                # A dollar is a dollar: what stands between two would be read as mathematics.
                return draw(frame.replace(r"\$", r"\\$", regex=True))
        except KeyError as error:
            raise DCRError(f"figure {name}: its table lacks {error}; make it again.") from error

    return figure(name, caption=" ".join((draw.__doc__ or "").split()))(styled)


class Shown(Figure):
    """A figure that a notebook shows without pyplot's global state: the bytes of the saved PNG."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        width, height = self.get_size_inches()
        return picture(self, "png"), {"width": round(100 * width), "height": round(100 * height)}


def picture(drawn: Figure, kind: str) -> bytes:
    """The figure's bytes as "png" or "svg", the same for the same data on one machine."""
    if drawn.get_layout_engine() is not None:
        # Settled once, at the resolution it is saved in, and kept: a later pass moves things by
        # fractions of a point. Twice, as rotated tick labels are known only after the first pass.
        shown = drawn.dpi
        drawn.set_dpi(DPI)
        for _ in range(2):
            FigureCanvasAgg(drawn).draw()
        drawn.set_dpi(shown)
        drawn.set_layout_engine("none")
    buffer = io.BytesIO()
    with matplotlib.rc_context(FIXED):
        undated: dict = {"Date": None} if kind == "svg" else {"Software": None}
        drawn.savefig(buffer, format=kind, dpi=DPI, metadata=undated)
    return buffer.getvalue()


def save(drawn: Figure, path: str | Path) -> None:
    """Write `<path>.png` and `<path>.svg` atomically."""
    for kind in ("png", "svg"):
        write_atomic(Path(f"{path}.{kind}"), picture(drawn, kind))
