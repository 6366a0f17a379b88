"""Stage 2 step by step: losses, refusals of each class, the kernel, and who trains on what."""

import pandas as pd
from matplotlib.figure import Figure

from dcr.plots.panels import Curves, Dots, Size, curves, dots, grid, heat
from dcr.plots.style import drawing, in_order

LOG = "(log scale from the first on)"
STEP = f"alignment step {LOG}"
STAGES = {"refine": "Stage 1: contrastive loss", "align": "Stage 2: nats a token"}
FOUR = Size(1.9, 2.0, 4, 1.3)


@drawing
def losses(table: pd.DataFrame) -> Figure:
    """Training loss of both stages, stage 2 by family of methods: rolling mean of 5 steps (mean and
    range over seeds).
    """
    rows = table.sort_values(["stage", "step"], ascending=[False, True], kind="stable")
    runs = rows.groupby(["method", "seed", "stage"])["loss"]
    family = ", " + rows["method"].str.split("-").str[0]
    panel = rows["stage"].map(STAGES) + family.where(rows["stage"] == "align", "")
    smooth = runs.transform(lambda loss: loss.rolling(5, center=True, min_periods=1).mean())
    how = Curves("step", "method", "panel", f"optimiser step {LOG}", "loss", None)
    return curves(rows.assign(panel=panel, loss=smooth), "loss", how)


@drawing
def refusal_rates(table: pd.DataFrame) -> Figure:
    """Refusal rate of the classes over alignment (paper figure 1; 95 % intervals)."""
    how = Curves("step", "label", "method", STEP, "refusal rate", size=FOUR)
    return curves(table, "value", how)


@drawing
def refusal_probability(table: pd.DataFrame) -> Figure:
    """Refusal probability of the classes over alignment (paper figure 6; 95 % intervals), each
    panel on its own scale: methods with a decision word start high, as its "No" is a refusal
    opening.
    """
    how = Curves("step", "label", "method", STEP, "refusal probability", None, FOUR)
    figure = curves(table, "value", how)
    for ax in figure.axes:
        ax.set_ylim(bottom=0)
    return figure


@drawing
def kernel_trajectory(table: pd.DataFrame) -> Figure:
    """Normalised kernel of toxic with seemingly toxic prompts at steps of the alignment (paper
    figure 3; 95 % intervals): low where a step on one class moves the other little.
    """
    rows = table.rename(columns={"normalised_low": "low", "normalised_high": "high"})
    rows = rows.sort_values("step", kind="stable")
    panel = rows["step"].map("after step {:g}".format).where(rows["step"] > 0, "before alignment")
    limits = (0, 1.05 * float(rows["high"].max()))
    how = Dots("method", "panel", "", "‖K(x', x)‖ / ‖K(x', x')‖", limits, across=5)
    return dots(rows.assign(panel=panel), "normalised", how)


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
