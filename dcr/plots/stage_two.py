"""Stage 2: losses."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from dcr.plots.common import need, new_axes, one_legend
from dcr.plots.style import METHOD_COLOURS, METHOD_LINES, look


def loss_curves(table: pd.DataFrame) -> Figure:
    """Training loss over steps of each method, both stages."""
    need(table, "step", "loss", "method", "stage")
    stages = sorted(set(table["stage"]), reverse=True)  # refine before align
    titles = {
        "refine": "Stage 1: contrastive loss",
        "align": "Stage 2: loss (nats a labelled token)",
    }
    with look():
        figure, axes = new_axes(4 * len(stages), 3.2, 1, len(stages))
        for ax, stage in zip(axes[0], stages, strict=True):
            for method, rows in table[table["stage"] == stage].groupby("method", sort=False):
                ax.plot(
                    rows["step"],
                    rows["loss"],
                    color=METHOD_COLOURS.get(method, "#333333"),
                    linestyle=METHOD_LINES.get(method, "-"),
                    label=method,
                )
            ax.set(xlabel="optimiser step", ylabel="loss", title=titles.get(stage, stage))
        one_legend(figure, axes[0][::-1])  # all methods align, some refine
    return figure
