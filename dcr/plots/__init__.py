"""One function a figure: tidy DataFrame in, matplotlib Figure out. Figures read tables, never models."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from dcr.plots.ablations import ablation_levers, ablation_outcomes, harm_read
from dcr.plots.breakdown import categories, differences, similarity
from dcr.plots.common import note
from dcr.plots.diagram import overview
from dcr.plots.evaluation import (
    ability,
    bias_frontier,
    matched_differences,
    matched_safety,
    robustness,
)
from dcr.plots.judges import calibration
from dcr.plots.kernels import kernel_matrix, proposition, reliability
from dcr.plots.results import cost, plane, rates_by_form, shortcut
from dcr.plots.scores import harm_scores
from dcr.plots.separation import (
    map_2d,
    probe_cells,
    question_shares,
    separability_by_layer,
    transfer,
)
from dcr.plots.stage_one import (
    cosine_maps,
    drift_by_layer,
    kernel_before_after,
    layer_choice,
    maps_before_after,
    refinement,
)
from dcr.plots.stage_two import loss_curves
from dcr.plots.trajectories import kernel_similarity, refusal_probabilities, refusal_rates

REDRAW: dict[str, Callable[..., Figure]] = {
    "question_shares": question_shares,
    "transfer": transfer,
    "refinement": refinement,
    "losses": loss_curves,
    "plane": plane,
    "rates_by_form": rates_by_form,
    "cost": cost,
    "refinement_cosines": cosine_maps,
    "refinement_maps": maps_before_after,
    "refinement_drift": drift_by_layer,
    "refinement_kernel": kernel_before_after,
    "layer_choice": layer_choice,
    "ablation_levers": ablation_levers,
    "ablation_outcomes": ablation_outcomes,
    "harm_read": harm_read,
    "calibration": calibration,
    "refusal_rates": refusal_rates,
    "shortcut": shortcut,
    "categories": categories,
    "differences": differences,
    "similarity": similarity,
    "kernel_similarity": kernel_similarity,
    "refusal_probabilities": refusal_probabilities,
    "matched_safety": matched_safety,
    "matched_differences": matched_differences,
    "bias_frontier": bias_frontier,
    "robustness": robustness,
    "ability": ability,
}
__all__ = [
    "ability",
    "ablation_levers",
    "ablation_outcomes",
    "bias_frontier",
    "calibration",
    "categories",
    "cosine_maps",
    "cost",
    "differences",
    "drift_by_layer",
    "harm_read",
    "harm_scores",
    "kernel_before_after",
    "kernel_matrix",
    "kernel_similarity",
    "layer_choice",
    "loss_curves",
    "map_2d",
    "maps_before_after",
    "matched_differences",
    "matched_safety",
    "note",
    "overview",
    "plane",
    "probe_cells",
    "proposition",
    "question_shares",
    "rates_by_form",
    "REDRAW",
    "refinement",
    "refusal_probabilities",
    "refusal_rates",
    "reliability",
    "robustness",
    "separability_by_layer",
    "shortcut",
    "similarity",
    "transfer",
]
