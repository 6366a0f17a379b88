"""Stage 1: held-out similarity while classes part, and what it changed: cosines, map, drift, kernel, choice of ℓ."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from dcr.plots.common import need, new_axes
from dcr.plots.style import (
    CLASS_COLOURS,
    CLASS_LINES,
    CLASS_NAMES,
    METHOD_COLOURS,
    METHOD_LINES,
    look,
)

FORM_MARKERS = {"question": "o", "imperative": "^", "statement": "s"}


def refinement(table: pd.DataFrame) -> Figure:
    """Stage 1: held-out cosine between and within classes, and the held-out probe, over steps; a panel each."""
    need(table, "step", "cross_similarity", "within_similarity", "probe_auroc", "method")
    with look():
        figure, axes = new_axes(8, 3.4, 1, 2)
        for method, rows in table.groupby("method", sort=False):
            colour, style = METHOD_COLOURS.get(method, "#333333"), METHOD_LINES.get(method, "-")
            axes[0, 0].plot(
                rows["step"],
                rows["cross_similarity"],
                linestyle=style,
                marker="o",
                color=colour,
                label=f"{method}: across",
            )
            axes[0, 0].plot(
                rows["step"],
                rows["within_similarity"],
                linestyle=":",
                marker="s",
                color=colour,
                alpha=0.6,
                label=f"{method}: within",
            )
            axes[0, 1].plot(
                rows["step"],
                rows["probe_auroc"],
                linestyle=style,
                marker="o",
                color=colour,
                label=method,
            )
        axes[0, 0].set(
            xlabel="refinement step",
            ylabel="mean cosine of held-out prompts",
            title="Similarity at layer ℓ",
        )
        axes[0, 1].set(
            xlabel="refinement step",
            ylabel="AUROC of a held-out probe",
            ylim=(0.4, 1.02),
            title="Separation at layer ℓ",
        )
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def cosine_maps(table: pd.DataFrame) -> Figure:
    """Cosine at ℓ between held-out prompts, sorted by class, before and after stage 1; one colour scale."""
    need(table, "when", "i", "j", "label_i", "cosine", "layer")
    order = table.drop_duplicates("i")[["i", "label_i"]].sort_values("i", kind="stable")
    order = order.sort_values(
        "label_i", key=lambda c: c.map(list(CLASS_NAMES).index), kind="stable"
    )
    counts = order.groupby("label_i", sort=False).size()
    edges = counts.cumsum()
    whens = list(dict.fromkeys(table["when"]))
    with look():
        figure, axes = new_axes(4.2 * len(whens) + 0.6, 4.2, 1, len(whens))
        for ax, when in zip(axes[0], whens, strict=True):
            square = (
                table[table["when"] == when]
                .pivot(index="i", columns="j", values="cosine")
                .loc[order["i"], order["i"]]
            )
            image = ax.imshow(square, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
            for edge in edges[:-1]:
                ax.axhline(edge - 0.5, color="black", linewidth=0.8)
                ax.axvline(edge - 0.5, color="black", linewidth=0.8)
            middle = edges - counts / 2 - 0.5
            names = [CLASS_NAMES[c].replace(" ", "\n") for c in counts.index]
            ax.set_xticks(middle, names)
            ax.set_yticks(middle, names)
            ax.set_title(f"{when} stage 1")
            ax.grid(False)
        figure.colorbar(
            image,
            ax=axes[0].tolist(),
            label=f"cosine at layer {table['layer'].iloc[0]}",
            shrink=0.8,
        )
    return figure


def maps_before_after(table: pd.DataFrame) -> Figure:
    """Two principal components of held-out prompts at ℓ, before and after stage 1: colour is the class, marker the form."""
    need(table, "when", "x", "y", "label", "form", "layer")
    whens = list(dict.fromkeys(table["when"]))
    with look():
        figure, axes = new_axes(4 * len(whens), 4, 1, len(whens))
        for ax, when in zip(axes[0], whens, strict=True):
            for (label, form), rows in table[table["when"] == when].groupby(
                ["label", "form"], sort=False
            ):
                ax.scatter(
                    rows["x"],
                    rows["y"],
                    color=CLASS_COLOURS[label],
                    marker=FORM_MARKERS[form],
                    s=34,
                    alpha=0.8,
                    edgecolor="white",
                    linewidth=0.4,
                    label=f"{CLASS_NAMES[label]}, {form}",
                )
            ax.set(
                title=f"layer {table['layer'].iloc[0]}, {when}",
                xlabel="component 1",
                ylabel="component 2",
            )
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def drift_by_layer(table: pd.DataFrame) -> Figure:
    """How far each class moved from the base at every layer; the line marks ℓ, above which no weight moved."""
    need(table, "layer", "label", "drift", "refined_at")
    with look():
        figure, axes = new_axes(5.5, 3.4)
        ax = axes[0, 0]
        for label, rows in table.groupby("label", sort=False):
            ax.plot(
                rows["layer"],
                rows["drift"],
                CLASS_LINES[label],
                color=CLASS_COLOURS[label],
                marker=".",
                label=CLASS_NAMES[label],
            )
        ax.axvline(table["refined_at"].iloc[0], color="black", linewidth=0.9)
        ax.annotate(
            "ℓ",
            (table["refined_at"].iloc[0], 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            va="top",
        )
        ax.set(
            xlabel="layer (blocks run)",
            ylabel="‖h − h₀‖² / ‖h₀‖²",
            title="Drift from the base",
            ylim=(0, None),
        )
        ax.legend()
    return figure


def kernel_before_after(table: pd.DataFrame) -> Figure:
    """Normalised kernel similarity of toxic prompts with each class, before and after stage 1, 95 % over prompts."""
    need(table, "when", "class_b", "normalised", "normalised_low", "normalised_high")
    whens = list(dict.fromkeys(table["when"]))
    with look():
        figure, axes = new_axes(5, 3.4)
        ax = axes[0, 0]
        for label, rows in table.groupby("class_b", sort=False):
            rows = rows.set_index("when").loc[whens]
            half = (
                rows["normalised"] - rows["normalised_low"],
                rows["normalised_high"] - rows["normalised"],
            )
            ax.errorbar(
                range(len(whens)),
                rows["normalised"],
                yerr=[h.clip(lower=0) for h in half],
                capsize=3,
                marker="o",
                linestyle=CLASS_LINES[label],
                color=CLASS_COLOURS[label],
                label=f"toxic with {CLASS_NAMES[label]}",
            )
        ax.set_xticks(range(len(whens)), [f"{w} stage 1" for w in whens])
        ax.set(
            ylabel="‖K(x', x)‖ / ‖K(x', x')‖",
            ylim=(0, None),
            xlim=(-0.3, len(whens) - 0.7),
            title="Kernel similarity",
        )
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def layer_choice(table: pd.DataFrame) -> Figure:
    """The sweep behind `layer="auto"`: held-out cosines, general-prompt drift, and the score that chose, by candidate ℓ."""
    need(table, "layer", "within_similarity", "cross_similarity", "general_drift", "score")
    rows = table.sort_values("layer")
    best = rows.loc[rows["score"].idxmax()]
    with look():
        figure, axes = new_axes(9, 3.2, 1, 3)
        axes[0, 0].plot(
            rows["layer"], rows["within_similarity"], "s:", color="#0072B2", label="within a class"
        )
        axes[0, 0].plot(
            rows["layer"], rows["cross_similarity"], "o-", color="#D55E00", label="across"
        )
        axes[0, 0].set(ylabel="mean held-out cosine at ℓ", title="Similarity")
        axes[0, 0].legend()
        axes[0, 1].plot(rows["layer"], rows["general_drift"], "o-", color=CLASS_COLOURS["general"])
        axes[0, 1].set(ylabel="‖h − h₀‖² / ‖h₀‖²", title="Drift of general prompts")
        axes[0, 2].plot(rows["layer"], rows["score"], "o-", color="#333333")
        axes[0, 2].plot(
            best["layer"], best["score"], "*", markersize=15, color="#CC79A7", label="chosen"
        )
        axes[0, 2].set(ylabel="within − across − drift", title="Score")
        axes[0, 2].legend()
        for ax in axes[0]:
            ax.set_xlabel("candidate ℓ (blocks)")
    return figure
