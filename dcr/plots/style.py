"""One look for every figure: seaborn, colour-blind-safe, one colour and line per method and per prompt class."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe-Ito colours: told apart with any colour vision; line and marker tell them apart in grey.
METHOD_COLOURS = {
    "base": "#7f7f7f",
    "STL": "#D55E00",
    "STL-aug": "#E69F00",
    "STL-tuned": "#8C510A",
    "DCR": "#0072B2",
    "DCR-matched": "#56B4E9",
    "DCR-keep": "#009E73",
    "DCR-sham": "#999933",
    "DCR-tuned": "#000000",
    "SCANS": "#CC79A7",
    "Surgical": "#882255",
    "SelfCD": "#44AA99",
    "question-mark": "#333333",
}
METHOD_LINES = {
    m: s
    for m, s in zip(
        METHOD_COLOURS,
        [(0, (1, 1)), "-", "--", "-.", "-", "--", "-.", ":", "-", "-.", "--", ":", (0, (5, 1))],
        strict=True,
    )
}
METHOD_MARKERS = dict(zip(METHOD_COLOURS, "o s D d ^ v P X * < > h p".split(), strict=True))
CLASS_COLOURS = {"toxic": "#D55E00", "seemingly_toxic": "#0072B2", "general": "#009E73"}
CLASS_LINES = {"toxic": "-", "seemingly_toxic": "--", "general": ":"}
CLASS_HATCHES = {
    "seemingly_toxic": "//",
    "general": "..",
    "toxic": "",
}  # in the order that bars are shown
CLASS_MARKERS = {"toxic": "o", "seemingly_toxic": "^", "general": "s"}
FORM_COLOURS = {"question": "#0072B2", "imperative": "#D55E00"}
FORM_MARKERS = {"question": "o", "imperative": "s"}
CLASS_NAMES = {"toxic": "toxic", "seemingly_toxic": "seemingly toxic", "general": "general"}
DPI = 160  # of saved PNGs
SALT = "dcr-kit"  # fixes the ids inside SVG files


def method_look(method: str) -> dict[str, object]:
    """Fixed colour, line style and marker of a method, as keyword arguments of `Axes.plot`; a new name gets its own, always the same."""
    if method in METHOD_COLOURS:
        return {
            "color": METHOD_COLOURS[method],
            "linestyle": METHOD_LINES[method],
            "marker": METHOD_MARKERS[method],
        }
    code = zlib.crc32(method.encode())
    return {
        "color": sns.husl_palette(17, l=0.45).as_hex()[code % 17],
        "linestyle": ("-", "--", "-.", ":")[code % 4],
        "marker": "dH8s^v"[code % 6],
    }


def in_order(methods: Iterable[str]) -> list[str]:
    """Methods once each, in the fixed order of the legend; unknown names last, as they came."""
    known = list(METHOD_COLOURS)
    return sorted(
        dict.fromkeys(methods), key=lambda m: known.index(m) if m in known else len(known)
    )


@contextlib.contextmanager
def look() -> Iterator[None]:
    """Style for one figure; leaves the caller's settings as they were."""
    with (
        sns.plotting_context("paper", font_scale=1.15),
        sns.axes_style("whitegrid"),
        matplotlib.rc_context(
            {
                "svg.hashsalt": SALT,
                "svg.fonttype": "none",
                "figure.dpi": 110,
                "savefig.dpi": DPI,
                "axes.titlesize": 11,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "legend.frameon": False,
                "legend.fontsize": 9,
                "font.family": "DejaVu Sans",
            }
        ),
    ):
        yield


def picture(figure: Figure, kind: str) -> bytes:
    """The figure's bytes as "png" or "svg", the same for the same data on one machine."""
    if (
        figure.get_layout_engine() is not None
    ):  # settled once and kept: a later pass moves things by fractions of a point
        shown = figure.dpi
        figure.set_dpi(
            DPI
        )  # as it is saved: text is a little wider or narrower at another resolution
        for _ in range(2):  # rotated and long tick labels are known only after the first pass
            FigureCanvasAgg(figure).draw()
        figure.set_dpi(shown)
        figure.set_layout_engine("none")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": SALT, "svg.fonttype": "none"}):
        figure.savefig(
            buffer,
            format=kind,
            dpi=DPI,
            metadata={"Date": None} if kind == "svg" else {"Software": None},
        )
    return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write `<path>.png` and `<path>.svg` atomically."""
    from dcr.data.files import write_atomic

    written = []
    for kind in ("png", "svg"):
        target = Path(f"{path}.{kind}")
        write_atomic(target, picture(figure, kind))
        written.append(target)
    return written
