"""What the base model tells apart: sentence form, separability by layer, sources, the kernel."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dcr.plots.panels import Curves, Dots, Size, curves, dots, grid, legend, scatter
from dcr.plots.style import FORMS, drawing, looks, said

AUROC = "AUROC, toxic against seemingly toxic"
LAYER = "layer (blocks run)"


@drawing
def question_shares(table: pd.DataFrame) -> Figure:
    """Share of questions in each set: in stage 1 (among the last rows) the form alone gives the
    label.
    """
    named = table["set"] + table["n"].map(" (n={})".format)
    how = Dots("named", "", "label", "share of questions in the set", width=4.2)
    return dots(table.assign(named=named), "question_share", how)


@drawing
def separability(table: pd.DataFrame) -> Figure:
    """Separability by layer (paper figure 4): AUROC of a linear probe on hidden states (band: 95 %
    interval), beside surface baselines that read no model (straight lines).
    """
    probe, surface = table[table["layer"] >= 0], table[table["layer"] < 0]
    ends = [surface.assign(layer=end, low=None) for end in probe["layer"].agg(["min", "max"])]
    how = Curves("layer", "reader", "pairing", LAYER, "AUROC", (0, 1.03))
    return curves(pd.concat([probe, *ends], ignore_index=True), "auroc", how)


@drawing
def transfer(table: pd.DataFrame) -> Figure:
    """The probe read on sets it was not fitted on (95 % intervals); below 0.5 it follows form, not
    harm.
    """
    how = Curves("layer", "tested_on", "pairing", LAYER, "AUROC", (0, 1.03))
    return curves(table, "auroc", how)


@drawing
def probe_cells(table: pd.DataFrame) -> Figure:
    """The probe by the forms of toxic and harmless prompts, at one layer (95 % intervals): a
    reader of harm is equally good in all four.
    """
    cells = table[table["toxic_form"].isin(FORMS) & table["harmless_form"].isin(FORMS)]
    pair = "toxic " + cells["toxic_form"] + "s, harmless " + cells["harmless_form"] + "s"
    label = f"AUROC on held-out requests, layer {table['layer'].iloc[0]}"
    how = Dots("pair", "pairing", "", label, zero=0.5, width=2.3)
    return dots(cells.assign(pair=pair), "auroc", how)


@drawing
def source_shortcut(table: pd.DataFrame) -> Figure:
    """The source is a second shortcut: what a probe was fitted on (colour), read on harmless
    sources, forms equal (95 % intervals). Hollow, and not in the mean: the probe's own source, and
    one that some method met in training. Where the two classes come from different hands, it
    reads the hand.
    """
    rows = by_source(table)
    how = Dots("source", "", "pairing", AUROC, zero=0.5, width=4.4, shade=["mean"])
    return dots(rows.assign(hollow=rows.get("met", False)), "auroc", how)


def by_source(table: pd.DataFrame) -> pd.DataFrame:
    """Rows with forms weighted equally, not of single pairs of forms; the mean of sources last."""
    equal = table[~table["toxic_form"].isin(FORMS) & ~table["harmless_form"].isin(FORMS)]
    return equal.sort_values("source", key=lambda s: s == "mean", kind="stable")


@drawing
def map_(table: pd.DataFrame) -> Figure:
    """Hidden states on their first two principal components, by layer: colour is the class, marker
    the form.
    """
    panel = table["pairing"] + ", layer " + table["layer"].astype(str)
    return scatter(table.assign(panel=panel), "panel")


@drawing
def kernel(table: pd.DataFrame) -> Figure:
    """Kernel of the first answer token between classes, normalised by that of a prompt with
    itself, in the base model and after each method's stage 1: how much a step on x moves x' (95 %
    intervals).
    """
    rows = table.rename(columns={"normalised_low": "low", "normalised_high": "high"})
    panel = "x' " + rows["class_a"].map(said)
    how = Dots("class_b", "panel", "method", "‖K(x', x)‖ / ‖K(x', x')‖; rows: x", None, width=2.2)
    return dots(rows.assign(panel=panel), "normalised", how)


@drawing
def proposition(table: pd.DataFrame) -> Figure:
    """Proposition 1: |h'ᵀh| at ℓ against the kernel's norm, a dot a pair of prompts; dashed, the
    bound at the smallest constant that holds for all.
    """
    groups = list(table.groupby(["method", "stage"], sort=False))
    look = looks(dict.fromkeys(table["pair"]))
    figure, axes = grid(len(groups), Size(3.4, 3.2, 3), sharey=True)
    for ax, ((method, stage), rows) in zip(axes, groups, strict=True):
        for pair, part in rows.groupby("pair", sort=False):
            style = {k: look[pair][k] for k in ("marker", "color")} | {"s": 14, "alpha": 0.65}
            ax.scatter(part["bilinear"], part["kernel"], label=str(pair).replace("_", " "), **style)
        ends, check = rows["bilinear"].agg(["min", "max"]), rows.iloc[0]
        ax.plot(ends, check["constant"] * ends, color="black", linestyle="--", label="bound")
        told = "Spearman {spearman:.2f} [{low:.2f}, {high:.2f}]".format(**check)
        name = "base" if method == "base" else f"{method}, {stage}"
        ax.set(xscale="log", yscale="log", title=f"{name}\n{told}")
        ax.set_xlabel(f"|h'ᵀh| at layer {check['layer']}")
        ax.minorticks_off()
        for axis, values in ((ax.xaxis, rows["bilinear"]), (ax.yaxis, table["kernel"])):
            if values.max() < 10 * values.min():  # less than a decade holds no power of ten
                axis.set_major_locator(MaxNLocator(3))
                axis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("‖K(x', x)‖")
    legend(figure, axes, "lower", 3)
    return figure
