"""Evaluation beyond rates: matched safety, the refusal-bias frontier, robustness to wrappers, general ability."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dcr.plots.common import need, new_axes
from dcr.plots.style import (
    CLASS_COLOURS,
    CLASS_NAMES,
    METHOD_COLOURS,
    METHOD_MARKERS,
    look,
    method_look,
)


def matched_safety(table: pd.DataFrame) -> Figure:
    """Compliance at each DSR with its interval, a row a method; what a curve does not reach is written, not drawn."""
    need(table, "method", "quantity", "target", "compliance", "low", "high", "reason")
    return _readings(
        table[table["quantity"] == "compliance"],
        "compliance",
        (0, 1.02),
        "compliance, balanced over sets and forms (95 % bootstrap interval)",
    )


def matched_differences(table: pd.DataFrame) -> Figure:
    """Paired difference of compliance at each DSR, and of the area, to another method; right of the line is better."""
    need(table, "method", "against", "quantity", "target", "difference", "low", "high", "reason")
    reach = np.nanmax(np.abs(table[["low", "high"]].to_numpy()), initial=0.1) * 1.08
    return _readings(
        table,
        "difference",
        (-reach, reach),
        f"difference to {', '.join(table['against'].unique())} (95 % bootstrap interval, paired)",
    )


def _readings(table: pd.DataFrame, value: str, limits: tuple[float, float], across: str) -> Figure:
    table = table.assign(
        title=[
            "area under the curve" if np.isnan(t) else f"at DSR {t:.2f}" for t in table["target"]
        ]
    )
    methods, titles = (
        list(dict.fromkeys(table["method"])),
        list(dict.fromkeys(table.sort_values("target", kind="stable")["title"])),
    )
    with look():
        figure, axes = new_axes(
            3.4 * len(titles) + 1.2, 0.36 * len(methods) + 1.4, 1, len(titles), sharey=True
        )
        for ax, title in zip(axes[0], titles, strict=True):
            for row in table[table["title"] == title].to_dict("records"):
                style, y = method_look(row["method"]), methods.index(row["method"])
                if np.isfinite(row[value]):
                    error = np.clip(
                        [[row[value] - row["low"]], [row["high"] - row[value]]], 0, None
                    )
                    ax.errorbar(
                        row[value],
                        y,
                        xerr=error,
                        fmt=style["marker"],
                        color=style["color"],
                        capsize=3,
                    )
                else:
                    ax.text(
                        limits[0] + 0.02 * (limits[1] - limits[0]),
                        y,
                        _short(row["reason"]),
                        va="center",
                        fontsize=8,
                        color="#555555",
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                    )
            if limits[0] < 0:
                ax.axvline(0, color="black", linewidth=0.9, zorder=0)
            ax.set(xlim=limits, yticks=range(len(methods)), yticklabels=methods, title=title)
        axes[0, 0].set_ylim(len(methods) - 0.5, -0.5)
        figure.supxlabel(across, fontsize=10)
    return figure


def _short(reason: str) -> str:
    """Over several seeds each names itself: how many did not reach it is what fits."""
    parts = str(reason).split("; ")
    return (
        reason
        if len(parts) == 1
        else f"not reached by {len({p.split(': not')[0] for p in parts})} curves"
    )


def bias_frontier(table: pd.DataFrame) -> Figure:
    """Compliance against DSR as refusal openings are made likelier or less likely; the model as it is, filled."""
    need(table, "method", "bias", "dsr", "compliance")
    with look():
        figure, axes = new_axes(5.4, 4.4)
        ax = axes[0, 0]
        for method, rows in table.groupby("method", sort=False):
            rows, colour = rows.sort_values("bias"), METHOD_COLOURS.get(method, "#333333")
            ax.plot(
                rows["dsr"],
                rows["compliance"],
                color=colour,
                marker=METHOD_MARKERS.get(method, "o"),
                markersize=3.5,
                markerfacecolor="white",
                label=method,
            )
            own = rows[rows["bias"] == 0]
            ax.plot(
                own["dsr"],
                own["compliance"],
                color=colour,
                marker=METHOD_MARKERS.get(method, "o"),
                markersize=9,
            )
        ax.plot(
            [0, 1], [1, 0], color="#999999", linewidth=0.8, linestyle=":", label="blind to harm"
        )
        ax.set(
            xlabel="defence success rate",
            ylabel="compliance",
            xlim=(-0.03, 1.03),
            ylim=(-0.03, 1.03),
            title="Refusal-bias sweep (no training)",
        )
        ax.legend()
    return figure


def robustness(table: pd.DataFrame) -> Figure:
    """Refusal rate of both classes under each wrapper, a panel a method."""
    need(table, "method", "label", "wrapper", "refusal_rate", "low", "high")
    methods, wrappers = list(dict.fromkeys(table["method"])), list(dict.fromkeys(table["wrapper"]))
    with look():
        figure, axes = new_axes(
            2.4 * len(methods) + 1.2, 0.4 * len(wrappers) + 1.8, 1, len(methods), sharey=True
        )
        for ax, method in zip(axes[0], methods, strict=True):
            for label, shift, marker in (("toxic", -0.13, "o"), ("seemingly_toxic", 0.13, "s")):
                mine = (
                    table[(table["method"] == method) & (table["label"] == label)]
                    .set_index("wrapper")
                    .reindex(wrappers)
                )
                error = np.clip(
                    [mine["refusal_rate"] - mine["low"], mine["high"] - mine["refusal_rate"]],
                    0,
                    None,
                )
                ax.errorbar(
                    mine["refusal_rate"],
                    np.arange(len(wrappers)) + shift,
                    xerr=error,
                    fmt=marker,
                    markersize=4,
                    color=CLASS_COLOURS[label],
                    elinewidth=0.8,
                    label=CLASS_NAMES[label],
                )
            ax.set(
                title=method,
                xlim=(-0.05, 1.05),
                yticks=range(len(wrappers)),
                yticklabels=wrappers,
                xticks=[0, 0.5, 1],
            )
        axes[0, 0].invert_yaxis()
        figure.supxlabel("refusal rate (95 % Wilson interval)", fontsize=10)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def ability(table: pd.DataFrame) -> Figure:
    """Change of general ability against the base model: accuracy in points, perplexity as a ratio."""
    need(table, "method", "task", "metric", "change", "change_low", "change_high")
    rows = table[(table["method"] != "base") & table["metric"].isin(["acc", "perplexity"])]
    need(rows, "method")
    panels = [
        (m, rows[rows["metric"] == m]) for m in ("acc", "perplexity") if (rows["metric"] == m).any()
    ]
    with look():
        figure, axes = new_axes(
            4.4 * len(panels) + 0.6, 0.3 * max(len(p) for _, p in panels) + 1.6, 1, len(panels)
        )
        for ax, (metric, part) in zip(axes[0], panels, strict=True):
            names = [f"{r.method}, {r.task}" for r in part.itertuples()]
            for y, row in enumerate(part.itertuples()):
                error = np.clip(
                    [[row.change - row.change_low], [row.change_high - row.change]], 0, None
                )
                ax.errorbar(
                    row.change,
                    y,
                    xerr=error,
                    fmt=METHOD_MARKERS.get(row.method, "o"),
                    capsize=3,
                    color=METHOD_COLOURS.get(row.method, "#333333"),
                )
            ax.axvline(1 if metric == "perplexity" else 0, color="#999999", linewidth=0.8)
            ax.set(
                yticks=range(len(names)),
                yticklabels=names,
                xlabel="perplexity ratio to base"
                if metric == "perplexity"
                else "accuracy change to base",
            )
            ax.set_ylim(len(names) - 0.5, -0.5)
            ax.locator_params(axis="x", nbins=4)
    return figure
