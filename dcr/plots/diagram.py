"""The two stages as a drawing."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from dcr.plots.common import new_axes
from dcr.style import look


def overview() -> Figure:
    """The two stages as a diagram (paper figure 2)."""
    boxes = [(0.2, "toxic and\nseemingly toxic\nprompts", "#F0E442"),
             (2.5, "stage 1: contrastive\nrefinement of blocks\nbelow ℓ", "#56B4E9"),
             (5.0, "refined model:\nclasses apart\nat layer ℓ", "#DDDDDD"),
             (7.3, "stage 2: safety\nalignment (SFT on\ngeneral + refusals)", "#E69F00"),
             (9.8, "aligned model:\nrefusals do not\nspill over", "#DDDDDD")]
    with look():
        figure, axes = new_axes(11, 2.0)
        ax = axes[0, 0]
        for x, text, colour in boxes:
            ax.add_patch(FancyBboxPatch((x, 0.2), 1.9, 1.0, boxstyle="round,pad=0.06", fc=colour, ec="black", alpha=0.75))
            ax.text(x + 0.95, 0.7, text, ha="center", va="center", fontsize=9)
        for (x, *_), (after, *_) in zip(boxes, boxes[1:], strict=False):
            ax.add_patch(FancyArrowPatch((x + 1.98, 0.7), (after - 0.08, 0.7), arrowstyle="-|>", mutation_scale=14, color="black"))
        ax.set(xlim=(0, 12), ylim=(0, 1.4))
        ax.axis("off")
    return figure
