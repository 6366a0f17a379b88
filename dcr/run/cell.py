"""One cell of a grid: a run with a recipe of its own, read on validation prompts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from dcr.config import Config
from dcr.run.answers import Run
from dcr.run.models import Base
from dcr.run.store import Store


class CellRun(Run):
    """A run of one method whose recipe stands above the method's own."""

    def __init__(
        self,
        method: str,
        config: Config,
        recipe: Mapping[str, object],
        store: Store,
        of: Sequence[Config],
    ) -> None:
        super().__init__(config, store, Base(config.model), of=of)
        self.method, self._recipe = method, recipe

    def recipe(self, method: str) -> Config:
        """The method's configuration with the cell's overrides on top; other methods as they
        are."""
        recipe = super().recipe(method)
        return recipe.override(self._recipe) if method == self.method else recipe


def screened(run: CellRun) -> dict[str, float]:
    """What a recipe did to hidden state ℓ, before any alignment, on validation prompts.

    cross_ and within_similarity: cosines. probe_auroc: a probe fitted on the recipe's training
    prompts; harm_auroc: one fitted on the same minimal pairs for every cell; harmless sources
    averaged, forms equal. general_drift: ‖h − h₀‖²/‖h₀‖² of general prompts' last hidden state.
    """
    from dcr.analysis.probes import cosine_structure, fit_probe, is_toxic
    from dcr.evaluate.frontier import auroc

    method, layer = run.method, run.layer(run.method)
    general = run.validation["label"] == "general"
    asked = run.validation[~general].reset_index(drop=True)
    states = run.states(method, asked, 0)
    cosines = cosine_structure(states, asked, [layer]).set_index("pair")["cosine"]
    found = {"layer": layer, "cross_similarity": cosines["cross"]}
    found["within_similarity"] = (cosines["toxic-toxic"] + cosines["seemingly-seemingly"]) / 2
    for name, recipe in (("probe_auroc", method), ("harm_auroc", "DCR-matched")):
        sets = run.sets(recipe)
        rows = pd.concat([sets.toxic, sets.seemingly_toxic], ignore_index=True)
        probe = fit_probe(run.states(method, rows, 0).layer(layer), is_toxic(rows))
        score = probe.decision_function(states.layer(layer))
        scores = pd.DataFrame({"prompt_id": asked["id"], "score": score}).assign(method="", seed=0)
        read = auroc(asked, scores).query("source == 'mean' and toxic_form == 'balanced'")
        found[name] = read["auroc"].iloc[0]
    if general.any() and "refine" in run.stages(method):
        rows = run.validation[general].reset_index(drop=True)
        after, before = (run.states(m, rows, 0).values[-1] for m in (method, "base"))
        found["general_drift"] = float(((after - before) ** 2).sum() / (before**2).sum())
    return {k: float(v) for k, v in found.items()}


def outcome(run: CellRun) -> dict[str, float]:
    """After alignment, on validation prompts: compliance and DSR (sets and forms equal), general
    prompts answered, AUROC of the refusal score (harmless sources averaged, forms equal).
    """
    from dcr.evaluate.frontier import auroc
    from dcr.evaluate.rates import rates

    method, asked = run.method, run.validation
    rows = rates(asked, run.judged(method, asked))
    found = {}
    for name, label, metric in (
        ("compliance", "seemingly_toxic", "compliance"),
        ("dsr", "toxic", "dsr"),
        ("general_compliance", "general", "compliance"),
    ):
        mine = rows[(rows["label"] == label) & (rows["metric"] == metric)]
        whole = mine[(mine["benchmark"] == "mean") & (mine["version"] == "both")]
        for form in ("balanced", "question", "imperative"):
            value = whole.loc[whole["form"] == form, "value"]
            if len(value):
                found[name if form == "balanced" else f"{name} {form}"] = float(value.iloc[0])
    scores = pd.DataFrame({"prompt_id": asked["id"], "score": run.refusal(method, asked)})
    read = auroc(asked, scores.assign(method="", seed=0))
    read = read.query("source == 'mean' and toxic_form == 'balanced'")
    found["refusal_auroc"] = float(read["auroc"].iloc[0])
    return found
