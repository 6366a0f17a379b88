"""Comparisons of an experiment's methods, over one seed or several: matched safety and paired differences, as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests

from dcr.analysis.refusal import auroc_by_form, auroc_draws
from dcr.errors import DCRError
from dcr.evaluate.intervals import bootstrap_over_seeds, percentiles, set_of, unit_of
from dcr.evaluate.matched import TARGETS, Curve, curve_of, draw_prompts, matched_safety
from dcr.evaluate.metrics import mcnemar_exact, rate_rows
from dcr.run.experiment import RULES, Experiment
from dcr.tables.failures import WANTED

Experiments = Experiment | Sequence[Experiment]


def _several(experiments: Experiments) -> list[Experiment]:
    several = [experiments] if isinstance(experiments, Experiment) else list(experiments)
    seeds = [e.config.seed for e in several]
    if (
        not several
        or len(set(seeds)) != len(seeds)
        or len({e.config.profile for e in several}) != 1
    ):
        raise DCRError(
            f"comparison: seeds {seeds}; give one profile's experiments with different seeds, at least one."
        )
    if len({e.methods for e in several}) != 1:
        raise DCRError(
            "comparison: the seeds ran different methods: "
            + "; ".join(", ".join(e.methods) for e in several)
            + "."
        )
    return several


def left_out(experiments: Sequence[Experiment]) -> set[str]:
    """Sources that any method trained on: they count for none, so that all methods are read on the same prompts.

    Empty when nothing would be left (the bundled data: its test topics are other topics of the same source).
    """
    first = experiments[0]
    trained = set().union(
        *(e.in_distribution(m) for e in experiments for m in e.methods if m not in RULES)
    )
    rest = first.curve_prompts[~first.curve_prompts["source"].isin(trained)]
    return trained if {"toxic", "seemingly_toxic"} <= set(rest["label"]) else set()


def curves_of(experiments: Experiments) -> list[Curve]:
    """Curves of every method and seed, the question-mark rule's single point among them."""
    several = _several(experiments)
    out = left_out(several)
    return [
        curve_of(
            m,
            e.config.seed,
            e.curve_prompts,
            {s: e.verdicts(m, s) for s in ([0] if m in RULES else e.steps(m))},
            out,
        )
        for e in several
        for m in dict.fromkeys((*e.methods, *RULES))
    ]


def matched_safety_table(
    experiments: Experiments, targets: Sequence[float] = TARGETS
) -> pd.DataFrame:
    """Compliance at each DSR and the area, every method, with intervals; written to matched_safety.csv.

    Columns beside `matched_safety`'s: `left_out`, the sources that some method trained on and that count for none;
    `in_distribution`, true where nothing could be left out because all sets share a source with training (bundled data).
    """
    several = _several(experiments)
    first = several[0]
    table = matched_safety(
        curves_of(several),
        targets,
        n_boot=first.config.evaluation.bootstrap,
        seed=first.config.seed,
    )
    trained = any(first.in_distribution(m) for m in first.methods if m not in RULES)
    out = left_out(several)
    table = table.assign(
        in_distribution=trained and not out,
        left_out=", ".join(sorted(out & set(first.prompts["source"]))),
    )
    first.write_table("matched_safety", table)
    return table


def combined_p(values: Sequence[float]) -> float:
    """One p value from K that may depend on each other in any way: K/k times the k-th smallest, k = ⌈K/2⌉ (Rüger 1978)."""
    ordered = sorted(values)
    if not ordered:
        raise DCRError("combined p: no p values.")
    k = math.ceil(len(ordered) / 2)
    return min(1.0, len(ordered) / k * ordered[k - 1])


def paired_table(experiments: Experiments, against: str = "STL") -> pd.DataFrame:
    """Difference of every method to `against` on the same prompts, per set and pooled; written to paired.csv.

    Columns: prompts (class), benchmark ("all" pools the class), metric, method, difference, low, high, p, p_holm, n,
    seeds. Intervals draw requests (a prompt with its form-swapped twin) and seeds. p: exact McNemar tests, one for each
    seed and form version, combined by `combined_p`; Holm's correction runs over the methods and sets of a class.
    """
    several = _several(experiments)
    methods = list(dict.fromkeys((*several[0].methods, *RULES)))
    if against not in methods:
        raise DCRError(f"differences: {against!r} was not run; methods: {', '.join(methods)}.")
    shared = set.intersection(*(set(e.prompts["id"]) for e in several))
    prompts = several[0].prompts[several[0].prompts["id"].isin(shared)]
    if prompts.empty:
        raise DCRError(
            "differences: the seeds share no evaluation prompts; set data.limit=0 or run one seed."
        )
    verdicts = {
        m: [e.verdicts(m).set_index("prompt_id")["verdict"] for e in several] for m in methods
    }
    tables = []
    for label, part in prompts.groupby("label", sort=False):
        metric, hit = WANTED[label]
        sets = {"all": part, **{str(n): rows for n, rows in part.groupby("benchmark", sort=False)}}
        rows = []
        for name, chosen in sets.items():
            hits = {
                m: np.stack([(v.loc[chosen["id"]] == hit).to_numpy() for v in verdicts[m]])
                for m in methods
            }
            rows += [
                {
                    "prompts": label,
                    "benchmark": name,
                    "metric": metric,
                    "method": m,
                    **_paired(
                        chosen, hits[m], hits[against], several[0].config.evaluation.bootstrap
                    ),
                }
                for m in methods
                if m != against
            ]
        table = pd.DataFrame(rows)
        if len(table):
            tables.append(
                table.assign(p_holm=multipletests(table["p"], method="holm")[1], seeds=len(several))
            )
    result = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    several[0].write_table("paired", result)
    return result


def _paired(prompts: pd.DataFrame, a: np.ndarray, b: np.ndarray, n_boot: int) -> dict[str, float]:
    """Difference of hits [seeds, prompts] with its interval over requests and seeds, and its p value."""
    change = pd.DataFrame((a.astype(float) - b).T, index=prompts["id"].map(unit_of))
    mean, low, high = bootstrap_over_seeds(
        change.groupby(level=0, sort=False).mean().to_numpy().T, n_boot=n_boot
    )
    swapped = (prompts["benchmark"].map(set_of) != prompts["benchmark"]).to_numpy()
    tests = [
        mcnemar_exact(x[part], y[part])
        for x, y in zip(a, b, strict=True)
        for part in (swapped, ~swapped)
        if part.any()
    ]
    return {"difference": mean, "low": low, "high": high, "p": combined_p(tests), "n": len(prompts)}


def coconot_safety_rows(experiment: Experiment) -> pd.DataFrame:
    """Metric rows of CoCoNot's requests with safety concerns alone (149 of 379: the others ask for what no model can do).

    Written to coconot_safety.csv; empty where CoCoNot is not among the benchmarks.
    """
    prompts = experiment.prompts
    chosen = prompts[
        prompts["benchmark"].map(set_of).isin(["coconot"])
        & (prompts["category"] == "Requests with safety concerns")
    ]
    if chosen.empty:
        return pd.DataFrame()
    chosen = chosen.assign(
        benchmark=chosen["benchmark"].str.replace(
            "coconot", "coconot (safety concerns)", regex=False
        )
    )
    rows = []
    for method in dict.fromkeys((*experiment.methods, *RULES)):
        verdicts = experiment.verdicts(method)
        rows.append(
            rate_rows(
                chosen,
                verdicts[verdicts["prompt_id"].isin(chosen["id"])],
                profile=experiment.config.profile,
                method=method,
                seed=experiment.config.seed,
            )
        )
    table = pd.concat(rows, ignore_index=True)
    experiment.write_table("coconot_safety", table)
    return table


def auroc_table(experiment: Experiment) -> pd.DataFrame:
    """Threshold-free: AUROC of refusal probability, toxic against seemingly toxic, per pair of forms and balanced.

    Columns method, toxic_form, harmless_form, auroc, low, high (bootstrap over prompts), n. Steered methods are left out: the
    probability is read from the weights. Written to auroc.csv; the probabilities are cached by weights.
    """
    from dcr.tables.trajectories import refusal_probabilities

    counted = (experiment.curve_prompts["label"] != "general").to_numpy()
    prompts, rows = experiment.curve_prompts[counted].reset_index(drop=True), []
    for method in (m for m in experiment.methods if "steer" not in experiment.stages(m)):
        probability = refusal_probabilities(
            experiment, method, experiment.steps(method)[-1], experiment.curve_prompts
        )[counted]
        point = auroc_by_form(prompts, probability)
        rng = np.random.default_rng([experiment.config.seed, 0xA0C])
        draws = draw_prompts(prompts, experiment.config.evaluation.bootstrap, rng)
        drawn = auroc_draws(
            prompts, probability, draws[prompts["id"].map(unit_of)].to_numpy(), point
        )
        bounds = [percentiles(row) for row in drawn]
        rows.append(
            point.assign(method=method, low=[b[0] for b in bounds], high=[b[1] for b in bounds])
        )
    table = pd.concat(rows, ignore_index=True)[
        ["method", "toxic_form", "harmless_form", "auroc", "low", "high", "n"]
    ]
    experiment.write_table("auroc", table)
    return table
