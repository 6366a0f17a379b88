"""One function a figure: tidy DataFrame in, matplotlib Figure out. Figures read tables, never models."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from dcr.plots.diagram import overview
from dcr.plots.judges import calibration
from dcr.plots.results import cost, plane, rates_by_form
from dcr.plots.separation import map_2d, question_shares, separability_by_layer, transfer
from dcr.plots.stage_one import refinement
from dcr.plots.stage_two import kernel, loss_curves, rejection

REDRAW: dict[str, Callable[..., Figure]] = {
    "question_shares": question_shares, "transfer": transfer, "refinement": refinement, "losses": loss_curves,
    "rejection": rejection, "kernel": kernel, "plane": plane, "rates_by_form": rates_by_form, "cost": cost,
    "calibration": calibration}
__all__ = ["REDRAW", "calibration", "cost", "kernel", "loss_curves", "map_2d", "overview", "plane", "question_shares", "rates_by_form",
           "refinement", "rejection", "separability_by_layer", "transfer"]
