"""Notebook 02: what stage 1 moves and what it costs the rest, before (base) and after it."""

import pandas as pd

from dcr.analysis.probes import map_2d
from dcr.study.experiment import Experiment
from dcr.study.registry import table
from dcr.tables.gather import (
    followed_prompts,
    joined,
    methods_of,
    needed,
    range_over_seeds,
    stacked,
)

NOTEBOOK = "02_refinement"
PER_CLASS = 12  # prompts a class in maps and drifts
FOLLOWED = {"cross_similarity": "cosine, across classes", "within_similarity": "cosine, within"}


@table("overview", notebook=NOTEBOOK)
def overview(experiment: Experiment) -> pd.DataFrame:
    """The two stages of DCR: blocks of the model, blocks that move (from below), ℓ, loss."""
    run = experiment.runs[0]
    loss = f"{run.recipe('DCR').refine.loss} loss at ℓ"
    rows = [
        ("refine", run.layer("DCR"), loss, "toxic and seemingly toxic prompts"),
        ("align", run.depth, "next token", "general instructions, toxic prompts with refusals"),
    ]
    table = pd.DataFrame(rows, columns=["stage", "trained", "loss", "prompts"])
    return table.assign(blocks=run.depth, layer=run.layer("DCR"))


@table("refinement", notebook=NOTEBOOK)
def refinement(experiment: Experiment) -> pd.DataFrame:
    """Held-out cosines and a probe's AUROC over stage 1, a row a method, seed and evaluation."""
    methods = methods_of(experiment, "refine")
    rows = stacked(experiment, lambda run, m: run.history(m, "evaluations"), methods)
    return rows[["method", "seed", "step", *FOLLOWED, "probe_auroc"]]


@table("losses", notebook=NOTEBOOK)
def losses(experiment: Experiment) -> pd.DataFrame:
    """Training loss of both stages, a row a method, seed and step."""
    parts = [
        run.history(method, stage).assign(method=method, seed=run.seed, stage=stage)
        for stage in ("refine", "align")
        for method in methods_of(experiment, stage)
        for run in experiment.runs_of(method)
    ]
    return joined(parts)[["method", "seed", "stage", "step", "loss"]]


@table("refinement_maps", notebook=NOTEBOOK)
def refinement_maps(experiment: Experiment) -> pd.DataFrame:
    """Two principal components of ℓ's states before and after DCR's stage 1, each with own axes."""
    run, method = experiment.runs[0], needed(experiment, "DCR", "refinement_maps")
    rows, parts, layer = followed_prompts(experiment, PER_CLASS), [], run.layer(method)
    for when, owner in {"before": "base", "after": method}.items():
        x, y = map_2d(run.states(owner, rows, 0), layer).T
        parts.append(rows[["id", "label", "form"]].assign(when=when, x=x, y=y))
    return pd.concat(parts, ignore_index=True).assign(method=method, layer=layer)


@table("refinement_drift", notebook=NOTEBOOK)
def refinement_drift(experiment: Experiment) -> pd.DataFrame:
    """How far each class moved from the base at every layer: mean ‖h − h₀‖²/‖h₀‖², seeds' range."""
    rows, parts = followed_prompts(experiment, PER_CLASS), []
    for method in methods_of(experiment, "refine"):
        for run in experiment.runs_of(method):
            old, new = run.states("base", rows), run.states(method, rows, 0)
            moved = ((new - old) ** 2).sum(-1) / (old**2).sum(-1)  # [layers + 1, n]
            wide = pd.DataFrame(moved.T).groupby(rows["label"]).mean().reset_index()
            long = wide.melt("label", range(1, run.depth + 1), "layer", "drift")
            parts.append(long.assign(method=method, seed=run.seed, refined_at=run.layer(method)))
    keys = ["method", "layer", "label", "refined_at"]
    return range_over_seeds(joined(parts), keys, "drift")


@table("similarity", notebook=NOTEBOOK)
def similarity(experiment: Experiment) -> pd.DataFrame:
    """Cosines at ℓ (seeds' range) and toxic prompts' kernel with each class (95 % intervals),
    before and after (figure 5).
    """
    steps = experiment.table("refinement").rename(columns=FOLLOWED)
    ends = steps.sort_values("step", kind="stable").groupby(["method", "seed"], sort=False)[
        list(FOLLOWED.values())
    ]
    both = pd.concat({"before": ends.first(), "after": ends.last()}, names=["when"]).reset_index()
    long = both.melt(["when", "method", "seed"], var_name="measure", value_name="value")
    cosines = range_over_seeds(long, ["method", "measure", "when"])
    rows = experiment.table("kernel").query("class_a == 'toxic'")
    rows = rows.assign(measure="kernel, toxic with " + rows["class_b"].str.replace("_", " "))
    names = {"normalised": "value", "normalised_low": "low", "normalised_high": "high"}
    rows = rows.rename(columns=names)[["method", "stage", "measure", *names.values(), "seeds"]]
    after = rows[rows["stage"] == "refined"].assign(when="after")
    base = rows[rows["stage"] == "base"].drop(columns="method").assign(when="before")
    before = base.merge(after[["method"]].drop_duplicates(), how="cross")
    return pd.concat([cosines, before, after], ignore_index=True).drop(columns="stage")
