"""Where methods differ: by category, by benchmark against STL, by judge, by ablated setting; similarity before and after."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dcr.plots.common import half_widths, need, new_axes, panels
from dcr.plots.style import CLASS_NAMES, in_order, look, method_look

MOST = 24  # categories a class in the heat map


def categories(table: pd.DataFrame) -> Figure:
    """Heat map of refusal rates, category × method, harmless categories beside toxic ones (the most frequent of each)."""
    need(table, "method", "label", "category", "value", "n")
    labels = [c for c in ("seemingly_toxic", "toxic") if c in set(table["label"])]
    methods = in_order(table["method"])
    blocks = []
    for label in labels:
        part = table[table["label"] == label].assign(hits=lambda t: t["value"] * t["n"])
        pooled = part.groupby(["category", "method"], sort=False)[["hits", "n"]].sum()
        n = (
            pooled["n"]
            .groupby("category")
            .max()
            .sort_values(ascending=False, kind="stable")
            .head(MOST)
        )
        rate = (pooled["hits"] / pooled["n"]).unstack().reindex(index=n.index, columns=methods)
        rate.index = [
            f"{textwrap.shorten(str(c), 40, placeholder=' …')} ({int(k)})" for c, k in n.items()
        ]
        blocks.append(rate)
    rows = [len(b) for b in blocks]
    with look():
        figure, axes = new_axes(
            2.9 + 0.37 * max(4, len(methods)),
            0.2 * sum(rows) + 0.5 * len(rows) + 0.9,
            len(rows),
            1,
            height_ratios=rows,
            sharex=True,
        )
        for ax, label, rate in zip(axes[:, 0], labels, blocks, strict=True):
            sns.heatmap(
                rate,
                ax=ax,
                vmin=0,
                vmax=1,
                cmap="Blues",
                annot=True,
                fmt=".2f",
                annot_kws={"fontsize": 6.5},
                cbar=False,
                linewidths=0.4,
                linecolor="white",
                yticklabels=True,
            )
            ax.set(title=f"{CLASS_NAMES[label]}: refusal rate", xlabel="", ylabel="")
            ax.tick_params(axis="y", labelsize=7.5)
            ax.grid(False)
        axes[-1, 0].set_xticklabels(
            methods, rotation=60, ha="right", rotation_mode="anchor", fontsize=8
        )
    return figure


def differences(table: pd.DataFrame) -> Figure:
    """Forest plot: paired difference of each method to STL on every benchmark (95 % bootstrap), a panel a method.

    Right of the line is better on every row: compliance on harmless sets, DSR on toxic ones (grey rows).
    """
    need(table, "method", "benchmark", "metric", "difference", "low", "high")
    names, methods = list(dict.fromkeys(table["benchmark"])), in_order(table["method"])
    toxic = set(table.loc[table["metric"] == "dsr", "benchmark"])
    reach = float(np.nanmax(np.abs(table[["low", "high"]].to_numpy()))) * 1.08 + 0.02
    with look():
        figure, axes = panels(
            len(methods), 0.2 * len(names) + 0.5, width=1.75, extra=1.3, sharey=True, sharex=True
        )
        for ax, method in zip(axes, methods, strict=True):
            mine = (
                table[table["method"] == method]
                .drop_duplicates("benchmark")
                .set_index("benchmark")
                .reindex(names)
            )
            for i, name in enumerate(names):
                if name in toxic:
                    ax.axhspan(i - 0.5, i + 0.5, color="#ececec", linewidth=0, zorder=0)
            style = method_look(method)
            ax.errorbar(
                mine["difference"],
                range(len(names)),
                xerr=half_widths(mine, "difference"),
                fmt=style["marker"],
                color=style["color"],
                markersize=4,
                elinewidth=0.9,
            )
            ax.axvline(0, color="black", linewidth=0.9)
            ax.set(title=method, xlim=(-reach, reach), ylim=(len(names) - 0.5, -0.5))
            ax.set_yticks(range(len(names)), names, fontsize=8)
        figure.supxlabel("difference to STL (compliance; DSR on grey rows)", fontsize=10)
    return figure


def similarity(table: pd.DataFrame) -> Figure:
    """Before and after refinement: cosine at layer ℓ across and within classes, and the kernel between classes (paper figure 5).

    Columns method, measure, before, after.
    """
    need(table, "method", "measure", "before", "after")
    measures, methods = list(dict.fromkeys(table["measure"])), in_order(table["method"])
    with look():
        figure, axes = panels(
            len(measures), 0.28 * len(methods) + 0.9, across=3, width=2.5, extra=0.9, sharey=True
        )
        for ax, measure in zip(axes, measures, strict=True):
            part = (
                table[table["measure"] == measure]
                .drop_duplicates("method")
                .set_index("method")
                .reindex(methods)
            )
            for i, (method, row) in enumerate(part.iterrows()):
                colour = method_look(method)["color"]
                ax.plot([row["before"], row["after"]], [i, i], color=colour, linewidth=1.4)
                ax.plot(
                    [row["before"]],
                    [i],
                    "o",
                    color=colour,
                    markerfacecolor="white",
                    markersize=6.5,
                    label="before" if i == 0 else "",
                )
                ax.plot(
                    [row["after"]],
                    [i],
                    "D",
                    color=colour,
                    markersize=6,
                    label="after" if i == 0 else "",
                )
            ax.set(title=measure, ylim=(len(methods) - 0.5, -0.5))
            ax.set_yticks(range(len(methods)), methods)
        figure.supxlabel("similarity", fontsize=10)
        handles = [axes[0].lines[1], axes[0].lines[2]]
        figure.legend(handles, ["before", "after refinement"], loc="outside upper center", ncols=2)
    return figure
