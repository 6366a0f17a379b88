"""One function a figure: tidy DataFrame in, matplotlib Figure out. Figures read tables, never models."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from dcr.errors import DCRError
from dcr.style import (
    CLASS_COLOURS,
    CLASS_LINES,
    CLASS_NAMES,
    METHOD_COLOURS,
    METHOD_LINES,
    METHOD_MARKERS,
    look,
)

PAIRING_COLOURS = {"sources (paper)": "#D55E00", "matched pairs": "#0072B2", "XSTest contrasts": "#009E73"}


def _need(table: pd.DataFrame, *columns: str) -> None:
    missing = [c for c in columns if c not in table]
    if missing or table.empty:
        raise DCRError(f"figure data: {'no rows' if table.empty else 'no column ' + ', '.join(missing)}; run the notebook "
                       "that writes this table first.")
    if "profile" in table and table["profile"].nunique() > 1:
        raise DCRError(f"figure data mixes profiles {sorted(table['profile'].unique())}; draw one profile at a time.")


def _axes(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def question_shares(table: pd.DataFrame) -> Figure:
    """The shortcut: share of questions in each set, harmless sets beside toxic ones."""
    _need(table, "set", "label", "question_share", "n")
    with look():
        figure, axes = _axes(7, 0.32 * len(table) + 1.2)
        ax, rows = axes[0, 0], table.iloc[::-1]
        ax.barh(rows["set"], rows["question_share"], color=[CLASS_COLOURS[c] for c in rows["label"]],
                edgecolor="black", linewidth=0.6)
        for bar, label, n in zip(ax.patches, rows["label"], rows["n"], strict=True):
            bar.set_hatch({"toxic": "", "seemingly_toxic": "//", "general": ".."}[label])
            ax.text(bar.get_width() + 0.01, bar.get_y() + bar.get_height() / 2, f"{bar.get_width():.2f}  (n={n})",
                    va="center", fontsize=8)
        ax.set(xlim=(0, 1.22), xlabel="share of prompts that are questions", title="Sentence form nearly gives the label away")
        handles = [FancyBboxPatch((0, 0), 1, 1, fc=CLASS_COLOURS[c], hatch=h) for c, h in
                   (("toxic", ""), ("seemingly_toxic", "//"), ("general", ".."))]
        figure.legend(handles, [CLASS_NAMES[c] for c in ("toxic", "seemingly_toxic", "general")],
                      loc="outside lower center", ncols=3)
    return figure


def separability_by_layer(probe: pd.DataFrame, surface: pd.DataFrame) -> Figure:
    """AUROC of a linear probe by layer, a panel a pairing, beside what the surface alone tells (dashed)."""
    _need(probe, "layer", "auroc", "low", "high", "pairing")
    names = list(dict.fromkeys(probe["pairing"]))
    with look():
        figure, axes = _axes(3.3 * len(names) + 0.8, 3.6, 1, len(names), sharey=True)
        for ax, name in zip(axes[0], names, strict=True):
            rows = probe[probe["pairing"] == name]
            colour = PAIRING_COLOURS.get(name, "#333333")
            ax.plot(rows["layer"], rows["auroc"], marker="o", color=colour, label="hidden state (probe)")
            ax.fill_between(rows["layer"], rows["low"], rows["high"], color=colour, alpha=0.18)
            for (_, base), style in zip(surface[surface["pairing"] == name].iterrows(), ("--", ":", "-.", (0, (5, 1))),
                                        strict=False):
                ax.axhline(base["auroc"], color="black", linestyle=style, linewidth=1.1, label=base["baseline"])
            ax.axhline(0.5, color="#bbbbbb", linewidth=0.8)
            ax.set(title=name, xlabel="layer (blocks run)", ylim=(0, 1.03))
        axes[0, 0].set_ylabel("AUROC, toxic against seemingly toxic")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def transfer(table: pd.DataFrame) -> Figure:
    """AUROC of a probe on sets it was not trained on: below 0.5 it follows form, not harm."""
    _need(table, "layer", "auroc", "pairing", "tested_on")
    with look():
        figure, axes = _axes(8, 3.8, 1, table["pairing"].nunique(), sharey=True)
        styles = dict(zip(dict.fromkeys(table["tested_on"]), ("o-", "s--", "^:"), strict=False))
        for ax, (name, part) in zip(axes[0], table.groupby("pairing", sort=False), strict=True):
            for tested, rows in part.groupby("tested_on", sort=False):
                line = ax.plot(rows["layer"], rows["auroc"], styles[tested], label=f"tested on {tested}",
                               color=PAIRING_COLOURS.get(tested, "#D55E00" if "sources" in tested else "#56B4E9"))
                ax.fill_between(rows["layer"], rows["low"], rows["high"], color=line[0].get_color(), alpha=0.15)
            ax.axhline(0.5, color="#bbbbbb", linewidth=0.8)
            ax.set(title=f"probe trained on {name}", xlabel="layer (blocks run)", ylim=(0, 1.03))
        axes[0, 0].set_ylabel("AUROC, toxic against seemingly toxic")
        handles = {label: h for ax in axes[0] for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    return figure


def map_2d(points: pd.DataFrame, colour: str = "label") -> Figure:
    """Prompts of one layer on their first two principal components, coloured by class, form or source."""
    _need(points, "x", "y", colour)
    values = list(dict.fromkeys(points[colour]))
    palette = CLASS_COLOURS if colour == "label" else dict(zip(values, ("#D55E00", "#0072B2", "#009E73", "#CC79A7"), strict=False))
    with look():
        figure, axes = _axes(5.2, 4.2)
        for value, marker in zip(values, "o^sDvP", strict=False):
            part = points[points[colour] == value]
            axes[0, 0].scatter(part["x"], part["y"], s=26, marker=marker, color=palette.get(value, "#555555"), alpha=0.75,
                               edgecolor="white", linewidth=0.4, label=CLASS_NAMES.get(value, value))
        axes[0, 0].set(xlabel="first principal component", ylabel="second principal component",
                       title=f"Hidden states at layer {points['layer'].iloc[0]}, by {colour}")
        axes[0, 0].legend(loc="best")
    return figure


def refinement(table: pd.DataFrame) -> Figure:
    """Stage 1: held-out cosine between and within classes, and the held-out probe, over steps; a panel each."""
    _need(table, "step", "cross_similarity", "within_similarity", "probe_auroc", "method")
    with look():
        figure, axes = _axes(8, 3.4, 1, 2)
        for method, rows in table.groupby("method", sort=False):
            colour, style = METHOD_COLOURS.get(method, "#333333"), METHOD_LINES.get(method, "-")
            axes[0, 0].plot(rows["step"], rows["cross_similarity"], linestyle=style, marker="o", color=colour,
                            label=f"{method}: across")
            axes[0, 0].plot(rows["step"], rows["within_similarity"], linestyle=":", marker="s", color=colour, alpha=0.6,
                            label=f"{method}: within")
            axes[0, 1].plot(rows["step"], rows["probe_auroc"], linestyle=style, marker="o", color=colour, label=method)
        axes[0, 0].set(xlabel="refinement step", ylabel="mean cosine of held-out prompts", title="Similarity at layer ℓ")
        axes[0, 1].set(xlabel="refinement step", ylabel="AUROC of a held-out probe", ylim=(0.4, 1.02), title="Separation at layer ℓ")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def loss_curves(table: pd.DataFrame) -> Figure:
    """Training loss over steps of each method, both stages."""
    _need(table, "step", "loss", "method", "stage")
    stages = list(dict.fromkeys(table["stage"]))
    titles = {"refine": "Stage 1: contrastive loss", "align": "Stage 2: loss (nats a labelled token)"}
    with look():
        figure, axes = _axes(4 * len(stages), 3.2, 1, len(stages))
        for ax, stage in zip(axes[0], stages, strict=True):
            for method, rows in table[table["stage"] == stage].groupby("method", sort=False):
                ax.plot(rows["step"], rows["loss"], color=METHOD_COLOURS.get(method, "#333333"),
                        linestyle=METHOD_LINES.get(method, "-"), label=method)
            ax.set(xlabel="optimiser step", ylabel="loss", title=titles.get(stage, stage))
            ax.legend()
    return figure


def rejection(table: pd.DataFrame) -> Figure:
    """Refusal probability of the three classes over alignment, a panel a method (paper figures 1 and 6)."""
    _need(table, "step", "label", "probability", "method")
    methods = list(dict.fromkeys(table["method"]))
    with look():
        figure, axes = _axes(3.4 * len(methods) + 0.6, 3.4, 1, len(methods), sharey=True)
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
    _need(table, "step", "class_a", "class_b", "normalised", "method")
    cross = table[(table["class_a"] == "toxic") & (table["class_b"] == "seemingly_toxic")]
    with look():
        figure, axes = _axes(5, 3.6)
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


def plane(points: pd.DataFrame) -> Figure:
    """The compliance-safety plane: each method's checkpoints as a curve, the last one filled (columns dsr, compliance)."""
    _need(points, "method", "step", "dsr", "compliance")
    with look():
        figure, axes = _axes(5.4, 4.4)
        ax = axes[0, 0]
        for method, rows in points.groupby("method", sort=False):
            rows = rows.sort_values("step")
            colour, marker = METHOD_COLOURS.get(method, "#333333"), METHOD_MARKERS.get(method, "o")
            ax.plot(rows["dsr"], rows["compliance"], METHOD_LINES.get(method, "-") if isinstance(METHOD_LINES.get(method), str)
                    else "-", color=colour, marker=marker, markerfacecolor="white", markersize=5, label=method)
            ax.plot(rows["dsr"].iloc[-1], rows["compliance"].iloc[-1], marker=marker, color=colour, markersize=9)
        ax.set(xlabel="defence success rate (mean over toxic sets)", ylabel="compliance (mean over seemingly toxic sets)",
               xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), title="Compliance against safety")
        ax.legend(loc="lower left")
    return figure


def rates_by_form(rows: pd.DataFrame) -> Figure:
    """Refusal rate of each method by benchmark and form of the prompt: where form decides, the markers part."""
    part = rows[(rows["metric"] == "refusal_rate") & rows["form"].isin(["question", "imperative"])]
    _need(part, "method", "benchmark", "form", "value")
    names = list(dict.fromkeys(part["benchmark"]))
    methods = [m for m in dict.fromkeys(part["method"])]
    with look():
        figure, axes = _axes(2.3 * len(methods) + 1.4, 0.33 * len(names) + 1.6, 1, len(methods), sharey=True)
        for ax, method in zip(axes[0], methods, strict=True):
            for form, marker, shift, colour in (("question", "o", -0.14, "#0072B2"), ("imperative", "s", 0.14, "#D55E00")):
                mine = part[(part["method"] == method) & (part["form"] == form)].set_index("benchmark").reindex(names)
                y = np.arange(len(names)) + shift
                error = np.clip([mine["value"] - mine["low"], mine["high"] - mine["value"]], 0, None)
                ax.errorbar(mine["value"], y, xerr=error, fmt=marker, color=colour, markersize=4, elinewidth=0.8, label=form)
            ax.set(title=method, xlim=(-0.05, 1.05), yticks=range(len(names)), yticklabels=names)
            ax.set_xticks([0, 0.5, 1])
        axes[0, 0].invert_yaxis()
        figure.supxlabel("refusal rate (95 % Wilson interval)", fontsize=10)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def overview() -> Figure:
    """The two stages as a diagram (paper figure 2)."""
    boxes = [(0.2, "toxic and\nseemingly toxic\nprompts", "#F0E442"),
             (2.5, "stage 1: contrastive\nrefinement of blocks\nbelow ℓ", "#56B4E9"),
             (5.0, "refined model:\nclasses apart\nat layer ℓ", "#DDDDDD"),
             (7.3, "stage 2: safety\nalignment (SFT on\ngeneral + refusals)", "#E69F00"),
             (9.8, "aligned model:\nrefusals do not\nspill over", "#DDDDDD")]
    with look():
        figure, axes = _axes(11, 2.0)
        ax = axes[0, 0]
        for x, text, colour in boxes:
            ax.add_patch(FancyBboxPatch((x, 0.2), 1.9, 1.0, boxstyle="round,pad=0.06", fc=colour, ec="black", alpha=0.75))
            ax.text(x + 0.95, 0.7, text, ha="center", va="center", fontsize=9)
        for (x, *_), (after, *_) in zip(boxes, boxes[1:], strict=False):
            ax.add_patch(FancyArrowPatch((x + 1.98, 0.7), (after - 0.08, 0.7), arrowstyle="-|>", mutation_scale=14, color="black"))
        ax.set(xlim=(0, 12), ylim=(0, 1.4))
        ax.axis("off")
    return figure


def cost(table: pd.DataFrame) -> Figure:
    """Seconds of each stage by method, stacked."""
    _need(table, "name", "kind", "seconds")
    wide = table.pivot_table(index="name", columns="kind", values="seconds", aggfunc="sum").fillna(0)
    with look():
        figure, axes = _axes(6, 0.4 * len(wide) + 1.4)
        left = np.zeros(len(wide))
        for kind, colour in zip(wide.columns, ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999"), strict=False):
            axes[0, 0].barh(wide.index, wide[kind], left=left, color=colour, edgecolor="black", linewidth=0.5, label=kind)
            left += wide[kind].to_numpy()
        axes[0, 0].set(xlabel="wall time (s)", title="What each method cost")
        axes[0, 0].legend()
    return figure


REDRAW: dict[str, Callable[..., Figure]] = {
    "question_shares": question_shares, "transfer": transfer, "refinement": refinement, "losses": loss_curves,
    "rejection": rejection, "kernel": kernel, "plane": plane, "rates_by_form": rates_by_form, "cost": cost}
