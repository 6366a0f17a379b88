"""The steering stage of an experiment: anchors, fitted directions kept in the run directory, strengths of the curve."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from safetensors.torch import load_file, save_file

from dcr.config import Config
from dcr.errors import DCRError
from dcr.lm.generate import inference_dtype
from dcr.steering.scans import Scans, choose_threshold, fit_scans
from dcr.steering.surgical import Surgical, fit_surgical

HELD_OUT = 8  # prompts a class on which Surgical compares directions: every one costs a forward pass a candidate
PUBLISHED = {"harmful": "advbench", "pseudo": "or-bench"}
BUNDLED = {"harmful": "toxic", "pseudo": "seemingly_toxic"}


def anchor_table(
    role: str, config: Config, *, exclude: set[str] = frozenset(), n: int = 64
) -> pd.DataFrame:
    """`n` (or all there are) anchor prompts of a role (harmful, pseudo, harmless).

    Published sets (AdvBench, OR-Bench) where the profile trains on published data and they are at hand, else bundled
    training pairs; harmless ones from the profile's general prompts. Ids in `exclude` (evaluation prompts) come last.
    """
    from dcr.data import sets
    from dcr.data.fetch import path_of

    if role == "harmless":
        rows = sets._general(config)
    else:
        rows = _bundled_train(BUNDLED[role])
        if config.data.toxic != "bundled":
            try:
                path_of(PUBLISHED[role], download=False)
                rows = sets.table(PUBLISHED[role])
            except DCRError:
                pass
    order = rows.sample(frac=1, random_state=config.seed)
    order = (
        order.assign(_used=order["id"].isin(exclude))
        .sort_values("_used", kind="stable")
        .drop(columns="_used")
    )
    return order.head(n).reset_index(drop=True)


def _bundled_train(label: str) -> pd.DataFrame:
    from dcr.data import loaders

    rows = loaders.load_bundled("pairs")
    return rows[(rows["split"] == "train") & (rows["label"] == label)]


def validation_table() -> pd.DataFrame:
    """Held-out bundled prompts of all three classes: where SCANS's one threshold is chosen."""
    from dcr.data import sets

    return pd.concat(
        [
            sets.table(f"{n}-{s}")
            for n, s in (("validation", "toxic"), ("validation", "safe"), ("general", "validation"))
        ],
        ignore_index=True,
    )


def fitted(experiment, method: str):
    """The artifact of a steering method's fit: directions and, in its manifest, everything that was chosen and from what.

    Raises DCRError for a method that does not steer.
    """
    from dcr.data.sets import table_hash

    recipe = experiment.recipe(method)
    options, roles = (
        recipe.steering,
        {"SCANS": ("harmful", "harmless"), "Surgical": ("harmful", "pseudo", "harmless")},
    )
    if method not in roles:
        raise DCRError(f"{method} fits nothing; steering methods that do: {', '.join(roles)}.")
    tested = {i.rstrip("~") for i in experiment.prompts["id"]}
    held = HELD_OUT if method == "Surgical" else 0
    anchors = {
        role: anchor_table(role, recipe, exclude=tested, n=options.anchors + held)
        for role in roles[method]
    }
    chosen = options.model_dump() | {"strengths": None}
    dependencies = {
        "weights": experiment.weights_key(method, -1),
        "steering": chosen,
        "anchors": {role: table_hash(rows) for role, rows in anchors.items()},
        "dtype": recipe.model.precision,
        "version": 1,
    }

    def build(folder: Path) -> dict:
        model, tokenizer = experiment.model(method)
        model = model.to(
            inference_dtype(recipe.model.precision, str(model.device))
        )  # as it will be steered
        texts = {role: rows["text"].tolist() for role, rows in anchors.items()}
        path = recipe.model.layers_path
        if method == "SCANS":
            steering = fit_scans(
                model,
                tokenizer,
                texts["harmful"],
                texts["harmless"],
                alpha=options.scans_alpha,
                layers_path=path,
            )
            facts = {
                "tail": steering.tail,
                "steered_blocks": list(steering.steered),
                "alpha": options.scans_alpha,
            }
            if options.scans_threshold:
                facts |= {
                    "threshold": options.scans_threshold,
                    "threshold_from": "steering.scans_threshold",
                }
            else:
                rows = validation_table()
                scores = steering.scores(model, tokenizer, rows["text"].tolist())
                facts |= choose_threshold(scores, rows["label"] == "toxic") | {
                    "threshold_from": "bundled validation prompts"
                }
            save_file(
                {
                    "vectors": steering.vectors.contiguous(),
                    "transitions": steering.transitions.contiguous(),
                },
                folder / "directions.safetensors",
            )
        else:
            cut = {role: max(1, min(options.anchors, len(t) - held)) for role, t in texts.items()}
            steering, facts = fit_surgical(
                model,
                tokenizer,
                *(texts[r][: cut[r]] for r in ("harmful", "pseudo", "harmless")),
                held_pseudo=texts["pseudo"][cut["pseudo"] :][:held],
                held_harmless=texts["harmless"][cut["harmless"] :][:held],
                strength=options.surgical_lambda,
                max_candidates=options.surgical_candidates,
                seed=recipe.seed,
                layers_path=path,
            )
            save_file(
                {"direction": steering.direction.contiguous()}, folder / "directions.safetensors"
            )
        overlap = {role: int(rows["id"].isin(tested).sum()) for role, rows in anchors.items()}
        return facts | {
            "in_distribution": sorted({s for rows in anchors.values() for s in rows["source"]}),
            "anchor_counts": {role: len(rows) for role, rows in anchors.items()},
            "anchors_also_tested": overlap,
            **experiment._facts(),
        }

    return experiment.store.get("steer", method, dependencies, build)


def steering_of(experiment, method: str, step: int = -1) -> Scans | Surgical:
    """The steering object of a method at curve point `step` (strength in per cent of the nominal one; -1: nominal)."""
    strength, options = strength_of(step), experiment.recipe(method).steering
    kept = experiment.__dict__.setdefault(
        "_steering", {}
    )  # one object a method, so that SCANS classifies a prompt once
    artifact = fitted(experiment, method)
    if artifact.path.name not in kept:
        facts, tensors = artifact.manifest, load_file(artifact.path / "directions.safetensors")
        path = experiment.recipe(method).model.layers_path
        kept[artifact.path.name] = (
            Scans(
                tensors["vectors"],
                tensors["transitions"],
                facts["threshold"],
                options.scans_alpha,
                facts["tail"],
                layers_path=path,
            )
            if method == "SCANS"
            else Surgical(tensors["direction"], facts["layer"], facts["position"], layers_path=path)
        )
    return kept[artifact.path.name].at(strength)


def strength_of(step: int) -> float:
    """Curve points of steering methods are numbered by strength in per cent of the nominal one."""
    return 1.0 if step < 0 else step / 100


def curve_points(config: Config) -> list[int]:
    """The strengths swept for a curve, in per cent, the nominal one among them."""
    return sorted({100, *(round(100 * s) for s in config.steering.strengths)})
