"""How well scores order prompts by harm: refusal probability after alignment, and what can be read at ℓ before it."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dcr.plots.common import need, new_axes
from dcr.plots.style import FORM_COLOURS, FORM_MARKERS, in_order, look, method_look

READERS = {"refusal": "refusals of", "probe": "probe at ℓ,", "means": "class means at ℓ,"}


def harm_scores(auroc: pd.DataFrame, safety: pd.DataFrame) -> Figure:
    """A row a score: its AUROC (large, with its interval: forms averaged; small: each pair of forms), and what a threshold on it gives.

    auroc: reader, method, toxic_form, harmless_form, auroc, low, high. safety: method (READER@METHOD), target, compliance, low, high.
    """
    need(auroc, "reader", "method", "toxic_form", "harmless_form", "auroc", "low", "high")
    need(safety, "method", "quantity", "target", "compliance", "low", "high")
    order = [(r, m) for r in READERS for m in in_order(auroc.loc[auroc["reader"] == r, "method"])]
    target = safety["target"].min()
    read = safety[safety["target"] == target].set_index("method")
    with look():
        figure, axes = new_axes(7.2, 0.3 * len(order) + 1.9, 1, 2, sharey=True)
        for y, (reader, method) in enumerate(order):
            rows = auroc[(auroc["reader"] == reader) & (auroc["method"] == method)]
            for row in rows[rows["toxic_form"] != "balanced"].itertuples():
                axes[0, 0].scatter(
                    row.auroc,
                    y,
                    s=14,
                    marker=FORM_MARKERS[row.toxic_form],
                    facecolor=FORM_COLOURS[row.harmless_form],
                    alpha=0.75,
                    linewidth=0,
                    zorder=2,
                    label=f"toxic {row.toxic_form}s, harmless {row.harmless_form}s",
                )
            _dot(
                axes[0, 0],
                rows[rows["toxic_form"] == "balanced"].iloc[0],
                "auroc",
                y,
                method,
                reader,
            )
            if (name := f"{reader}@{method}") in read.index:
                _dot(axes[0, 1], read.loc[name], "compliance", y, method, reader)
        axes[0, 0].axvline(0.5, color="black", linewidth=0.9, zorder=0)
        axes[0, 0].set_yticks(range(len(order)), [f"{READERS[r]} {m}" for r, m in order])
        axes[0, 0].set(ylim=(len(order) - 0.5, -0.5), title="AUROC, toxic against\nseemingly toxic")
        axes[0, 1].set(
            xlim=(0, 1), title=f"compliance of a threshold\non the score, at DSR {target:.2f}"
        )
        shown = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
        figure.legend(
            shown.values(), shown.keys(), loc="outside lower center", ncols=2, fontsize=8.5
        )
    return figure


def _dot(ax, row: pd.Series, value: str, y: int, method: str, reader: str) -> None:
    style = method_look(method)
    error = np.clip([[row[value] - row["low"]], [row["high"] - row[value]]], 0, None)
    ax.errorbar(
        row[value],
        y,
        xerr=error,
        fmt=style["marker"],
        color=style["color"],
        capsize=3,
        zorder=3,
        markerfacecolor=style["color"] if reader == "refusal" else "white",
    )
