"""One cell of a grid: a run with a recipe of its own, read on validation prompts alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dcr.config import Config
from dcr.data.sets import training_sets
from dcr.errors import DCRError
from dcr.evaluate.auroc import auroc
from dcr.evaluate.rates import HEADLINE, rates
from dcr.run.models import Base
from dcr.run.readings import Run
from dcr.run.store import Store


@dataclass(frozen=True)
class Cell:
    """One recipe with one seed."""

    name: str
    method: str
    seed: int
    recipe: dict[str, object]


class CellRun(Run):
    """A run of one method whose recipe stands above the method's own."""

    def __init__(self, cell: Cell, config: Config, store: Store, of: Sequence[Config]) -> None:
        super().__init__(config, store, Base(config.model), of=of)
        self.method, self._recipe = cell.method, cell.recipe

    def recipe(self, method: str) -> Config:
        """The method's configuration with the cell's overrides on top; of another method, its own
        recipe on top of them."""
        recipe = super().recipe(method)
        return recipe.override(self._recipe) if method == self.method else recipe


def screened(run: CellRun) -> dict[str, float]:
    """What a recipe did to hidden state ℓ, before any alignment, on validation prompts.

    cross_ and within_similarity: cosines. probe_auroc: a probe fitted on the recipe's training
    prompts; harm_auroc: one fitted on the same minimal pairs for every cell; harmless sources
    averaged, forms equal. general_drift: ‖h − h₀‖²/‖h₀‖² of general prompts' last hidden state.
    """
    from dcr.analysis.probes import cosine_structure, fit_probe, is_toxic

    method, layer = run.method, run.layer(run.method)
    general = run.validation["label"] == "general"
    asked = run.validation[~general].reset_index(drop=True)
    states = run.states(method, asked, 0)
    cosines = cosine_structure(states, asked, [layer]).set_index("pair")["cosine"]
    within = (cosines["toxic-toxic"] + cosines["seemingly-seemingly"]) / 2
    found = {"layer": layer, "cross_similarity": cosines["cross"], "within_similarity": within}
    pairs = run.of[0].replaced(seed=run.seed).override(run.entry("DCR-matched")["overrides"])
    read = {"probe_auroc": run.sets(method), "harm_auroc": training_sets(pairs, of=run.of)}
    for name, sets in read.items():
        rows = pd.concat([sets.toxic, sets.seemingly_toxic], ignore_index=True)
        probe = fit_probe(run.states(method, rows, 0)[layer], is_toxic(rows))
        found[name] = _auroc(asked, probe.decision_function(states[layer]))
    if general.any() and "refine" in run.stages(method):
        rows = run.validation[general].reset_index(drop=True)
        after, before = (run.states(m, rows, 0)[-1] for m in (method, "base"))
        found["general_drift"] = float(((after - before) ** 2).sum() / (before**2).sum())
    return {k: float(v) for k, v in found.items()}


def outcome(run: CellRun) -> dict[str, float]:
    """After alignment, on validation prompts: compliance and DSR (sets and forms equal), general
    prompts answered, AUROC of the refusal score (harmless sources averaged, forms equal).
    """
    method, asked = run.method, run.validation
    rows = rates(asked, run.judged(method, asked))
    found = {}
    names = {"seemingly_toxic": "compliance", "toxic": "dsr", "general": "general_compliance"}
    whole = rows[(rows["benchmark"] == "mean") & (rows["version"] == "both")]
    for label, name in names.items():
        mine = whole[(whole["label"] == label) & (whole["metric"] == HEADLINE[label])]
        value = mine.set_index("form")["value"]
        for form in ("balanced", "question", "imperative"):
            if form in value:
                found[name if form == "balanced" else f"{name} {form}"] = float(value[form])
    return found | {"refusal_auroc": _auroc(asked, run.refusal(method, asked))}


def _auroc(prompts: pd.DataFrame, scores: np.ndarray) -> float:
    table = pd.DataFrame({"prompt_id": prompts["id"], "score": scores}).assign(method="", seed=0)
    read = auroc(prompts, table).query("source == 'mean' and toxic_form == 'balanced'")
    if read.empty:
        raise DCRError(
            "the validation prompts of a class are all of one form: turn evaluation.forms on."
        )
    return float(read["auroc"].iloc[0])
