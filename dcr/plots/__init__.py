"""One function a figure: tidy DataFrame in, matplotlib Figure out. Figures read tables, never models."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from dcr.plots.ablations import ablation_levers, ablation_outcomes
from dcr.plots.diagram import overview
from dcr.plots.evaluation import ability, bias_frontier, matched_safety, robustness
from dcr.plots.judges import calibration
from dcr.plots.kernels import kernel_matrix, proposition, reliability
from dcr.plots.results import cost, plane, rates_by_form
from dcr.plots.separation import map_2d, probe_cells, question_shares, separability_by_layer, transfer
from dcr.plots.stage_one import cosine_maps, drift_by_layer, kernel_before_after, layer_choice, maps_before_after, refinement
from dcr.plots.stage_two import kernel, loss_curves, rejection

REDRAW: dict[str, Callable[..., Figure]] = {
    "question_shares": question_shares, "transfer": transfer, "refinement": refinement, "losses": loss_curves, "rejection": rejection,
    "kernel": kernel, "plane": plane, "rates_by_form": rates_by_form, "cost": cost, "refinement_cosines": cosine_maps,
    "refinement_maps": maps_before_after, "refinement_drift": drift_by_layer, "refinement_kernel": kernel_before_after,
    "layer_choice": layer_choice, "ablation_levers": ablation_levers, "ablation_outcomes": ablation_outcomes, "calibration": calibration,
    "matched_safety": matched_safety, "bias_frontier": bias_frontier, "robustness": robustness, "ability": ability,
}
__all__ = [
    "REDRAW", "ability", "ablation_levers", "ablation_outcomes", "bias_frontier", "calibration", "cosine_maps", "cost", "drift_by_layer",
    "kernel", "kernel_before_after", "kernel_matrix", "layer_choice", "loss_curves", "map_2d", "maps_before_after", "matched_safety",
    "overview", "plane", "probe_cells", "proposition", "question_shares", "rates_by_form", "refinement", "rejection", "reliability",
    "robustness", "separability_by_layer", "transfer",
]
