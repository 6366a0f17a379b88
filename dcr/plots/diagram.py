"""The two stages as a drawing."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from dcr.plots.common import new_axes
from dcr.plots.style import CLASS_COLOURS, look

BLOCKS, BELOW = 6, 4  # drawn blocks, and how many lie below ℓ


def overview() -> Figure:
    """The two stages as a diagram (paper figure 2): what moves, what is frozen, and what each loss sees."""
    with look():
        figure, axes = new_axes(7.2, 3.5)
        ax = axes[0, 0]
        ax.text(2.35, 4.55, "Stage 1: contrastive refinement", ha="center", weight="bold")
        ax.text(8.05, 4.55, "Stage 2: safety alignment", ha="center", weight="bold")
        _stack(ax, 2.0, below="#A9D3EE", above="white", hatch="////")
        _stack(ax, 7.7, below="#FBD9A0", above="#FBD9A0", hatch="")
        ax.plot([1.85, 2.95], [0.5 + 0.55 * BELOW] * 2, color="black", linewidth=1.4)
        ax.text(1.78, 0.5 + 0.55 * BELOW, "layer ℓ", ha="right", va="center", fontsize=9)
        ax.text(1.82, 3.35, "frozen,\nnot run", ha="right", va="center", fontsize=8.5)
        ax.text(1.82, 1.25, "trained", ha="right", va="center", fontsize=8.5)
        _prompts(ax, 2.4, "toxic and seemingly toxic prompts")
        _prompts(ax, 8.1, "general instructions, toxic prompts")
        _arrow(ax, (2.9, 0.5 + 0.55 * BELOW), (3.35, 0.5 + 0.55 * BELOW))
        _cloud(ax, 4.35, 3.35, apart=False)
        _cloud(ax, 4.35, 1.55, apart=True)
        _arrow(ax, (4.35, 2.82), (4.35, 2.12))
        ax.text(4.47, 2.47, "Circle loss", fontsize=8.5, va="center")
        _arrow(ax, (5.55, 1.55), (7.6, 1.55))
        ax.text(6.57, 1.67, "refined model", ha="center", va="bottom", fontsize=8.5)
        _arrow(ax, (8.65, 3.5), (9.1, 3.5))
        ax.text(9.15, 3.5, "answers and\nrefusals\n(next-token\nloss)", fontsize=8.5, va="center")
        ax.text(7.62, 2.6, "all blocks\n(adapters)", ha="right", va="center", fontsize=8.5)
        ax.text(
            9.15,
            1.35,
            "refusing toxic\nprompts moves\nharmless ones\nless",
            fontsize=8.5,
            va="center",
            style="italic",
        )
        ax.set(xlim=(0.4, 10.9), ylim=(-0.55, 4.9))
        ax.axis("off")
    return figure


def _stack(ax, x: float, *, below: str, above: str, hatch: str) -> None:
    """A model as a stack of blocks, those above ℓ in their own look."""
    for i in range(BLOCKS):
        ax.add_patch(
            Rectangle(
                (x, 0.55 + 0.55 * i),
                0.8,
                0.45,
                facecolor=below if i < BELOW else above,
                edgecolor="#444444",
                linewidth=0.9,
                hatch="" if i < BELOW else hatch,
            )
        )


def _prompts(ax, x: float, text: str) -> None:
    ax.text(x, -0.3, text, ha="center", va="center", fontsize=8.5)
    _arrow(ax, (x, -0.08), (x, 0.5))


def _arrow(ax, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color="black", shrinkA=0, shrinkB=0
        )
    )


def _cloud(ax, x: float, y: float, *, apart: bool) -> None:
    """Hidden states of both classes, mixed or apart."""
    places = [
        (-0.55, 0.1),
        (-0.2, -0.22),
        (0.05, 0.25),
        (0.35, -0.08),
        (0.6, 0.2),
        (-0.4, 0.33),
        (0.2, -0.33),
        (0.62, -0.3),
    ]
    ax.add_patch(
        Rectangle(
            (x - 1.0, y - 0.5), 2.0, 1.0, facecolor="white", edgecolor="#888888", linewidth=0.8
        )
    )
    for i, (dx, dy) in enumerate(places):
        toxic = i % 2 == 0
        if apart:
            dx = (-0.62 if toxic else 0.62) + dx * 0.35
        ax.plot(
            x + dx,
            y + dy,
            "o" if toxic else "^",
            color=CLASS_COLOURS["toxic" if toxic else "seemingly_toxic"],
            markersize=5.5,
        )
