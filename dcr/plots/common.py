"""What every figure does: check its table, lay out labelled axes, one legend for all panels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dcr.errors import DCRError

COLUMN = 7.2  # inches: no figure's panel row is wider than a text column allows


def need(table: pd.DataFrame, *columns: str) -> None:
    """Raise DCRError when columns or rows are missing, or profiles are mixed."""
    missing = [c for c in columns if c not in table]
    if missing or table.empty:
        raise DCRError(
            f"figure data: {'no rows' if table.empty else 'no column ' + ', '.join(missing)}; run the notebook "
            "that writes this table first."
        )
    if "profile" in table and table["profile"].nunique() > 1:
        raise DCRError(
            f"figure data mixes profiles {sorted(table['profile'].unique())}; draw one profile at a time."
        )


class Shown(Figure):
    """A figure that a notebook shows by itself, without pyplot and its global state: the same bytes as the saved PNG."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        from dcr.plots.style import picture

        width, height = self.get_size_inches()
        return picture(self, "png"), {"width": round(100 * width), "height": round(100 * height)}


def new_axes(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs):
    """(figure, axes [rows, columns]) of a size in inches; kwargs go to `Figure.subplots`."""
    figure = Shown(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.07)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def panels(
    count: int, height: float, *, across: int = 4, width: float = 2.3, extra: float = 1.0, **kwargs
):
    """(figure, list of `count` axes) wrapped into rows of at most `across` panels; unused axes are removed.

    height, width: inches a panel; extra: inches added for shared labels and legend, both ways.
    """
    columns = min(across, count)
    rows = -(-count // columns)
    figure, axes = new_axes(
        max(width * columns + extra, 4.2), height * rows + extra, rows, columns, **kwargs
    )
    flat = list(axes.flat)
    for i, ax in enumerate(flat[count:], count):
        above = flat[i - columns]
        above.tick_params(
            labelbottom=True
        )  # shared axes: the panel above an empty place shows its own numbers
        ax.remove()
    return figure, flat[:count]


def one_legend(figure: Figure, axes, columns: int = 4, where: str = "lower") -> None:
    """One legend of all labels in `axes`, each label once, below ("lower") or above ("upper") the panels.

    Above where the panels share one label below: the layout would print one over the other.
    """
    handles = {
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc=f"outside {where} center",
            ncols=min(columns, len(handles)),
        )


def log_steps(ax, steps: pd.Series) -> None:
    """A logarithmic axis of steps, with plain numbers at 0, 1, 2, 5, 10 ... or, where those crowd, at powers of ten.

    Steps of less than a decade, none of them 0, are named themselves, as far as they stand apart.
    """
    first, last = steps.min(), steps.max()
    if 0 < first < last < 10 * first:
        ticks = [first]
        for step in sorted(set(steps)):
            ticks += [step] if step > 1.25 * ticks[-1] else []
        ax.set(xscale="log", xlim=(first / 1.15, last * 1.15))
    else:
        ax.set_xscale("symlog", linthresh=1)
        ticks = [0, *(m * 10**e for e in range(8) for m in (1, 2, 5) if m * 10**e <= last)]
        ticks = ticks if len(ticks) < 8 else [t for t in ticks if str(t)[0] in "01"]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.set_xticks([], minor=True)


def few_log_ticks(axis, low: float, high: float) -> None:
    """A logarithmic axis over less than a decade: a few plain numbers, where the default would print them over each other."""
    if low > 0 and high / low < 10:
        ticks = [
            t
            for t in MaxNLocator(3, steps=[1, 2, 5, 10]).tick_values(low, high)
            if low <= t <= high
        ]
        axis.set_ticks(ticks or [low, high], [f"{t:.6g}" for t in ticks or [low, high]])
        axis.set_ticks([], minor=True)


def half_widths(
    rows: pd.DataFrame | Mapping, value: str = "value", low: str = "low", high: str = "high"
) -> np.ndarray:
    """(2, rows) distances from value to both ends of its interval, for `errorbar`; never negative, 0 where unknown."""
    return np.nan_to_num(np.clip([rows[value] - rows[low], rows[high] - rows[value]], 0, None))


def trace(ax, rows: pd.DataFrame, x: str, value: str, low: str, high: str, **look) -> None:
    """A curve with its interval: a band where several seeds stand behind it, bars over prompts where only one does."""
    if rows.get("seeds", pd.Series([1])).max() > 1:
        ax.plot(rows[x], rows[value], **look)
        ax.fill_between(
            rows[x], rows[low], rows[high], color=look["color"], alpha=0.15, linewidth=0
        )
    else:
        ax.errorbar(
            rows[x],
            rows[value],
            yerr=half_widths(rows, value, low, high),
            elinewidth=0.8,
            capsize=2,
            **look,
        )


def note(message: str) -> Figure:
    """A picture that says what is missing and which notebook to run."""
    import textwrap

    figure, axes = new_axes(6.4, 1.3)
    axes[0, 0].text(
        0.5,
        0.5,
        "\n".join(textwrap.wrap(message, 72)),
        ha="center",
        va="center",
        fontsize=10,
        family="DejaVu Sans",
    )
    axes[0, 0].set(xticks=[], yticks=[])
    return figure
