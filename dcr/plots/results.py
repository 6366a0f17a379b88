"""Rates: the compliance-safety plane, forms, the shortcut, cost."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dcr.plots.common import half_widths, need, new_axes, one_legend, panels
from dcr.plots.style import (
    CLASS_COLOURS,
    CLASS_HATCHES,
    CLASS_NAMES,
    FORM_COLOURS,
    FORM_MARKERS,
    in_order,
    look,
    method_look,
)

WEIGHTS = {"all": "published sets", "balanced": "questions and imperatives\nweighted equally"}


def plane(points: pd.DataFrame) -> Figure:
    """The compliance-safety plane: each method's checkpoints or strengths as a curve, the last or nominal one filled, with its intervals.

    Columns method, step (-1: the last), dsr, compliance; optional nominal, dsr_low ... compliance_high and `weights` (a panel each).
    """
    need(points, "method", "step", "dsr", "compliance")
    points = points.assign(weights=points.get("weights", "all"))
    names = [w for w in (*WEIGHTS, *points["weights"]) if w in set(points["weights"])]
    names = list(dict.fromkeys(names))
    with look():
        figure, axes = new_axes(
            max(4.6, 3.7 * len(names)), 4.9, 1, len(names), sharex=True, sharey=True
        )
        for ax, name in zip(axes[0], names, strict=True):
            part = points[points["weights"] == name]
            for method in in_order(part["method"]):
                _curve(ax, method, part[part["method"] == method])
            ax.set(
                xlim=(-0.03, 1.03),
                ylim=(-0.03, 1.03),
                title=WEIGHTS.get(name, name) if len(names) > 1 else "Compliance against safety",
                xlabel="defence success rate\n(mean over toxic sets)",
                aspect="equal",
            )
        axes[0, 0].set_ylabel("compliance\n(mean over seemingly toxic sets)")
        one_legend(figure, axes[0], 5 if len(names) > 1 else 3)
    return figure


def _curve(ax, method: str, rows: pd.DataFrame) -> None:
    """One method: open markers on its way, a filled one with its interval where it is known by."""
    rows = rows.assign(order=rows["step"].replace(-1, np.iinfo("int64").max)).sort_values("order")
    known = (
        rows[rows["nominal"].astype(bool)] if "nominal" in rows and rows["nominal"].any() else rows
    )
    style, last = method_look(method), known.iloc[-1]
    ax.plot(
        rows["dsr"],
        rows["compliance"],
        **style,
        markerfacecolor="white",
        markersize=3.5,
        linewidth=1.2,
        markeredgewidth=0.8,
        label=method,
    )
    if "dsr_low" in rows:
        spread = {
            axis: [[max(0, last[n] - last[f"{n}_low"])], [max(0, last[f"{n}_high"] - last[n])]]
            for axis, n in (("xerr", "dsr"), ("yerr", "compliance"))
        }
        ax.errorbar(
            [last["dsr"]],
            [last["compliance"]],
            **spread,
            color=style["color"],
            elinewidth=0.9,
            fmt="none",
        )
    ax.plot(
        [last["dsr"]],
        [last["compliance"]],
        marker=style["marker"],
        color=style["color"],
        markersize=7.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        linestyle="none",
        zorder=5,
    )


def rates_by_form(rows: pd.DataFrame) -> Figure:
    """Refusal rate of each method by benchmark and form of the prompt: where form decides, the markers part."""
    need(rows, "method", "benchmark", "form", "value", "metric")
    part = rows[(rows["metric"] == "refusal_rate") & rows["form"].isin(list(FORM_COLOURS))]
    need(part, "method", "benchmark", "form", "value")
    names, methods = list(dict.fromkeys(part["benchmark"])), in_order(part["method"])
    with look():
        figure, axes = panels(
            len(methods), 0.2 * len(names) + 0.5, width=1.75, extra=1.3, sharey=True, sharex=True
        )
        for ax, method in zip(axes, methods, strict=True):
            for form, shift in (("question", -0.15), ("imperative", 0.15)):
                mine = (
                    part[(part["method"] == method) & (part["form"] == form)]
                    .set_index("benchmark")
                    .reindex(names)
                )
                ax.errorbar(
                    mine["value"],
                    np.arange(len(names)) + shift,
                    xerr=half_widths(mine),
                    fmt=FORM_MARKERS[form],
                    color=FORM_COLOURS[form],
                    markersize=3.5,
                    elinewidth=0.8,
                    label=form,
                )
            ax.set(title=method, xlim=(-0.05, 1.05), ylim=(len(names) - 0.5, -0.5))
            ax.set_yticks(range(len(names)), names, fontsize=8)
            ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        figure.supxlabel("refusal rate", fontsize=10)
        one_legend(figure, axes, where="upper")
    return figure


def shortcut(shares: pd.DataFrame, rates: pd.DataFrame) -> Figure:
    """Share of questions in each benchmark, beside each method's refusal of its questions (Q) and of its imperatives (I).

    shares: set, label, question_share. rates: benchmark, method, form, value (refusal rate). Grey cells: no such prompts.
    """
    need(shares, "set", "label", "question_share")
    need(rates, "benchmark", "method", "form", "value")
    order = [
        c
        for label in CLASS_HATCHES
        for c in shares.loc[shares["label"] == label, "set"]
        if c in set(rates["benchmark"])
    ]
    shares, methods = (
        shares.drop_duplicates("set").set_index("set").loc[order],
        in_order(rates["method"]),
    )
    wide = rates.pivot_table(index=["benchmark", "form"], columns="method", values="value").reindex(
        index=pd.MultiIndex.from_product([order, FORM_COLOURS]), columns=methods
    )
    middle = 2 * np.arange(len(order)) + 1
    with look():
        figure, axes = new_axes(
            3.0 + 0.36 * max(6, len(methods)),
            0.36 * len(order) + 2.1,
            1,
            2,
            width_ratios=[1.5, 0.36 * max(6, len(methods))],
            sharey=True,
        )
        bars = axes[0, 0].barh(
            middle, shares["question_share"], edgecolor="black", linewidth=0.5, height=1.3
        )
        for bar, label in zip(bars, shares["label"], strict=True):
            bar.set(
                facecolor=CLASS_COLOURS[label], hatch=CLASS_HATCHES[label], label=CLASS_NAMES[label]
            )
        axes[0, 0].set(xlim=(0, 1.02), xlabel="share of questions\nin the set", xticks=[0, 0.5, 1])
        sns.heatmap(
            wide,
            ax=axes[0, 1],
            vmin=0,
            vmax=1,
            cmap="Blues",
            annot=True,
            fmt=".2f",
            annot_kws={"fontsize": 6.5},
            cbar=False,
            linewidths=0.4,
            linecolor="white",
            yticklabels=False,
        )
        axes[0, 1].hlines(middle[:-1] + 1, 0, len(methods), color="black", linewidth=0.7)
        for i, row in enumerate(wide.index):
            axes[0, 1].text(-0.08, i + 0.5, row[1][0].upper(), ha="right", va="center", fontsize=7)
        axes[0, 1].set(
            title="refusal rate of questions (Q)\nand imperatives (I)",
            xlabel="",
            ylabel="",
            facecolor="#dddddd",
        )
        axes[0, 1].set_xticklabels(
            methods, rotation=60, ha="right", rotation_mode="anchor", fontsize=8.5
        )
        axes[0, 1].grid(False)
        axes[0, 0].set_yticks(middle, order, fontsize=8.5)
        axes[0, 0].set_ylim(2 * len(order), 0)
        axes[0, 0].grid(False, axis="y")
        handles = {bar.get_label(): bar for bar in bars}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3)
    return figure


def cost(table: pd.DataFrame) -> Figure:
    """Seconds of each stage by method, stacked."""
    need(table, "name", "kind", "seconds")
    wide = table.pivot_table(index="name", columns="kind", values="seconds", aggfunc="sum").fillna(
        0
    )
    wide = wide.reindex(in_order(wide.index))
    kinds = [k for k in ("refine", "align", "steer", "generate") if k in wide] + [
        k for k in wide if k not in ("refine", "align", "steer", "generate")
    ]
    looks = (
        ("#0072B2", ""),
        ("#E69F00", "//"),
        ("#009E73", ".."),
        ("#CC79A7", "xx"),
        ("#56B4E9", "--"),
        ("#999999", ""),
    )
    with look():
        figure, axes = new_axes(6, 0.3 * len(wide) + 1.5)
        left = np.zeros(len(wide))
        for kind, (colour, hatch) in zip(kinds, looks, strict=False):
            axes[0, 0].barh(
                wide.index,
                wide[kind],
                left=left,
                color=colour,
                hatch=hatch,
                edgecolor="black",
                linewidth=0.5,
                label=kind,
            )
            left += wide[kind].to_numpy()
        axes[0, 0].set(xlabel="wall time (s)", title="What each method cost")
        axes[0, 0].invert_yaxis()
        one_legend(figure, axes[0])
    return figure
