"""One cell of a sweep: an experiment with a recipe of its own, screened after stage 1, judged after alignment.

Both measures read validation prompts only, in both forms: the benchmarks stay untouched by the search.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dcr.config import Config
from dcr.run.experiment import Experiment
from dcr.tables.harm_scores import harm_prompts, probe_scores

log = logging.getLogger("dcr")
PROBE_ROWS = 64  # training prompts a class that the screen's probe is fitted on


class Cell(Experiment):
    """An Experiment whose recipe overrides stand above the method's own, with validation prompts as its benchmarks."""

    def __init__(
        self,
        profile: str,
        *,
        method: str,
        seed: int,
        run_dir: str | Path,
        base: Mapping[str, object],
        recipe: Mapping[str, object],
        validation: Sequence[str],
    ) -> None:
        super().__init__(
            profile, seed=seed, run_dir=run_dir, overrides={**base, **recipe}, methods=(method,)
        )
        self._recipe, self.validation, self.method = dict(recipe), tuple(validation), method

    def recipe(self, method: str) -> Config:
        """The method's configuration with the cell's overrides on top."""
        return super().recipe(method).override(self._recipe)

    @cached_property
    def sets(self):
        """The profile's training sets; the validation prompts, as they come and form-swapped, in place of benchmarks."""
        from dcr.data import sets
        from dcr.data.forms import swap_table

        own = {name: sets.benchmark(name, self.config) for name in self.validation}
        own |= {
            f"{n}/swapped": swap_table(t).assign(benchmark=f"{n}/swapped") for n, t in own.items()
        }
        return replace(
            sets.load_sets(self.config.override({"data.benchmarks": []})), benchmarks=own
        )


def screen(cell: Cell) -> dict:
    """After stage 1, before any alignment: what a recipe did to hidden state ℓ.

    probe_auroc: a linear probe from training to validation prompts, averaged over the four form pairings, with each
    pairing beside it; cross_ and within_similarity of validation prompts at ℓ; general_drift of general prompts' last
    hidden state, ‖h − h₀‖²/‖h₀‖². A method without stage 1 is measured on the base model. harm_auroc, mean_auroc: as
    probe_auroc, but fitted on the same `harm_prompts` for every cell, by a probe and by the difference of the class means alone.
    Some recipes train on some of them; all are read on validation prompts, which none trains on.
    """
    from dcr.data.sets import table_hash

    refined = cell.refined(cell.method) if "refine" in cell.stages(cell.method) else None
    prompts = cell.prompts[cell.prompts["label"] != "general"].reset_index(drop=True)
    toxic, seemingly, *_ = cell.training_sets(cell.method)
    probed = pd.concat([toxic.head(PROBE_ROWS), seemingly.head(PROBE_ROWS)], ignore_index=True)
    harm = harm_prompts(cell.config.profile, cell.config.seed)
    key = {
        "model": cell.model_key,
        "refine": refined.path.name if refined else "",
        "validation": table_hash(prompts),
        "probed": table_hash(probed),
        "harm": table_hash(harm),
        "seed": cell.config.seed,
        "layer": refined.manifest["layer"] if refined else cell.recipe(cell.method).refine.layer,
    }
    artifact = cell.store.get(
        "screen",
        cell.method,
        key,
        lambda folder: {"measures": _screen(cell, refined, prompts, probed, harm)},
    )
    facts = (
        {}
        if refined is None
        else {
            "layer": refined.manifest["layer"],
            "steps": refined.manifest["steps"],
            "stop_reason": refined.manifest["stop_reason"],
            "refine_seconds": refined.manifest["seconds"],
            "peak_memory_mib": refined.manifest["peak_memory_mib"],
        }
    )
    return {**facts, **artifact.manifest["measures"]}


def _screen(
    cell: Cell, refined, prompts: pd.DataFrame, probed: pd.DataFrame, harm: pd.DataFrame
) -> dict:
    from dcr.analysis.refusal import auroc_by_form
    from dcr.data.sets import table
    from dcr.lm.blocks import decoder_layers, resolve_layer
    from dcr.train.adapters import apply_trained
    from dcr.train.contrast import PromptRows, StageOneModel, pooled_states
    from dcr.train.losses import drift
    from dcr.train.watch import fit_probe, held_out_measures

    options = cell.recipe(cell.method).refine
    model, tokenizer = cell.base()
    path, depth = (
        cell.config.model.layers_path,
        len(decoder_layers(model, cell.config.model.layers_path)),
    )

    def states(model, rows: pd.DataFrame, layer: int):
        data = PromptRows(rows, tokenizer, options.max_length)
        return pooled_states(
            StageOneModel(model, layer, options.pooling, path), data, range(len(data))
        ), torch.tensor(data.labels)

    general = table("general-validation").head(cell.config.data.limit or None)
    before = states(model, general, depth)[0]
    if refined:
        model = apply_trained(model, refined.path / "model")
    layer = refined.manifest["layer"] if refined else resolve_layer(options.layer, depth)
    train = states(model, probed, layer)
    held = states(model, prompts, layer)
    measures = held_out_measures(*train, *held)
    scores = probe_scores(
        model,
        tokenizer,
        prompts,
        harm,
        layer,
        pooling=options.pooling,
        max_length=options.max_length,
        layers_path=path,
    )
    measures |= {
        name: float(auroc_by_form(prompts, scores[reader])["auroc"].iloc[-1])
        for name, reader in (("harm_auroc", "probe"), ("mean_auroc", "means"))
    }
    by_form = auroc_by_form(prompts, fit_probe(*train).decision_function(held[0]))
    named = {
        f"probe_auroc {r.toxic_form} / {r.harmless_form}": r.auroc
        for r in by_form.itertuples()
        if r.toxic_form != "balanced"
    }
    return {
        **measures,
        "probe_auroc": float(by_form["auroc"].iloc[-1]),
        **named,
        "general_drift": float(drift(states(model, general, depth)[0], before)),
        "n_validation": len(prompts),
    }


def judged(cell: Cell) -> dict:
    """After alignment: compliance and DSR averaged equally over forms, refusal AUROC, general prompts answered."""
    from dcr.analysis.refusal import PHRASES_VERSION, auroc_by_form, refusal_probability
    from dcr.data.sets import table_hash
    from dcr.evaluate.metrics import rate_rows

    prompts = cell.prompts
    rates = rate_rows(
        prompts.assign(benchmark=prompts["label"]),
        cell.verdicts(cell.method),
        profile=cell.config.profile,
        method=cell.method,
        seed=cell.config.seed,
    ).set_index(["benchmark", "metric", "form"])["value"]
    contrast = prompts[prompts["label"] != "general"].reset_index(drop=True)
    key = {
        "weights": cell.weights_key(cell.method, -1),
        "prompts": table_hash(contrast),
        "phrases": PHRASES_VERSION,
    }

    def build(folder: Path) -> None:
        model, tokenizer = cell.model(cell.method)
        np.save(
            folder / "probability.npy",
            refusal_probability(model, tokenizer, contrast["text"].tolist()),
        )

    artifact = cell.store.get("rejection", f"{cell.method}-validation", key, build)
    auroc = auroc_by_form(contrast, np.load(artifact.path / "probability.npy"))
    row = {
        "dsr": rates.get(("toxic", "dsr", "balanced")),
        "compliance": rates.get(("seemingly_toxic", "compliance", "balanced")),
        "general_compliance": rates.get(("general", "compliance", "all")),
        "refusal_auroc": float(auroc["auroc"].iloc[-1]),
        "align_seconds": cell.aligned(cell.method).manifest["seconds"]
        if "align" in cell.stages(cell.method)
        else 0.0,
    }
    for label, metric in (("toxic", "dsr"), ("seemingly_toxic", "compliance")):
        row |= {
            f"{metric} {form}": rates.get((label, metric, form))
            for form in ("question", "imperative")
        }
    return {k: None if v is None or v != v else float(v) for k, v in row.items()}
