"""Rates: the compliance-safety plane, forms, cost."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dcr.plots.common import need, new_axes
from dcr.style import METHOD_COLOURS, METHOD_LINES, METHOD_MARKERS, look


def plane(points: pd.DataFrame) -> Figure:
    """The compliance-safety plane: each method's checkpoints as a curve, the last one filled (columns dsr, compliance)."""
    need(points, "method", "step", "dsr", "compliance")
    with look():
        figure, axes = new_axes(5.4, 4.4)
        ax = axes[0, 0]
        for method, rows in points.groupby("method", sort=False):
            rows = rows.sort_values("step")
            colour, marker = METHOD_COLOURS.get(method, "#333333"), METHOD_MARKERS.get(method, "o")
            ax.plot(rows["dsr"], rows["compliance"], METHOD_LINES.get(method, "-") if isinstance(METHOD_LINES.get(method), str)
                    else "-", color=colour, marker=marker, markerfacecolor="white", markersize=5, label=method)
            ax.plot(rows["dsr"].iloc[-1], rows["compliance"].iloc[-1], marker=marker, color=colour, markersize=9)
        ax.set(xlabel="defence success rate (mean over toxic sets)", ylabel="compliance (mean over seemingly toxic sets)",
               xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), title="Compliance against safety")
        ax.legend(loc="lower left")
    return figure


def rates_by_form(rows: pd.DataFrame) -> Figure:
    """Refusal rate of each method by benchmark and form of the prompt: where form decides, the markers part."""
    part = rows[(rows["metric"] == "refusal_rate") & rows["form"].isin(["question", "imperative"])]
    need(part, "method", "benchmark", "form", "value")
    names = list(dict.fromkeys(part["benchmark"]))
    methods = [m for m in dict.fromkeys(part["method"])]
    with look():
        figure, axes = new_axes(2.3 * len(methods) + 1.4, 0.33 * len(names) + 1.6, 1, len(methods), sharey=True)
        for ax, method in zip(axes[0], methods, strict=True):
            for form, marker, shift, colour in (("question", "o", -0.14, "#0072B2"), ("imperative", "s", 0.14, "#D55E00")):
                mine = part[(part["method"] == method) & (part["form"] == form)].set_index("benchmark").reindex(names)
                y = np.arange(len(names)) + shift
                error = np.clip([mine["value"] - mine["low"], mine["high"] - mine["value"]], 0, None)
                ax.errorbar(mine["value"], y, xerr=error, fmt=marker, color=colour, markersize=4, elinewidth=0.8, label=form)
            ax.set(title=method, xlim=(-0.05, 1.05), yticks=range(len(names)), yticklabels=names)
            ax.set_xticks([0, 0.5, 1])
        axes[0, 0].invert_yaxis()
        figure.supxlabel("refusal rate (95 % Wilson interval)", fontsize=10)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def cost(table: pd.DataFrame) -> Figure:
    """Seconds of each stage by method, stacked."""
    need(table, "name", "kind", "seconds")
    wide = table.pivot_table(index="name", columns="kind", values="seconds", aggfunc="sum").fillna(0)
    with look():
        figure, axes = new_axes(6, 0.4 * len(wide) + 1.4)
        left = np.zeros(len(wide))
        for kind, colour in zip(wide.columns, ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999"), strict=False):
            axes[0, 0].barh(wide.index, wide[kind], left=left, color=colour, edgecolor="black", linewidth=0.5, label=kind)
            left += wide[kind].to_numpy()
        axes[0, 0].set(xlabel="wall time (s)", title="What each method cost")
        axes[0, 0].legend()
    return figure
