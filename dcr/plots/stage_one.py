"""Stage 1: held-out similarity while classes part."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from dcr.plots.common import need, new_axes
from dcr.style import METHOD_COLOURS, METHOD_LINES, look


def refinement(table: pd.DataFrame) -> Figure:
    """Stage 1: held-out cosine between and within classes, and the held-out probe, over steps; a panel each."""
    need(table, "step", "cross_similarity", "within_similarity", "probe_auroc", "method")
    with look():
        figure, axes = new_axes(8, 3.4, 1, 2)
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
