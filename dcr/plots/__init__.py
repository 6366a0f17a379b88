"""One function a figure: tidy DataFrame in, matplotlib Figure out. Figures read tables, never models."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from dcr.plots.breakdown import categories, differences, judge_calibration, similarity
from dcr.plots.common import note
from dcr.plots.diagram import overview
from dcr.plots.results import cost, plane, rates_by_form, shortcut
from dcr.plots.separation import map_2d, question_shares, separability_by_layer, transfer
from dcr.plots.stage_one import refinement
from dcr.plots.stage_two import kernel, loss_curves, rejection
from dcr.plots.trajectories import kernel_similarity, refusal_probabilities, refusal_rates

REDRAW: dict[str, Callable[..., Figure]] = {
    "question_shares": question_shares, "transfer": transfer, "refinement": refinement, "losses": loss_curves,
    "rejection": rejection, "kernel": kernel, "plane": plane, "rates_by_form": rates_by_form, "cost": cost,
    "refusal_rates": refusal_rates, "shortcut": shortcut, "categories": categories, "differences": differences,
    "judge_calibration": judge_calibration, "similarity": similarity,
    "kernel_similarity": kernel_similarity, "refusal_probabilities": refusal_probabilities}
__all__ = ["REDRAW", "categories", "cost", "differences", "judge_calibration", "kernel", "kernel_similarity", "loss_curves", "map_2d",
           "note", "overview", "plane", "question_shares", "rates_by_form", "refinement", "refusal_probabilities", "refusal_rates",
           "rejection", "separability_by_layer", "shortcut", "similarity", "transfer"]
