"""Where methods differ: by category, by benchmark against STL, by judge, by ablated setting; similarity before and after."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dcr.plots.common import half_widths, need, new_axes, one_legend, panels
from dcr.style import CLASS_NAMES, in_order, look, method_look

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
        n = pooled["n"].groupby("category").max().sort_values(ascending=False, kind="stable").head(MOST)
        rate = (pooled["hits"] / pooled["n"]).unstack().reindex(index=n.index, columns=methods)
        rate.index = [f"{textwrap.shorten(str(c), 40, placeholder=' …')} ({int(k)})" for c, k in n.items()]
        blocks.append(rate)
    rows = [len(b) for b in blocks]
    with look():
        figure, axes = new_axes(2.9 + 0.37 * max(4, len(methods)), 0.2 * sum(rows) + 0.5 * len(rows) + 0.9, len(rows), 1,
                                height_ratios=rows, sharex=True)
        for ax, label, rate in zip(axes[:, 0], labels, blocks, strict=True):
            sns.heatmap(rate, ax=ax, vmin=0, vmax=1, cmap="Blues", annot=True, fmt=".2f", annot_kws={"fontsize": 6.5}, cbar=False,
                        linewidths=0.4, linecolor="white", yticklabels=True)
            ax.set(title=f"{CLASS_NAMES[label]}: refusal rate", xlabel="", ylabel="")
            ax.tick_params(axis="y", labelsize=7.5)
            ax.grid(False)
        axes[-1, 0].set_xticklabels(methods, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
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
        figure, axes = panels(len(methods), 0.2 * len(names) + 0.5, width=1.75, extra=1.3, sharey=True, sharex=True)
        for ax, method in zip(axes, methods, strict=True):
            mine = table[table["method"] == method].drop_duplicates("benchmark").set_index("benchmark").reindex(names)
            for i, name in enumerate(names):
                if name in toxic:
                    ax.axhspan(i - 0.5, i + 0.5, color="#ececec", linewidth=0, zorder=0)
            style = method_look(method)
            ax.errorbar(mine["difference"], range(len(names)), xerr=half_widths(mine, "difference"), fmt=style["marker"],
                        color=style["color"], markersize=4, elinewidth=0.9)
            ax.axvline(0, color="black", linewidth=0.9)
            ax.set(title=method, xlim=(-reach, reach), ylim=(len(names) - 0.5, -0.5))
            ax.set_yticks(range(len(names)), names, fontsize=8)
        figure.supxlabel("difference to STL (compliance; DSR on grey rows)", fontsize=10)
    return figure


def judge_calibration(table: pd.DataFrame) -> Figure:
    """Agreement of each judge with human labels (Cohen's κ), a row for each model whose answers were labelled."""
    need(table, "judge", "model", "kappa", "low", "high")
    judges, models = list(dict.fromkeys(table["judge"])), list(dict.fromkeys(table["model"]))
    looks = list(zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), "os^Dv<>", strict=True))
    with look():
        figure, axes = new_axes(5.6, 0.16 * len(judges) * len(models) + 1.6)
        ax, spread = axes[0, 0], 0.7 / max(1, len(judges) - 1)
        for i, judge in enumerate(judges):
            mine = table[table["judge"] == judge].drop_duplicates("model").set_index("model").reindex(models)
            colour, marker = looks[i % len(looks)]
            ax.errorbar(mine["kappa"], np.arange(len(models)) + spread * (i - (len(judges) - 1) / 2), xerr=half_widths(mine, "kappa"),
                        fmt=marker, color=colour, markersize=4.5, elinewidth=0.9, label=judge)
        for i in range(1, len(models), 2):
            ax.axhspan(i - 0.5, i + 0.5, color="#ececec", linewidth=0, zorder=0)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set(xlabel="agreement with human labels (Cohen's κ)", title="Judges against people", ylim=(len(models) - 0.5, -0.5),
               xlim=(min(-0.05, float(table["low"].min()) - 0.03), 1.03))
        ax.set_yticks(range(len(models)), models)
        one_legend(figure, [ax], 3)
    return figure


def similarity(table: pd.DataFrame) -> Figure:
    """Before and after refinement: cosine at layer ℓ across and within classes, and the kernel between classes (paper figure 5).

    Columns method, measure, before, after.
    """
    need(table, "method", "measure", "before", "after")
    measures, methods = list(dict.fromkeys(table["measure"])), in_order(table["method"])
    with look():
        figure, axes = panels(len(measures), 0.28 * len(methods) + 0.9, across=3, width=2.5, extra=0.9, sharey=True)
        for ax, measure in zip(axes, measures, strict=True):
            part = table[table["measure"] == measure].drop_duplicates("method").set_index("method").reindex(methods)
            for i, (method, row) in enumerate(part.iterrows()):
                colour = method_look(method)["color"]
                ax.plot([row["before"], row["after"]], [i, i], color=colour, linewidth=1.4)
                ax.plot([row["before"]], [i], "o", color=colour, markerfacecolor="white", markersize=6.5, label="before" if i == 0 else "")
                ax.plot([row["after"]], [i], "D", color=colour, markersize=6, label="after" if i == 0 else "")
            ax.set(title=measure, ylim=(len(methods) - 0.5, -0.5))
            ax.set_yticks(range(len(methods)), methods)
        figure.supxlabel("similarity", fontsize=10)
        handles = [axes[0].lines[1], axes[0].lines[2]]
        figure.legend(handles, ["before", "after refinement"], loc="outside upper center", ncols=2)
    return figure
