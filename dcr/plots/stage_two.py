"""Stage 2: losses, refusal probability and kernel over alignment."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dcr.plots.common import need, new_axes
from dcr.style import CLASS_COLOURS, CLASS_LINES, CLASS_NAMES, METHOD_COLOURS, METHOD_LINES, METHOD_MARKERS, look


def loss_curves(table: pd.DataFrame) -> Figure:
    """Training loss over steps of each method, both stages."""
    need(table, "step", "loss", "method", "stage")
    stages = list(dict.fromkeys(table["stage"]))
    titles = {"refine": "Stage 1: contrastive loss", "align": "Stage 2: loss (nats a labelled token)"}
    with look():
        figure, axes = new_axes(4 * len(stages), 3.2, 1, len(stages))
        for ax, stage in zip(axes[0], stages, strict=True):
            for method, rows in table[table["stage"] == stage].groupby("method", sort=False):
                ax.plot(rows["step"], rows["loss"], color=METHOD_COLOURS.get(method, "#333333"),
                        linestyle=METHOD_LINES.get(method, "-"), label=method)
            ax.set(xlabel="optimiser step", ylabel="loss", title=titles.get(stage, stage))
            ax.legend()
    return figure


def rejection(table: pd.DataFrame) -> Figure:
    """Refusal probability of the three classes over alignment, a panel a method (paper figures 1 and 6)."""
    need(table, "step", "label", "probability", "method")
    methods = list(dict.fromkeys(table["method"]))
    with look():
        figure, axes = new_axes(3.4 * len(methods) + 0.6, 3.4, 1, len(methods), sharey=True)
        for ax, method in zip(axes[0], methods, strict=True):
            for label, rows in table[table["method"] == method].groupby("label", sort=False):
                grouped = rows.groupby("step")["probability"]
                mean, half = grouped.mean(), 1.96 * grouped.sem().fillna(0)
                ax.plot(mean.index, mean, CLASS_LINES[label], marker="o", color=CLASS_COLOURS[label], label=CLASS_NAMES[label])
                ax.fill_between(mean.index, (mean - half).clip(0), (mean + half).clip(upper=1), color=CLASS_COLOURS[label], alpha=0.15)
            ax.set_xscale("symlog", linthresh=1)
            ax.set(title=method, xlabel="alignment step (log)", ylim=(-0.02, 1.02))
        axes[0, 0].set_ylabel("refusal probability")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def kernel(table: pd.DataFrame) -> Figure:
    """Normalised kernel similarity between toxic and seemingly toxic prompts over alignment (paper figure 3)."""
    need(table, "step", "class_a", "class_b", "normalised", "method")
    cross = table[(table["class_a"] == "toxic") & (table["class_b"] == "seemingly_toxic")]
    with look():
        figure, axes = new_axes(5, 3.6)
        ax = axes[0, 0]
        for method, rows in cross.groupby("method", sort=False):
            half = (rows["normalised"] - rows["normalised_low"], rows["normalised_high"] - rows["normalised"])
            ax.errorbar(rows["step"], rows["normalised"], yerr=np.clip(half, 0, None), capsize=3,
                        color=METHOD_COLOURS.get(method, "#333333"), linestyle=METHOD_LINES.get(method, "-"),
                        marker=METHOD_MARKERS.get(method, "o"), label=method)
        ax.set_xscale("symlog", linthresh=1)
        ax.set(xlabel="alignment step (log)", ylabel="‖K(x', x)‖ / ‖K(x', x')‖", ylim=(0, None),
               title="Kernel, toxic against seemingly toxic")
        ax.legend()
    return figure
