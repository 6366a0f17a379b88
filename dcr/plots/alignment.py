"""Stage 2 step by step: losses, refusals of each class, the kernel, and who trains on what."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from dcr.plots.panels import Curves, Size, curves, grid, heat
from dcr.plots.style import drawing, in_order

STEP = "alignment step (log scale)"
STAGES = {"refine": "Stage 1: contrastive loss", "align": "Stage 2: nats a labelled token"}
FOUR = Size(1.9, 2.0, 4, 1.3)


@drawing
def losses(table: pd.DataFrame) -> Figure:
    """Training loss of both stages (mean and range over seeds)."""
    order = table.sort_values("stage", ascending=False, kind="stable").replace({"stage": STAGES})
    return curves(order, "loss", Curves("step", "method", "stage", "optimiser step", "loss", None))


@drawing
def refusal_rates(table: pd.DataFrame) -> Figure:
    """Refusal rate of the classes over alignment (paper figure 1; 95 % intervals)."""
    return curves(
        table, "value", Curves("step", "label", "method", STEP, "refusal rate", size=FOUR)
    )


@drawing
def refusal_probability(table: pd.DataFrame) -> Figure:
    """Refusal probability of the classes over alignment (paper figure 6; 95 % intervals)."""
    how = Curves("step", "label", "method", STEP, "refusal probability", size=FOUR)
    return curves(table, "value", how)


@drawing
def kernel_trajectory(table: pd.DataFrame) -> Figure:
    """Normalised kernel of toxic with seemingly toxic prompts over alignment (paper figure 3; 95 %
    intervals): low where a step on one class moves the other little.
    """
    named = table.rename(columns={"normalised_low": "low", "normalised_high": "high"})
    label, size = "‖K(x', x)‖ / ‖K(x', x')‖", Size(4.6, 3.2)
    how = Curves("step", "method", "", STEP, label, (0, None), size)
    return curves(named.assign(seeds=1), "normalised", how)


@drawing
def same_rows(table: pd.DataFrame) -> Figure:
    """Share of a method's refusal rows that another method aligns on too (the least over seeds):
    1.00 wherever the source is the same; less only where the other one is audited, which takes a
    part of the same rows.
    """
    names = in_order([*table["method"], *table["other"]])
    wide = table.pivot_table(index="method", columns="other", values="share", aggfunc="min")
    figure, (ax,) = grid(1, Size(0.42 * len(names) + 0.6, 0.3 * len(names) + 0.3))
    heat(ax, wide.reindex(index=names, columns=names))
    ax.set_xlabel("also trained on by", fontsize=10)
    ax.set_ylabel("refusal rows of", fontsize=10)
    return figure
