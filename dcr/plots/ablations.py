"""One setting changed at a time: every recipe against every measure."""

import pandas as pd
from matplotlib.figure import Figure

from dcr.plots.panels import Dots, dots
from dcr.plots.style import drawing

MEASURES = {
    "cross_similarity": "cosine\nacross ↓",
    "probe_auroc": "probe at ℓ\nAUROC ↑",
    "harm_auroc": "harm read\nAUROC ↑",
    "general_drift": "drift of\ngeneral ↓",
    "compliance": "compliance\n↑",
    "dsr": "DSR\n↑",
    "refusal_auroc": "refusal\nAUROC ↑",
}


@drawing
def ablations(table: pd.DataFrame) -> Figure:
    """Ablations on validation prompts, forms averaged: a row a recipe, one dot a seed and no
    intervals, colour the method. Left what the cheap screen after stage 1 tells, right what a
    short alignment then shows; a recipe that failed says so.
    """
    shown = [m for m in MEASURES if m in table and table[m].notna().any()] or ["probe_auroc"]
    row = table["cell"] + table["status"].eq("failed").map({True: " (failed)", False: ""})
    long = table.assign(row=row).melt(["row", "method"], shown, "measure")
    how = Dots("row", "measure", "method", "", None, across=len(shown), width=1.3)
    figure = dots(long.replace({"measure": MEASURES}), "value", how)
    for ax in figure.axes:
        ax.set(xlabel=ax.get_title(), title="")
        ax.locator_params(axis="x", nbins=2)
    return figure


@drawing
def search(table: pd.DataFrame) -> Figure:
    """The search on validation prompts, as many recipes for the baselines as for ours: a row a
    recipe, one dot a seed and no intervals.
    """
    return ablations(table)
