"""Over alignment, a panel or a line a method: refusal rates, refusal probability and the kernel between classes."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from dcr.plots.common import half_widths, log_steps, need, new_axes, one_legend, panels, trace
from dcr.plots.style import (
    CLASS_COLOURS,
    CLASS_LINES,
    CLASS_MARKERS,
    CLASS_NAMES,
    in_order,
    look,
    method_look,
)


def refusal_rates(table: pd.DataFrame) -> Figure:
    """Refusal rate of toxic, seemingly toxic and general prompts over alignment steps, a panel a method (paper figure 1)."""
    return _by_class(table, "refusal rate")


def refusal_probabilities(table: pd.DataFrame) -> Figure:
    """Refusal probability of the three classes over alignment steps, a panel a method (paper figure 6)."""
    return _by_class(table, "refusal probability")


def _by_class(table: pd.DataFrame, ylabel: str) -> Figure:
    """Columns method, step, label, value, low, high, seeds; bands over several seeds, bars over prompts for one."""
    need(table, "method", "step", "label", "value", "low", "high")
    methods = in_order(table["method"])
    with look():
        figure, axes = panels(len(methods), 2.1, across=3, sharex=True, sharey=True)
        for ax, method in zip(axes, methods, strict=True):
            for i, label in enumerate(CLASS_COLOURS):
                rows = table[(table["method"] == method) & (table["label"] == label)].sort_values(
                    "step"
                )
                if len(rows):
                    rows = rows.assign(step=_apart(rows["step"], i - 1))
                    trace(
                        ax,
                        rows,
                        "step",
                        "value",
                        "low",
                        "high",
                        color=CLASS_COLOURS[label],
                        linestyle=CLASS_LINES[label],
                        marker=CLASS_MARKERS[label],
                        markersize=4,
                        label=CLASS_NAMES[label],
                    )
            log_steps(ax, table["step"])
            ax.set(title=method, ylim=(-0.03, 1.03))
        figure.supxlabel("alignment step (log scale)", fontsize=10)
        figure.supylabel(ylabel, fontsize=10)
        one_legend(figure, axes, where="upper")
    return figure


def _apart(steps: pd.Series, place: float) -> pd.Series:
    """Steps moved aside a little by place, on a logarithmic axis, so that bars at one step do not cover one another."""
    return steps * (1 + 0.035 * place) + 0.035 * place * (steps == 0)


def kernel_similarity(table: pd.DataFrame) -> Figure:
    """Normalised kernel between toxic and seemingly toxic prompts over alignment, a line a method (paper figure 3).

    Methods stand a little apart along the steps, so that their intervals do not cover one another.
    """
    need(
        table,
        "step",
        "class_a",
        "class_b",
        "normalised",
        "normalised_low",
        "normalised_high",
        "method",
    )
    cross = table[(table["class_a"] == "toxic") & (table["class_b"] == "seemingly_toxic")]
    methods = in_order(cross["method"])
    with look():
        figure, axes = new_axes(5.6, 4.0)
        for i, method in enumerate(methods):
            rows = cross[cross["method"] == method].sort_values("step")
            place = i - (len(methods) - 1) / 2
            bars = half_widths(
                rows, "normalised", "normalised_low", "normalised_high"
            )  # many bands over one another hide all
            axes[0, 0].errorbar(
                _apart(rows["step"], place),
                rows["normalised"],
                yerr=bars,
                elinewidth=0.8,
                capsize=2,
                **method_look(method),
                markersize=4.5,
                label=method,
            )
        log_steps(axes[0, 0], cross["step"])
        axes[0, 0].set(
            xlabel="alignment step (log scale)",
            ylabel="‖K(x', x)‖ / ‖K(x', x')‖",
            ylim=(0, None),
            title="Kernel, toxic against seemingly toxic prompts",
        )
        one_legend(figure, axes[0], 4)
    return figure
