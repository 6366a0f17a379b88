"""How far the classes lie apart, and how much of it is form."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from dcr.plots.common import need, new_axes
from dcr.plots.style import CLASS_COLOURS, CLASS_NAMES, look

PAIRING_COLOURS = {
    "sources (paper)": "#D55E00",
    "matched pairs": "#0072B2",
    "XSTest contrasts": "#009E73",
}


def question_shares(table: pd.DataFrame) -> Figure:
    """The shortcut: share of questions in each set, harmless sets beside toxic ones."""
    need(table, "set", "label", "question_share", "n")
    with look():
        figure, axes = new_axes(7, 0.32 * len(table) + 1.2)
        ax, rows = axes[0, 0], table.iloc[::-1]
        ax.barh(
            rows["set"],
            rows["question_share"],
            color=[CLASS_COLOURS[c] for c in rows["label"]],
            edgecolor="black",
            linewidth=0.6,
        )
        for bar, label, n in zip(ax.patches, rows["label"], rows["n"], strict=True):
            bar.set_hatch({"toxic": "", "seemingly_toxic": "//", "general": ".."}[label])
            ax.text(
                bar.get_width() + 0.01,
                bar.get_y() + bar.get_height() / 2,
                f"{bar.get_width():.2f}  (n={n})",
                va="center",
                fontsize=8,
            )
        ax.grid(False, axis="y")
        ax.set(
            xlim=(0, 1.22),
            xlabel="share of prompts that are questions",
            title="How many prompts of each set are questions",
        )
        handles = [
            FancyBboxPatch((0, 0), 1, 1, fc=CLASS_COLOURS[c], hatch=h)
            for c, h in (("toxic", ""), ("seemingly_toxic", "//"), ("general", ".."))
        ]
        figure.legend(
            handles,
            [CLASS_NAMES[c] for c in ("toxic", "seemingly_toxic", "general")],
            loc="outside lower center",
            ncols=3,
        )
    return figure


def separability_by_layer(probe: pd.DataFrame, surface: pd.DataFrame) -> Figure:
    """AUROC of a linear probe by layer, a panel a pairing, beside what the surface alone tells (dashed)."""
    need(probe, "layer", "auroc", "low", "high", "pairing")
    names = list(dict.fromkeys(probe["pairing"]))
    with look():
        figure, axes = new_axes(3.3 * len(names) + 0.8, 3.6, 1, len(names), sharey=True)
        for ax, name in zip(axes[0], names, strict=True):
            rows = probe[probe["pairing"] == name]
            colour = PAIRING_COLOURS.get(name, "#333333")
            ax.plot(
                rows["layer"], rows["auroc"], marker="o", color=colour, label="hidden state (probe)"
            )
            ax.fill_between(rows["layer"], rows["low"], rows["high"], color=colour, alpha=0.18)
            for (_, base), style in zip(
                surface[surface["pairing"] == name].iterrows(),
                ("--", ":", "-.", (0, (5, 1))),
                strict=False,
            ):
                ax.axhline(
                    base["auroc"],
                    color="black",
                    linestyle=style,
                    linewidth=1.1,
                    label=base["baseline"],
                )
            ax.axhline(0.5, color="#bbbbbb", linewidth=0.8)
            ax.set(title=name, xlabel="layer (blocks run)", ylim=(0, 1.03))
        axes[0, 0].set_ylabel("AUROC, toxic against\nseemingly toxic")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def transfer(table: pd.DataFrame) -> Figure:
    """AUROC of a probe on sets it was not trained on: below 0.5 it follows form, not harm."""
    need(table, "layer", "auroc", "pairing", "tested_on")
    with look():
        figure, axes = new_axes(8.4, 4.2, 1, table["pairing"].nunique(), sharey=True)
        tests = list(dict.fromkeys(table["tested_on"]))
        styles = dict(
            zip(tests, ("o-", "s--", "^:", "D-.", "v--", "P:", "X-", "p--"), strict=False)
        )
        colours = dict(
            zip(
                tests,
                (
                    "#D55E00",
                    "#56B4E9",
                    "#0072B2",
                    "#009E73",
                    "#CC79A7",
                    "#E69F00",
                    "#000000",
                    "#999933",
                ),
                strict=False,
            )
        )
        for ax, (name, part) in zip(axes[0], table.groupby("pairing", sort=False), strict=True):
            for tested, rows in part.groupby("tested_on", sort=False):
                line = ax.plot(
                    rows["layer"],
                    rows["auroc"],
                    styles[tested],
                    label=f"tested on {tested}",
                    color=colours[tested],
                )
                ax.fill_between(
                    rows["layer"], rows["low"], rows["high"], color=line[0].get_color(), alpha=0.15
                )
            ax.axhline(0.5, color="#bbbbbb", linewidth=0.8)
            ax.set(title=f"probe trained on {name}", xlabel="layer (blocks run)", ylim=(0, 1.03))
        axes[0, 0].set_ylabel("AUROC, toxic against\nseemingly toxic")
        handles = {
            label: h
            for ax in axes[0]
            for h, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    return figure


def map_2d(points: pd.DataFrame, colour: str = "label") -> Figure:
    """Prompts of one layer on their first two principal components, coloured by class, form or source."""
    need(points, "x", "y", colour)
    values = list(dict.fromkeys(points[colour]))
    palette = (
        CLASS_COLOURS
        if colour == "label"
        else dict(zip(values, ("#D55E00", "#0072B2", "#009E73", "#CC79A7"), strict=False))
    )
    with look():
        figure, axes = new_axes(5.2, 4.2)
        for value, marker in zip(values, "o^sDvP", strict=False):
            part = points[points[colour] == value]
            axes[0, 0].scatter(
                part["x"],
                part["y"],
                s=26,
                marker=marker,
                color=palette.get(value, "#555555"),
                alpha=0.75,
                edgecolor="white",
                linewidth=0.4,
                label=CLASS_NAMES.get(value, value),
            )
        axes[0, 0].set(
            xlabel="first principal component",
            ylabel="second principal component",
            title=f"Hidden states at layer {points['layer'].iloc[0]}, by {colour}",
        )
        axes[0, 0].legend(loc="best")
    return figure


def probe_cells(table: pd.DataFrame) -> Figure:
    """AUROC of each pairing's probe by form of the toxic and the harmless prompt: a bar a cell, chance at 0.5."""
    need(table, "pairing", "toxic_form", "harmless_form", "auroc", "layer")
    cells = table[table["toxic_form"] != "balanced"]
    names = list(dict.fromkeys(cells["pairing"]))
    kinds = list(dict.fromkeys(zip(cells["toxic_form"], cells["harmless_form"], strict=True)))
    with look():
        figure, axes = new_axes(2.4 * len(names) + 2.2, 3.8)
        ax, width = axes[0, 0], 0.8 / len(kinds)
        for i, (kind, hatch, colour) in enumerate(
            zip(
                kinds,
                ("", "//", "..", "xx"),
                ("#0072B2", "#56B4E9", "#E69F00", "#009E73"),
                strict=False,
            )
        ):
            part = cells[
                (cells["toxic_form"] == kind[0]) & (cells["harmless_form"] == kind[1])
            ].set_index("pairing")["auroc"]
            at = [names.index(n) + (i - (len(kinds) - 1) / 2) * width for n in part.index]
            bars = ax.bar(
                at,
                part,
                width,
                color=colour,
                hatch=hatch,
                edgecolor="black",
                linewidth=0.5,
                label=f"toxic {kind[0]}, harmless {kind[1]}",
            )
            ax.bar_label(bars, fmt="%.2f", fontsize=7)
        ax.axhline(0.5, color="black", linewidth=0.8)
        ax.set_xticks(range(len(names)), [f"trained on\n{n}" for n in names])
        ax.set(
            ylim=(0, 1.1),
            ylabel="AUROC, held-out requests",
            title=f"The same probe by sentence form (layer {table['layer'].iloc[0]})",
        )
        figure.legend(loc="outside lower center", ncols=2)
    return figure
