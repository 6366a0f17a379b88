"""A sweep's table: every recipe against every measure, and whether the cheap screen tells what alignment will show."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dcr.plots.common import need, new_axes
from dcr.plots.style import look

# measure → (title, limits, the value that says "nothing learnt" or None)
MEASURES = {
    "cross_similarity": ("held-out cosine\nacross classes ↓", None, None),
    "probe_auroc": ("probe AUROC at ℓ,\nforms averaged ↑", (0.3, 1.02), 0.5),
    "general_drift": ("drift of\ngeneral prompts ↓", None, 0.0),
    "compliance": ("compliance,\nforms averaged ↑", (-0.02, 1.02), None),
    "dsr": ("DSR,\nforms averaged ↑", (-0.02, 1.02), None),
    "refusal_auroc": ("refusal AUROC,\nforms averaged ↑", (0.3, 1.02), 0.5),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def _levers(table: pd.DataFrame) -> pd.Series:
    """The lever of each recipe: what its name begins with ("layer" of "layer=0.5", "strength" of "strength: ...")."""
    return table["cell"].str.extract(r"^([A-Za-z_-]+)", expand=False).fillna("other")


def ablation_levers(table: pd.DataFrame) -> Figure:
    """A row a recipe, a panel a measure: one dot a seed; colour is the lever; failed recipes are marked, not left out."""
    need(table, "cell", "seed", "status")
    shown = [m for m in MEASURES if m in table and table[m].notna().any()] or ["probe_auroc"]
    cells = list(dict.fromkeys(table["cell"]))
    table = table.assign(
        y=table["cell"].map({c: i for i, c in enumerate(cells)}), lever=_levers(table)
    )
    colours = dict(zip(dict.fromkeys(table["lever"]), COLOURS * len(table), strict=False))
    with look():
        figure, axes = new_axes(
            0.6 + 0.085 * max(map(len, cells)) + 1.6 * len(shown),
            1.2 + 0.3 * len(cells),
            1,
            len(shown),
            sharey=True,
        )
        for ax, measure in zip(axes[0], shown, strict=True):
            title, limits, nothing = MEASURES[measure]
            if measure in table:
                ax.scatter(
                    table[measure],
                    table["y"],
                    c=[colours[v] for v in table["lever"]],
                    s=34,
                    zorder=3,
                )
            if nothing is not None:
                ax.axvline(nothing, color="#888888", linewidth=0.9, linestyle="--")
            if limits:
                ax.set_xlim(*limits)
            ax.xaxis.set_major_locator(MaxNLocator(3))
            ax.set_title(title, fontsize=9)
        for y in table.loc[table["status"] == "failed", "y"].unique():
            axes[0, 0].text(
                0.03,
                y,
                "failed",
                transform=axes[0, 0].get_yaxis_transform(),
                color="#D55E00",
                va="center",
                fontsize=8,
            )
        axes[0, 0].set_yticks(range(len(cells)), cells)
        axes[0, 0].set_ylim(len(cells) - 0.5, -0.5)
    return figure


def ablation_outcomes(table: pd.DataFrame) -> Figure:
    """Left: compliance against DSR of the aligned recipes. Right: refusal AUROC after alignment against the screen's."""
    need(table, "cell", "compliance", "dsr", "probe_auroc", "refusal_auroc")
    done = table.dropna(subset=["compliance", "dsr"])
    panels = (
        (
            "dsr",
            "compliance",
            "defence success rate (toxic)",
            "compliance (seemingly toxic)",
            "Safety and compliance",
        ),
        (
            "probe_auroc",
            "refusal_auroc",
            "probe AUROC at ℓ (screen)",
            "refusal AUROC (aligned)",
            "Does the screen tell?",
        ),
    )
    markers = "osD^vPX*<>hp"
    with look():
        names = done["cell"].unique().tolist()
        figure, axes = new_axes(
            8.6 + 0.08 * max(map(len, names), default=0), max(4.2, 0.6 + 0.24 * len(names)), 1, 2
        )
        for ax, (x, y, across, up, title) in zip(axes[0], panels, strict=True):
            for number, (cell, rows) in enumerate(done.groupby("cell", sort=False)):
                ax.scatter(
                    rows[x],
                    rows[y],
                    marker=markers[number % len(markers)],
                    s=48,
                    label=cell,
                    color=COLOURS[number % len(COLOURS)],
                    alpha=0.85,
                )
            ax.set(xlabel=across, ylabel=up, title=title, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        figure.legend(
            *axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8
        )
    return figure


def harm_read(table: pd.DataFrame) -> Figure:
    """How well harm can be read at ℓ after stage 1: by a probe, and along the difference of the class means; dashed, the base model.

    Columns cell, method, harm_auroc, mean_auroc (the same labelled prompts for every cell); the row of STL is the base model.
    """
    need(table, "cell", "method", "harm_auroc", "mean_auroc")
    named = [
        "base model" if m.startswith("STL") else c
        for m, c in zip(table["method"], table["cell"], strict=True)
    ]
    rows = table.assign(cell=named).dropna(subset=["harm_auroc"]).drop_duplicates("cell")
    with look():
        figure, axes = new_axes(
            3.6 + 0.085 * max(map(len, rows["cell"]), default=0), 1.5 + 0.3 * len(rows)
        )
        ax = axes[0, 0]
        for name, label, colour, marker in (
            ("harm_auroc", "linear probe", "#0072B2", "o"),
            ("mean_auroc", "difference of class means", "#D55E00", "D"),
        ):
            ax.scatter(
                rows[name], range(len(rows)), color=colour, marker=marker, label=label, zorder=3
            )
            for value in rows.loc[rows["cell"] == "base model", name]:
                ax.axvline(value, color=colour, linewidth=0.9, linestyle="--")
        ax.set_yticks(range(len(rows)), rows["cell"])
        ax.set(
            xlim=(0.45, 1),
            ylim=(len(rows) - 0.5, -0.5),
            xlabel="AUROC on validation prompts, forms averaged",
        )
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure
