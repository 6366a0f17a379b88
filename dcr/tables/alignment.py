"""Notebook 03: what stage 2 learns from, and how refusals and kernel move while it learns."""

import itertools

import numpy as np
import pandas as pd

from dcr.config import methods_file
from dcr.evaluate.intervals import mean_interval
from dcr.evaluate.kernels import class_matrix
from dcr.evaluate.rates import rates
from dcr.study.experiment import Experiment
from dcr.study.registry import table
from dcr.tables.gather import curved, followed_prompts, joined, methods_of, steps_of

NOTEBOOK = "03_alignment"


@table("mix", notebook=NOTEBOOK)
def mix(experiment: Experiment) -> pd.DataFrame:
    """Alignment examples of every aligned method by part and form (first seed)."""
    run = experiment.runs[0]
    parts = [run.sets(m).mix.assign(method=m) for m in methods_of(experiment, "align")]
    grouped = joined(parts).groupby(["method", "part", "form"], sort=False)
    return grouped.size().rename("n").reset_index()


@table("same_rows", notebook=NOTEBOOK)
def same_rows(experiment: Experiment) -> pd.DataFrame:
    """Refusal rows that two aligned methods of the kit share, run here or not; the worst seed.

    share: of `method`'s rows, those that `other` aligns on too. relation: same, subset (`method`'s
    are all among `other`'s: an audit), superset or partly; same_source: whether it should be one
    of the first three.
    """
    aligned = [m for m, recipe in methods_file().items() if "align" in recipe.get("stages", [])]
    found = []
    for run in experiment.runs:
        safe = {m: run.sets(m).mix.query("part == 'safe'") for m in aligned}
        sources = {m: run.recipe(m).data.align_toxic for m in aligned}
        ids = {m: set(rows["id"].str.rstrip("~")) for m, rows in safe.items()}
        for (method, mine), (other, theirs) in itertools.product(ids.items(), repeat=2):
            shared = len(mine & theirs)
            relation = "subset" if mine < theirs else "superset" if mine > theirs else "partly"
            named = {"method": method, "other": other, "n": len(mine), "n_other": len(theirs)}
            named |= {"shared": shared, "share": shared / max(1, len(mine))}
            named |= {"relation": "same" if mine == theirs else relation}
            found.append(named | {"same_source": sources[method] == sources[other]})
    worst = pd.DataFrame(found).sort_values("share", kind="stable")
    return worst.drop_duplicates(["method", "other"]).sort_index().reset_index(drop=True)


@table("curves", notebook=NOTEBOOK)
def curves(experiment: Experiment) -> pd.DataFrame:
    """Mean rates at each point (step, strength) of every aligned or steered method's curve."""
    first, parts = experiment.runs[0], []
    for method in curved(experiment):
        runs, asked = experiment.runs_of(method), {-1: -1, **steps_of(experiment, method)}
        for step, strength in (p for p in first.points(method) if p.step in asked):
            said = [run.verdicts(method, asked[step], strength) for run in runs]
            said = [s.assign(method=method, seed=r.seed) for s, r in zip(said, runs, strict=True)]
            found = rates(first.curve_prompts, joined(said))
            found = found[found["benchmark"] == "mean"]  # few prompts: sets alone tell nothing
            parts.append(found.assign(step=step, strength=strength))
    return joined(parts)


@table("refusal_rates", notebook=NOTEBOOK)
def refusal_rates(experiment: Experiment) -> pd.DataFrame:
    """Refusal rate of each class over alignment (paper figure 1): answers, published sets."""
    rows = experiment.table("curves").query("metric == 'refusal_rate'")
    rows = rows[(rows["version"] == "published") & (rows["form"] == "all")]
    rows = rows[rows["method"].isin(methods_of(experiment, "align"))]
    return rows[["method", "step", "label", "value", "low", "high", "n", "seeds"]]


@table("refusal_probability", notebook=NOTEBOOK)
def refusal_probability(experiment: Experiment) -> pd.DataFrame:
    """Mean probability of refusal openings of each class over alignment (paper figure 6)."""
    prompts = followed_prompts(experiment, experiment.config.evaluation.trajectory_prompts)
    found = []
    for method in methods_of(experiment, "align"):
        for step, asked in steps_of(experiment, method).items():
            runs = experiment.runs_of(method)
            read = [run.refusal_probability(method, prompts, asked) for run in runs]
            rows = pd.DataFrame(np.stack(read, axis=1))  # [n, seeds]
            for label, part in rows.groupby(prompts["label"], sort=False):
                names = prompts.loc[part.index, "request"]
                value, low, high = mean_interval(part.to_numpy(), names)
                named = {"method": method, "step": step, "label": label, "value": value}
                named |= {"low": low, "high": high, "n": len(part), "seeds": len(read)}
                found.append(named)
    return pd.DataFrame(found)


@table("kernel_trajectory", notebook=NOTEBOOK)
def kernel_trajectory(experiment: Experiment) -> pd.DataFrame:
    """Kernel of toxic with seemingly toxic prompts over alignment (paper figure 3)."""
    options, parts = experiment.config.evaluation, []
    prompts = followed_prompts(experiment, options.kernel_prompts)
    for method in methods_of(experiment, "align"):
        steps = list(steps_of(experiment, method).items())
        count = min(len(steps), max(2, options.kernel_steps or len(steps)))
        for at in np.linspace(0, len(steps) - 1, count).round().astype(int):
            (step, asked), runs = steps[at], experiment.runs_of(method)
            norms = [run.kernel(method, prompts, asked) for run in runs]
            found = class_matrix(norms, prompts["label"], prompts["request"])
            parts.append(found.assign(method=method, step=step, seeds=len(norms)))
    rows = joined(parts)
    rows = rows[(rows["class_a"] == "toxic") & (rows["class_b"] == "seemingly_toxic")]
    numbers = ["normalised", "normalised_low", "normalised_high"]
    return rows[["method", "step", *numbers, "seeds"]]
