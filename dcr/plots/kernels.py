"""Kernel by class, Proposition 1, and whether refusal probability can be trusted."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from dcr.plots.common import few_log_ticks, need, new_axes
from dcr.plots.style import CLASS_NAMES, METHOD_COLOURS, METHOD_MARKERS, look

PAIR_MARKERS = "o^sDvP"
PAIR_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def kernel_matrix(table: pd.DataFrame) -> Figure:
    """Class-by-class kernel similarity, a panel a model, each cell with its 95 % interval."""
    need(
        table,
        "class_a",
        "class_b",
        "normalised",
        "normalised_low",
        "normalised_high",
        "method",
        "step",
    )
    groups = list(table.groupby(["method", "step"], sort=False))
    with look():
        figure, axes = new_axes(3.9 * len(groups) + 0.6, 3.6, 1, len(groups), sharey=True)
        for ax, ((method, step), rows) in zip(axes[0], groups, strict=True):
            names = list(dict.fromkeys(rows["class_a"]))
            cells = rows.set_index(["class_a", "class_b"])
            values = [[cells.loc[(a, b), "normalised"] for b in names] for a in names]
            image = ax.imshow(values, vmin=0, vmax=1, cmap="cividis")
            for y, a in enumerate(names):
                for x, b in enumerate(names):
                    cell = cells.loc[(a, b)]
                    ax.text(
                        x,
                        y,
                        f"{cell['normalised']:.2f}\n[{cell['normalised_low']:.2f}, {cell['normalised_high']:.2f}]",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if cell["normalised"] < 0.55 else "black",
                    )
            shown = [CLASS_NAMES.get(n, n).replace(" ", "\n") for n in names]
            ax.set_xticks(range(len(names)), shown)
            ax.set_yticks(range(len(names)), shown)
            ax.grid(False)
            ax.set(xlabel="x", title=_model_name(method, step))
        axes[0, 0].set_ylabel("x'")
        figure.colorbar(image, ax=axes[0].tolist(), label="‖K(x', x)‖ / ‖K(x', x')‖", shrink=0.85)
    return figure


def _model_name(method: str, step: int) -> str:
    if method == "base":
        return "base model"
    return (
        f"{method} after stage 1"
        if step == 0
        else f"{method} aligned"
        if step < 0
        else f"{method}, step {step}"
    )


def proposition(pairs: pd.DataFrame, checks: pd.DataFrame) -> Figure:
    """|h'ᵀh| at ℓ against ‖K‖ for pairs of prompts, a panel a model; the line is the bound at its smallest constant."""
    need(pairs, "bilinear", "kernel", "pair", "model", "layer")
    need(checks, "model", "spearman", "low", "high", "constant")
    kinds = list(dict.fromkeys(pairs["pair"]))
    with look():
        figure, axes = new_axes(4.1 * len(checks) + 0.4, 4.2, 1, len(checks), sharey=True)
        for ax, check in zip(axes[0], checks.itertuples(), strict=True):
            rows = pairs[pairs["model"] == check.model]
            for kind, marker, colour in zip(kinds, PAIR_MARKERS, PAIR_COLOURS, strict=False):
                part = rows[rows["pair"] == kind]
                ax.scatter(
                    part["bilinear"],
                    part["kernel"],
                    s=16,
                    marker=marker,
                    color=colour,
                    alpha=0.65,
                    linewidth=0,
                    label=" / ".join(CLASS_NAMES.get(c, c) for c in kind.split(" / ")),
                )
            ends = [rows["bilinear"].min(), rows["bilinear"].max()]
            ax.plot(
                ends,
                [check.constant * e for e in ends],
                color="black",
                linewidth=1,
                linestyle="--",
                label="bound, smallest constant",
            )
            ax.set(
                xscale="log",
                yscale="log",
                xlabel=f"|h'ᵀh| at layer {rows['layer'].iloc[0]}",
                title=f"{check.model}\nSpearman {check.spearman:.2f} [{check.low:.2f}, {check.high:.2f}]",
            )
            few_log_ticks(ax.xaxis, *ends)
        axes[0, 0].set_ylabel("‖K(x', x)‖")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def reliability(scores: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Calibration: share of answers judged refusals (95 % Wilson) against refusal probability, a line a method."""
    need(table, "probability", "refused", "low", "high", "method")
    need(scores, "method", "auroc", "low", "high")
    with look():
        figure, axes = new_axes(4.6, 4.6)
        ax = axes[0, 0]
        ax.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, label="perfectly calibrated")
        for score in scores.itertuples():
            rows = table[table["method"] == score.method]
            half = (
                (rows["refused"] - rows["low"]).clip(lower=0),
                (rows["high"] - rows["refused"]).clip(lower=0),
            )
            ax.errorbar(
                rows["probability"],
                rows["refused"],
                yerr=half,
                capsize=3,
                color=METHOD_COLOURS.get(score.method, "#333333"),
                marker=METHOD_MARKERS.get(score.method, "o"),
                label=f"{score.method}: AUROC {score.auroc:.2f} [{score.low:.2f}, {score.high:.2f}]",
            )
        ax.set(
            xlim=(-0.02, 1.02),
            ylim=(-0.02, 1.02),
            xlabel="refusal probability (mean of bin)",
            ylabel="share of generated answers that refuse",
            title="Refusal probability against generated answers",
        )
        figure.legend(loc="outside lower center")  # the curve may run through any corner
    return figure
