"""What stage 1 did to one experiment's held-out prompts: cosines, map, drift and kernel before and after. Tidy tables."""

from __future__ import annotations

import numpy as np
import pandas as pd

from dcr.data.pairs import as_pairs
from dcr.run.experiment import Experiment
from dcr.tables.trajectories import class_prompts, kernel_table, stored_states

WHEN = ("before", "after")


def training_pairs(experiment: Experiment, method: str = "DCR", n: int = 6) -> pd.DataFrame:
    """A few training prompts as they meet in a batch: minimal pairs where the data have them, else the two classes apart."""
    toxic, seemingly, *_ = experiment.training_sets(method)
    shared = set(toxic["pair_id"]) & set(seemingly["pair_id"]) - {""}
    if shared:
        both = pd.concat([toxic, seemingly])
        pairs = as_pairs(both[both["pair_id"].isin(shared)])
        return pairs[["category", "form", "seemingly_toxic", "toxic", "distance"]].head(n)
    return pd.concat([seemingly.head(n), toxic.head(n)])[["label", "form", "text"]]


def _both(experiment: Experiment, method: str, per_class: int):
    rows = class_prompts(experiment, per_class)
    states = {
        "before": stored_states(experiment, "base", "refinement", rows),
        "after": stored_states(experiment, method, "refinement", rows, 0),
    }
    return rows, states, experiment.refined(method).manifest["layer"]


def cosines(experiment: Experiment, method: str = "DCR", per_class: int = 12) -> pd.DataFrame:
    """Rows when, i, j, label_i, label_j, cosine at ℓ between held-out prompts of three classes, before and after stage 1."""
    rows, states, layer = _both(experiment, method, per_class)
    labels, parts = rows["label"].to_numpy(), []
    i, j = (x.ravel() for x in np.indices((len(rows), len(rows))))
    for when in WHEN:
        unit = states[when].layer(layer) / np.linalg.norm(
            states[when].layer(layer), axis=1, keepdims=True
        )
        parts.append(
            pd.DataFrame(
                {
                    "when": when,
                    "i": i,
                    "j": j,
                    "label_i": labels[i],
                    "label_j": labels[j],
                    "cosine": (unit @ unit.T).ravel(),
                    "layer": layer,
                }
            )
        )
    table = pd.concat(parts, ignore_index=True)
    experiment.write_table("refinement_cosines", table)
    return table


def maps(experiment: Experiment, method: str = "DCR", per_class: int = 12) -> pd.DataFrame:
    """Rows when, x, y, label, form: two principal components of ℓ's states, each picture with its own axes."""
    from dcr.analysis.probes import map_2d

    rows, states, layer = _both(experiment, method, per_class)
    points = {when: map_2d(states[when], layer) for when in WHEN}
    table = pd.concat(
        [
            rows[["id", "label", "form"]].assign(when=w, x=p[:, 0], y=p[:, 1], layer=layer)
            for w, p in points.items()
        ],
        ignore_index=True,
    )
    experiment.write_table("refinement_maps", table)
    return table


def drift_by_layer(
    experiment: Experiment, method: str = "DCR", per_class: int = 12
) -> pd.DataFrame:
    """Rows layer, label, drift: how far each class moved from the base at every layer, mean ‖h − h₀‖²/‖h₀‖²."""
    rows, states, refined_at = _both(experiment, method, per_class)
    found = []
    for layer in range(1, states["before"].n_layers + 1):
        old, new = states["before"].layer(layer), states["after"].layer(layer)
        moved = ((new - old) ** 2).sum(1) / (old**2).sum(1)
        found += [
            {
                "layer": layer,
                "label": label,
                "drift": float(moved[(rows["label"] == label).to_numpy()].mean()),
                "refined_at": refined_at,
            }
            for label in rows["label"].unique()
        ]
    table = pd.DataFrame(found)
    experiment.write_table("refinement_drift", table)
    return table


def kernel_before_after(experiment: Experiment, method: str = "DCR") -> pd.DataFrame:
    """Kernel rows (see `kernel_table`) of toxic prompts with each class, before and after stage 1, `when` in place of method."""
    both = (
        kernel_table(experiment, m, 0).assign(when=w)
        for m, w in (("STL", "before"), (method, "after"))
    )
    table = pd.concat(both, ignore_index=True).drop(columns="method").query("class_a == 'toxic'")
    experiment.write_table("refinement_kernel", table)
    return table


def layer_sweep(experiment: Experiment, method: str = "DCR") -> pd.DataFrame:
    """The candidates of `layer="auto"`, one row each (empty where ℓ was given)."""
    table = pd.DataFrame(experiment.refined(method).manifest["layer_sweep"])
    if len(table):
        experiment.write_table("layer_choice", table)
    return table
