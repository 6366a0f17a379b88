"""The kinds of picture that figures are made of: dots with intervals, curves, heat maps, maps.

Each takes a tidy frame; `low` and `high` are the ends of an interval wherever they are known.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dcr.plots.style import CLASSES, FORMS, Look, Shown, in_order, looks, said


@dataclass(frozen=True)
class Size:
    """Inches of a panel, of the margin for labels and legend, and how many panels a row holds."""

    width: float = 2.3
    height: float = 2.1
    across: int = 4
    margin: float = 1.0


def grid(count: int, size: Size = Size(), **kwargs) -> tuple[Figure, list[Axes]]:  # noqa: B008
    """A figure and `count` axes in rows of `size.across`; kwargs go to `Figure.subplots`."""
    columns = min(size.across, count)
    rows = math.ceil(count / columns)
    inches = (max(size.width * columns + size.margin, 4.4), size.height * rows + size.margin)
    figure = Shown(figsize=inches, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **kwargs).flat)
    for i, ax in enumerate(axes[count:], count):
        axes[i - columns].tick_params(labelbottom=True)  # above an empty place: its own numbers
        ax.remove()
    return figure, axes[:count]


def legend(figure: Figure, axes: Sequence[Axes], where: str = "upper", columns: int = 4) -> None:
    """One legend of all labels of `axes`, each once; above where panels share one label below."""
    pairs = [p for ax in axes for p in zip(*ax.get_legend_handles_labels(), strict=True)]
    shown = {label: handle for handle, label in pairs}
    if shown:
        inches = 0.55 + 0.085 * max(map(len, shown))  # of the widest entry
        fit = max(1, min(columns, len(shown), int(figure.get_figwidth() / inches)))
        place: Look = {"loc": f"outside {where} center", "ncols": fit}
        figure.legend(list(shown.values()), list(shown), **place)


def split(frame: pd.DataFrame, column: str) -> list[tuple[str, pd.DataFrame]]:
    """(title, rows) of each panel, in order; one without a title where there is no column."""
    if not column:
        return [("", frame)]
    return [(str(name), frame[frame[column] == name]) for name in in_order(frame[column])]


def spread(rows: pd.DataFrame, value: str, low: str = "low", high: str = "high") -> np.ndarray:
    """[2, rows] distances from `value` to its interval's ends, for `errorbar`; 0 where unknown."""
    if low not in rows:
        return np.zeros((2, len(rows)))
    ends = np.array([rows[value] - rows[low], rows[high] - rows[value]], dtype=float)
    return np.nan_to_num(np.clip(ends, 0, None))


@dataclass(frozen=True)
class Dots:
    """Columns that are rows, panels and colours of a figure of dots; its axis and highlights."""

    rows: str
    panels: str = ""
    hue: str = ""
    label: str = ""
    limits: tuple[float, float] | None = (-0.03, 1.03)
    zero: float | None = None  # a line at the value that says "nothing"
    across: int = 4
    width: float = 1.9
    shade: Sequence[str] = ()  # rows on grey


def dots(frame: pd.DataFrame, value: str, how: Dots) -> Figure:
    """A dot with its interval a row, a panel each value of `how.panels`, aside by `how.hue`.

    Dots are not filled where a column `hollow` says so.
    """
    names, parts = in_order(frame[how.rows]), split(frame, how.panels)
    coloured = how.hue or (how.rows if how.rows == "method" else how.panels or how.rows)
    hues = in_order(frame[coloured])
    places = [how.rows, *([how.panels] if how.panels else [])]
    beside = len(hues) if frame.groupby(places)[coloured].nunique().max() > 1 else 1
    look, margin = looks(hues), 0.6 + 0.075 * max(len(said(n)) for n in names)
    title = max(len(line) for name, _ in parts for line in name.split("\n"))
    height = (0.15 + 0.055 * beside) * len(names) + 0.55
    size = Size(max(how.width, 0.085 * title), height, how.across, margin)
    figure, axes = grid(len(parts), size, sharey=True, sharex=how.limits is not None)
    for ax, (panel, part) in zip(axes, parts, strict=True):
        known = part.dropna(subset=[value])
        for (hue, name), mine in known.groupby([coloured, how.rows], sort=False):
            aside = 0.6 * ((hues.index(hue) + 0.5) / beside - 0.5) if beside > 1 else 0
            style: Look = look[hue] | {"linestyle": "none", "markersize": 4.5, "elinewidth": 0.9}
            hollow = "hollow" in mine and mine["hollow"].any()
            style |= {"markerfacecolor": "white" if hollow else look[hue]["color"]}
            style |= {"label": said(hue)} if how.hue else {}
            y = np.full(len(mine), names.index(name) + aside)
            ax.errorbar(mine[value], y, xerr=spread(mine, value), **style)
        for place in (i for i, name in enumerate(names) if name in how.shade):
            ax.axhspan(place - 0.5, place + 0.5, color="#ececec", linewidth=0, zorder=0)
        if how.zero is not None:
            ax.axvline(how.zero, color="black", linewidth=0.9, zorder=1)
        ax.set(title=panel, ylim=(len(names) - 0.5, -0.5), xlim=how.limits)
        ax.set_yticks(range(len(names)), [said(n) for n in names], fontsize=8.5)
        ax.locator_params(axis="x", nbins=4)
    figure.supxlabel(how.label, fontsize=10)
    legend(figure, axes)
    return figure


@dataclass(frozen=True)
class Curves:
    """Columns that are the x axis, colours and panels of a figure of curves; its labels."""

    x: str
    hue: str
    panels: str = ""
    xlabel: str = ""
    ylabel: str = ""
    limits: tuple[float | None, float | None] | None = (-0.03, 1.03)
    size: Size = Size(2.5, 2.2, 3, 1.3)


def curves(frame: pd.DataFrame, value: str, how: Curves) -> Figure:
    """A line a hue, a panel each value of `how.panels`; a column `seed`: mean and range of seeds.

    An interval is a band; bars beside one another where bands of many lines would hide all, and
    over steps where one seed alone stands behind any of them.
    """
    parts, hues, steps = split(frame, how.panels), in_order(frame[how.hue]), how.x == "step"
    figure, axes = grid(len(parts), how.size, sharex=True, sharey=how.limits is not None)
    look = looks(hues)
    seeds = frame.groupby(how.hue)["seed"].nunique() if "seed" in frame else frame.get("seeds")
    one = steps and (seeds is None or seeds.min() == 1)
    for ax, (panel, part) in zip(axes, parts, strict=True):
        for i, hue in enumerate(hues):
            rows = part[part[how.hue] == hue].dropna(subset=[value]).sort_values(how.x)
            if "seed" in rows:
                ends = rows.groupby(how.x)[value].agg(low="min", high="max")
                rows = ends.assign(**{value: rows.groupby(how.x)[value].mean()}).reset_index()
            if rows.empty:
                continue
            style: Look = look[hue] | {"label": said(hue), "elinewidth": 0.8, "markersize": 4}
            style |= {"marker": ""} if len(rows) > 20 else {}
            if one or len(hues) > 3:
                room = rows[how.x].where(rows[how.x] > 0, 1) if steps else frame[how.x].max() / 40
                x = rows[how.x] + 0.08 * (i / max(1, len(hues) - 1) - 0.5) * room
                ax.errorbar(x, rows[value], yerr=spread(rows, value), **style)
                continue
            ax.errorbar(rows[how.x], rows[value], **style)
            if "low" in rows:
                low, high = rows["low"].astype(float), rows["high"].astype(float)
                fill: Look = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
                ax.fill_between(rows[how.x], low, high, **fill)
        if steps:
            log_steps(ax, frame["step"])
        ax.set(title=panel, ylim=how.limits)
    figure.supxlabel(how.xlabel, fontsize=10)
    figure.supylabel(how.ylabel, fontsize=10)
    legend(figure, axes)
    return figure


def log_steps(ax: Axes, steps: pd.Series) -> None:
    """A logarithmic axis whose ticks are steps of the table, at most about six, well apart."""
    after = sorted(set(steps[steps > 0]))
    apart = max(1.3, (after[-1] / after[0]) ** 0.2) if after else 1
    ticks = [0] if (steps == 0).any() else []
    for step in after:
        ticks += [step] if not ticks or step >= apart * ticks[-1] else []
    ax.set_xscale("symlog", linthresh=after[0] if after else 1)
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_xticks([], minor=True)


def heat(ax: Axes, wide: pd.DataFrame) -> None:
    """A heat map from 0 to 1 with its numbers in the cells; grey where there is none."""
    cells: Look = {"annot": True, "fmt": ".2f", "annot_kws": {"fontsize": 6.5}, "cmap": "Blues"}
    lines = {"linewidths": 0.4, "linecolor": "white", "cbar": False}
    ticks = {"xticklabels": [said(c) for c in wide], "yticklabels": [said(c) for c in wide.index]}
    sns.heatmap(wide, ax=ax, vmin=0, vmax=1, **(cells | lines | ticks))
    ax.set(xlabel="", ylabel="", facecolor="#dddddd")
    ax.grid(False)
    ax.tick_params(axis="y", labelrotation=0, labelsize=8)
    for label in ax.get_xticklabels():
        label.set(rotation=60, ha="right", rotation_mode="anchor", fontsize=8)


def scatter(frame: pd.DataFrame, panels: str) -> Figure:
    """Prompts on two components (x, y), a panel each value of `panels`; class and form apart."""
    parts = split(frame, panels)
    figure, axes = grid(len(parts), Size(2.6, 2.4, 3, 1.3))
    for ax, (name, part) in zip(axes, parts, strict=True):
        for (label, form), rows in part.groupby(["label", "form"]):
            mark: Look = {"color": CLASSES[label]["color"], "marker": FORMS[form]["marker"]}
            mark |= {"s": 22, "alpha": 0.75, "edgecolor": "white", "linewidth": 0.4}
            ax.scatter(rows["x"], rows["y"], **mark, label=f"{said(label)}, {form}")
        ax.set_title(name)
    figure.supxlabel("first principal component", fontsize=10)
    figure.supylabel("second principal component", fontsize=10)
    legend(figure, axes, columns=3)
    return figure
