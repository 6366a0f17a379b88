"""Stage 1: what it trains, how held-out prompts part meanwhile, and what it moved."""

import pandas as pd
from matplotlib.figure import Figure

from dcr.plots.panels import Curves, Dots, Size, curves, dots, grid, scatter
from dcr.plots.style import Look, drawing

MEASURES = {
    "cross_similarity": "cosine across classes",
    "within_similarity": "cosine within a class",
    "probe_auroc": "AUROC of a probe",
}
STEP = "step of stage 1 (log scale from the first on)"
STAGES = {"refine": "Stage 1: contrastive refinement", "align": "Stage 2: safety alignment"}


@drawing
def overview(table: pd.DataFrame) -> Figure:
    """The two stages (paper figure 2): stage 1 trains the blocks below ℓ and does not run the
    others; stage 2 is ordinary alignment of the refined model.
    """
    figure, axes = grid(len(table), Size(3.8, 2.9, 2, 0.3))
    for ax, (_, row) in zip(axes, table.iterrows(), strict=True):
        moved = [i < row["trained"] for i in range(row["blocks"])]
        look: Look = {"color": ["#56B4E9" if m else "white" for m in moved]}
        look |= {"hatch": ["" if m else "///" for m in moved], "edgecolor": "#444444"}
        ax.barh(range(row["blocks"]), 1, height=0.85, **look)
        top, arrow = row["trained"], {"arrowstyle": "<-", "color": "black"}
        place: Look = {"xy": (1, top - 0.5), "xytext": (1.5, top - 0.5), "va": "center"}
        ax.annotate(row["loss"], **place, fontsize=9, arrowprops=arrow)
        ax.text(0.5, -1, row["prompts"] + " ↑", ha="center", va="top", fontsize=9)
        if top < row["blocks"]:
            ax.text(-0.1, top - 0.5, f"ℓ = {row['layer']}", ha="right", va="center", fontsize=9)
        ax.set(xlim=(-1.2, 3.2), ylim=(-0.2 * row["blocks"], row["blocks"] + 0.5))
        ax.set_title(STAGES.get(row["stage"], row["stage"]))
        ax.axis("off")
    return figure


@drawing
def refinement(table: pd.DataFrame) -> Figure:
    """Stage 1 on held-out prompts at ℓ: cosine across and within the classes, and a probe's AUROC
    (mean and range over seeds).
    """
    keys = [c for c in ("method", "step", "seed") if c in table]
    long = table.melt(keys, list(MEASURES), "measure").replace({"measure": MEASURES})
    return curves(long, "value", Curves("step", "method", "measure", STEP, "cosine or AUROC", None))


@drawing
def similarity(table: pd.DataFrame) -> Figure:
    """Similarity before and after stage 1 (paper figure 5): cosines of held-out prompts at ℓ (mean
    and range over seeds; one seed: no bar), and the normalised kernel of toxic prompts with each
    class (95 % intervals).
    """
    rows = table.assign(hollow=table["when"] == "before").replace({"measure": MEASURES})
    return dots(rows, "value", Dots("method", "measure", "when", "similarity", None, width=2.3))


@drawing
def refinement_maps(table: pd.DataFrame) -> Figure:
    """Held-out prompts at ℓ on two principal components, before and after stage 1: colour is the
    class, marker the form.
    """
    return scatter(table.assign(panel=table["method"] + ", " + table["when"]), "panel")


@drawing
def refinement_drift(table: pd.DataFrame) -> Figure:
    """How far stage 1 moved each class from the base model, by layer (band: range over seeds; one
    seed: no band); above ℓ (line) no weight moved.
    """
    how = Curves("layer", "label", "method", "layer (blocks run)", "‖h − h₀‖² / ‖h₀‖²", (0, None))
    figure, at = curves(table, "drift", how), table.groupby("method")["refined_at"].first()
    for ax in figure.axes:
        ax.axvline(at[ax.get_title()], color="black", linewidth=0.9)
    return figure
