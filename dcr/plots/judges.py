"""Judges against people: κ of each judge on each completion model it did not see."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dcr.plots.common import need, new_axes
from dcr.plots.style import look

JUDGE_LOOK = {
    "phrases": ("#E69F00", "s"),
    "learned": ("#009E73", "^"),
    "consensus": ("#0072B2", "o"),
}
AIM = 0.85


def calibration(table: pd.DataFrame) -> Figure:
    """κ (refuse against comply) with 95 % bootstrap intervals; one panel a length of the answer, one row a left-out model.

    table: rows of `dcr.evaluate.judges.calibration.calibration`. The black bar of a row is the agreement of the two annotators.
    """
    need(table, "judge", "model", "tokens", "half", "kappa", "low", "high")
    rows = table[table["half"] == "all"]
    ceiling = rows[rows["judge"] == "annotators"].set_index("model")["kappa"]
    rows = rows[rows["judge"] != "annotators"]
    models, cuts, judges = (list(dict.fromkeys(rows[c])) for c in ("model", "tokens", "judge"))
    with look():
        figure, axes = new_axes(
            2.6 * len(cuts) + 1.2, 0.65 * len(models) + 1.7, 1, len(cuts), sharey=True
        )
        for ax, cut in zip(axes[0], cuts, strict=True):
            for k, name in enumerate(judges):
                mine = (
                    rows[(rows["tokens"] == cut) & (rows["judge"] == name)]
                    .set_index("model")
                    .reindex(models)
                )
                y = np.arange(len(models)) + 0.22 * (k - (len(judges) - 1) / 2)
                colour, marker = JUDGE_LOOK.get(name.split("+")[0], ("#CC79A7", "D"))
                error = np.clip(
                    [mine["kappa"] - mine["low"], mine["high"] - mine["kappa"]], 0, None
                )
                ax.errorbar(
                    mine["kappa"],
                    y,
                    xerr=error,
                    fmt=marker,
                    color=colour,
                    markersize=5,
                    elinewidth=1,
                    label=name,
                )
            for i, model in enumerate(models):
                ax.plot(
                    [ceiling.get(model, np.nan)] * 2,
                    [i - 0.4, i + 0.4],
                    color="black",
                    linewidth=1.5,
                    label="two annotators" if i == 0 else None,
                )
            ax.axvline(AIM, color="#999999", linestyle=":", linewidth=1, label=f"aim {AIM}")
            ax.set(
                title=f"first {cut} tokens" if cut else "whole answers",
                yticks=range(len(models)),
                yticklabels=models,
                xlim=(min(0.4, float(rows["low"].min()) - 0.03), 1.02),
            )
        axes[0, 0].invert_yaxis()
        figure.supxlabel("Cohen's κ with people's labels (95 % bootstrap)", fontsize=10)
        figure.legend(
            *axes[0, 0].get_legend_handles_labels(),
            loc="outside upper center",
            ncols=len(judges) + 2,
        )
    return figure
