"""Where methods stand: the plane, the frontier, forms, sources, categories, robustness, cost."""

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dcr.plots.panels import Dots, Size, dots, grid, heat, legend, spread
from dcr.plots.representations import by_source
from dcr.plots.style import FORMS, Look, drawing, in_order, method_look, said

PANELS = {"published": "as published", "equal": "forms equal"}
CLASSES = ("seemingly_toxic", "toxic")
MOST, LEAST = 24, 5  # categories a class in the heat map, prompts a category


@drawing
def plane(table: pd.DataFrame) -> Figure:
    """Compliance against safety, sets weighted equally: left as published (harmless prompts are
    mostly questions, toxic ones imperatives), right with both forms weighted equally. Large:
    the finished method (95 % intervals); thin, where there are more than two: checkpoints or
    strengths. The question-mark rule reads no model.
    """
    names = [p for p in PANELS if p in set(table["forms"])]
    figure, axes = grid(len(names), Size(3.5, 3.5, 2, 1.4), sharex=True, sharey=True)
    for ax, name in zip(axes, names, strict=True):
        part = table[table["forms"] == name]
        for method in in_order(part["method"]):
            _way(ax, method, part[part["method"] == method])
        ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), box_aspect=1, title=PANELS[name])
        ax.set_xlabel("defence success rate")
        arrow = {"arrowstyle": "->", "color": "#888888"}
        ax.annotate("better", (1, 1), (0.8, 0.94), color="#888888", fontsize=9, arrowprops=arrow)
    axes[0].set_ylabel("compliance")
    legend(figure, axes, "lower", 5)
    return figure


def _way(ax: Axes, method: str, rows: pd.DataFrame) -> None:
    """One method: a thin line through its checkpoints, a large point where it is known by."""
    look = method_look(method)
    way = rows.assign(last=rows["step"] < 0).sort_values(["last", "step"])
    if len(way) > 2:
        thin: Look = {"linewidth": 0.7, "alpha": 0.35, "marker": ".", "markersize": 3}
        ax.plot(way["dsr"], way["compliance"], **(look | thin))
    nominal = way[way["nominal"].astype(bool)]
    point = (nominal if len(nominal) else way).tail(1)
    bars: Look = {
        a: spread(point, m, f"{m}_low", f"{m}_high")
        for a, m in (("xerr", "dsr"), ("yerr", "compliance"))
    }
    mark = look | {"linestyle": "none", "markersize": 8, "elinewidth": 0.9}
    edge: Look = {"markeredgecolor": "white", "markeredgewidth": 0.5, "zorder": 5, "label": method}
    ax.errorbar(point["dsr"], point["compliance"], **bars, **mark, **edge)


@drawing
def frontier(table: pd.DataFrame) -> Figure:
    """Compared at equal safety: the threshold on a method's refusal score is set on validation
    prompts for the DSR named, and read on test prompts, sets and forms weighted equally; beside
    it the DSR that it really gives (95 % intervals over requests and seeds).
    """
    parts = []
    for target, rows in table.groupby("target"):
        real = rows.assign(compliance=rows["dsr"], low=rows["dsr_low"], high=rows["dsr_high"])
        parts += [
            rows.assign(panel=f"compliance\nat DSR {target:.2f}"),
            real.assign(panel=f"DSR given\n(aim {target:.2f})"),
        ]
    how = Dots("method", "panel", "", "share of test prompts")
    figure = dots(pd.concat(parts, ignore_index=True), "compliance", how)
    for ax, target in zip(figure.axes[1::2], sorted(set(table["target"])), strict=True):
        ax.axvline(target, color="black", linewidth=0.9, linestyle="--", zorder=0)
    return figure


@drawing
def frontier_differences(table: pd.DataFrame) -> Figure:
    """Paired difference of compliance at equal safety to each baseline (95 % intervals; filled:
    Holm-corrected p below 0.05 over this table). Right of the line is better.
    """
    table = table.sort_values("target", kind="stable")  # a row of panels a measure
    at = table["target"].map("compliance at DSR {:.2f}".format)
    at = at.where(table["target"].notna(), "AUROC")
    panel = at + "\nagainst " + table["against"]
    rows = table.assign(panel=panel, row=table["method"])
    return _differences(rows, "of the share or AUROC", across=table["against"].nunique())


@drawing
def paired(table: pd.DataFrame) -> Figure:
    """Paired difference on each benchmark (95 % intervals; filled: Holm-corrected p below 0.05
    over the whole table): compliance on harmless sets, DSR on toxic ones (grey rows). Right of the
    line is better. Less the first baseline; the table holds all of them.
    """
    rows = table[(table["version"] == "published") & (table["form"] == "all")]
    rows = rows[rows["against"] == rows["against"].iloc[0]]
    mean = rows["benchmark"] == "mean"
    row = rows["benchmark"].mask(mean, "mean, " + rows["label"].map(said))
    panel = rows["method"] + "\n− " + rows["against"]
    toxic = list(row[rows["label"] == "toxic"])
    return _differences(rows.assign(panel=panel, row=row), "of rates", 7, toxic)


def _differences(table: pd.DataFrame, what: str, across: int, shade: Sequence[str] = ()) -> Figure:
    """Dots around 0, filled where the corrected p is below 0.05."""
    sure = np.where(table["p_holm"] < 0.05, "p < 0.05", "p ≥ 0.05")
    look: Look = {"zero": 0, "across": across, "shade": shade}
    how = Dots("row", "panel", "sure", f"difference {what}", _reach(table), **look, width=1.3)
    return dots(table.assign(sure=sure, hollow=table["p_holm"] >= 0.05), "difference", how)


def _reach(table: pd.DataFrame) -> tuple[float, float]:
    """Limits of an axis of differences: as far left as right."""
    reach = 1.06 * float(np.nanmax(np.abs(table[["low", "high", "difference"]].to_numpy(float))))
    return -reach, reach


@drawing
def auroc_by_source(table: pd.DataFrame) -> Figure:
    """How well a method's refusal score orders toxic above harmless prompts, by harmless source,
    forms equal (95 % intervals). Sources are averaged (last panel), never pooled; one that some
    method met in training is not in the mean.
    """
    rows = by_source(table)
    met = rows["met"] & (not rows["met"].all())  # where all are met, all are averaged
    panel = rows["source"] + met.map({True: "\n(met; not in\nthe mean)", False: ""})
    how = Dots("method", "panel", "", "AUROC of the refusal score", zero=0.5, across=6, width=1.5)
    return dots(rows.assign(panel=panel), "auroc", how)


@drawing
def gap(table: pd.DataFrame) -> Figure:
    """Where each method stands between its refusals and its probe: AUROC of its refusal score and
    of a probe on its hidden states at ℓ (open), both on the first requests of each set, harmless
    sources averaged, forms equal (95 % intervals). Between the two lies harm that is read and not
    used.
    """
    probe = table["reader"] == "probe"
    mark = ("probe " + table["stage"]).where(probe, "refusal")
    how = Dots("method", "", "mark", "AUROC", None, zero=0.5, width=4.2)
    return dots(table.assign(mark=mark, hollow=probe), "auroc", how)


@drawing
def rates_by_form(table: pd.DataFrame) -> Figure:
    """The shortcut: refusal rate by benchmark and form, each set with its form-swapped version (95
    % intervals; in brackets the share of questions as published). A method that reads harm
    refuses a toxic set (grey) in both forms and a harmless one in neither.
    """
    rows = table[table["form"].isin(FORMS)]
    named = rows["benchmark"] + rows["question_share"].map(" ({:.0%})".format)
    toxic = list(named[rows["label"] == "toxic"])
    how = Dots("named", "method", "form", "refusal rate", across=7, width=1.3, shade=toxic)
    return dots(rows.assign(named=named), "value", how)


@drawing
def template_effect(table: pd.DataFrame) -> Figure:
    """What the template does: compliance (harmless) or DSR (toxic) of prompts written in a form,
    less that of prompts that a template put into it (95 % intervals).
    """
    panel = table["label"].map(said) + "\n" + table["form"] + "s"
    label = "difference of rates, natural − template"
    how = Dots("method", "panel", "", label, _reach(table), 0)
    return dots(table.assign(panel=panel), "difference", how)


@drawing
def categories(table: pd.DataFrame) -> Figure:
    """Refusal rate by category of at least five prompts (their number in brackets), the most
    frequent ones of each class.
    """
    table, blocks = table[table["n"] >= min(LEAST, table["n"].max())], {}
    for label in (c for c in CLASSES if c in set(table["label"])):
        part = table[table["label"] == label].sort_values("n", ascending=False, kind="stable")
        short = part["category"].map(lambda c: textwrap.shorten(str(c), 40, placeholder=" …"))
        row = part["benchmark"] + ": " + short + part["n"].map(" ({})".format)
        whole = ["row", "category"]  # two that begin alike stay two rows
        wide = part.assign(row=row).pivot_table("value", whole, "method", sort=False)
        wide = wide.droplevel("category")
        blocks[label] = wide.head(MOST)[in_order(table["method"])]
    rows, columns = [len(b) for b in blocks.values()], table["method"].nunique()
    size = Size(0.36 * columns + 3.2, 0.2 * sum(rows) / len(rows) + 0.4, 1)
    figure, axes = grid(len(blocks), size, sharex=True, height_ratios=rows)
    for ax, (label, wide) in zip(axes, blocks.items(), strict=True):
        heat(ax, wide)
        ax.set_title(f"{said(label)}: refusal rate")
    return figure


@drawing
def robustness(table: pd.DataFrame) -> Figure:
    """Refusal of both classes under mild rewording (95 % intervals)."""
    how = Dots("wrapper", "method", "label", "refusal rate", across=6, width=1.4)
    return dots(table, "value", how)


@drawing
def ability(table: pd.DataFrame) -> Figure:
    """Change of general ability against the base model, item by item (95 % intervals): accuracy as
    a difference, perplexity as a ratio.
    """
    shown = table["metric"].isin(["acc", "perplexity"]) & (table["against"] == "base")
    rows = table[shown & (table["method"] != "base")]
    what = np.where(rows["metric"] == "perplexity", "\nperplexity ratio", "\naccuracy change")
    rows = rows.assign(panel=rows["task"] + what, low=rows["change_low"], high=rows["change_high"])
    figure = dots(rows, "change", Dots("method", "panel", "", "change to base", None))
    for ax in figure.axes:
        ax.axvline("ratio" in ax.get_title(), color="black", linewidth=0.9, zorder=0.5)
    return figure


@drawing
def judge_calibration(table: pd.DataFrame) -> Figure:
    """Judges against people on published completions: Cohen's κ (95 % intervals; no bar where none
    is known), by the model that answered.
    """
    rows = table[table["half"] == "all"].sort_values("tokens", kind="stable")
    panel = [f"first {t} tokens" if t else "whole answers" for t in rows["tokens"]]
    how = Dots("model", "panel", "judge", "Cohen's κ with people's labels", None, width=2.6)
    return dots(rows.assign(panel=panel), "kappa", how)


@drawing
def cost(table: pd.DataFrame) -> Figure:
    """What each method took: wall time of each stage (mean of seeds), and the peak memory of its
    largest. Where one method decides and another answers, theirs counts as its own.
    """
    kinds = table.groupby(["method", "kind"], sort=False, as_index=False).mean(numeric_only=True)
    most = table.groupby("method", sort=False, as_index=False)["peak_memory_mib"].max()
    seconds = kinds.assign(panel=kinds["kind"] + "\nseconds", value=kinds["seconds"])
    memory = most.assign(panel="peak memory\nMiB", value=most["peak_memory_mib"])
    how = Dots("method", "panel", "", "mean of seeds", None, across=6, width=1.4)
    figure = dots(pd.concat([seconds, memory], ignore_index=True), "value", how)
    for ax in figure.axes:
        ax.set_xlim(0, 1.05 * ax.get_xlim()[1])  # from 0, and room for the largest
        ax.locator_params(axis="x", nbins=3)
    return figure
