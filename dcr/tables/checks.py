"""Notebook 04, checks: categories, rewording, ability, quality, judges, short answers, cost."""

import pandas as pd

from dcr.config import methods_file
from dcr.errors import DCRError
from dcr.evaluate import ability as measured
from dcr.evaluate import checks, rates
from dcr.evaluate import quality as answered
from dcr.evaluate.judges import calibration
from dcr.study.experiment import Experiment
from dcr.study.registry import table
from dcr.tables.gather import RULE, first_of_each, in_turn, methods_of, stacked, verdicts

NOTEBOOK = "04_evaluation"
LIMIT = 100  # prompts a class whose answers are compared for quality
STAGES = ("refine", "align", "fit", "generate", "score")  # artifacts that cost
LENT = {"decides": ["fit", "score"], "answers": ["generate"]}  # what another method does for one


def few(experiment: Experiment, option: str) -> pd.DataFrame:
    """As many test prompts a class as `evaluation.<option>` says, as published, sets in turn."""
    if not (per_class := getattr(experiment.config.evaluation, option)):
        raise DCRError(f"evaluation.{option}=0: this table is skipped. Give a number above 0.")
    rows = experiment.answered.query("role == 'test' and version == 'published'")
    return in_turn(rows[rows["label"] != "general"], per_class, ["benchmark"])


def answering(experiment: Experiment) -> list[str]:
    """The methods that answer: all but the rule."""
    return [m for m in methods_of(experiment) if m != RULE]


@table("categories", notebook=NOTEBOOK)
def categories(experiment: Experiment) -> pd.DataFrame:
    """Refusal rate of every method by class, set and category, as published."""
    rows = experiment.answered
    named = rows["benchmark"] + "|" + rows["category"].replace("", "(none)")
    found = rates.rates(rows.assign(benchmark=named), verdicts(experiment))
    found = found.query("metric == 'refusal_rate' and version == 'published' and form == 'all'")
    found = found[found["benchmark"] != "mean"]
    names = found["benchmark"].str.split("|", n=1, expand=True)
    kept = found[["method", "label", "value", "low", "high", "n"]]
    return kept.assign(benchmark=names[0], category=names[1]).reset_index(drop=True)


@table("changed", notebook=NOTEBOOK)
def changed(experiment: Experiment) -> pd.DataFrame:
    """Prompts that a method mends or breaks beside STL (first seed); ids, no text."""
    said = verdicts(experiment)
    said = said[said["seed"] == experiment.runs[0].seed]
    return checks.changes(experiment.answered, said, "STL")


@table("robustness", notebook=NOTEBOOK)
def robustness(experiment: Experiment) -> pd.DataFrame:
    """Refusal rate of both classes under mild rewordings, and its paired change."""
    plain = few(experiment, "robustness_prompts")
    prompts = pd.concat([checks.wrap(plain, w) for w in checks.WRAPPERS], ignore_index=True)
    said = stacked(experiment, lambda run, m: run.judged(m, prompts), answering(experiment))
    return checks.robustness(prompts, said)


@table("longer_answers", notebook=NOTEBOOK)
def longer_answers(experiment: Experiment) -> pd.DataFrame:
    """What short answers hide: verdicts at the run's length against longer answers."""
    methods, prompts = answering(experiment), few(experiment, "longer_prompts")
    tokens = experiment.config.evaluation.longer_tokens
    usual = experiment.config.generation.max_new_tokens
    if not tokens:
        raise DCRError("evaluation.longer_tokens=0: this table is skipped. Give a number above 0.")
    if tokens <= usual:
        raise DCRError(
            f"evaluation.longer_tokens={tokens}: answers have {usual} tokens already "
            "(generation.max_new_tokens). Give a larger number."
        )
    long = stacked(experiment, lambda run, m: run.judged(m, prompts, tokens=tokens), methods)
    # Asked again in the same batches, so that length alone differs.
    short = stacked(experiment, lambda run, m: run.judged(m, prompts), methods)
    return checks.length_agreement(short, long)


@table("ability", notebook=NOTEBOOK)
def ability(experiment: Experiment) -> pd.DataFrame:
    """General ability of every method with its own weights; paired changes from base and STL."""
    mine = ["base", *methods_of(experiment, "align"), *methods_of(experiment, "edit")]
    items = stacked(experiment, lambda run, m: run.ability(m), mine)
    against = [m for m in ("base", "STL") if m in mine]
    return pd.concat([measured.ability_rows(items, a).assign(against=a) for a in against])


@table("quality", notebook=NOTEBOOK)
def quality(experiment: Experiment) -> pd.DataFrame:
    """Measures of answers to harmless prompts, and a win rate where an endpoint is set."""
    rows = experiment.answered[experiment.answered["version"] == "published"]
    prompts, methods = first_of_each(rows[rows["label"] != "toxic"], LIMIT), answering(experiment)
    answers = stacked(experiment, lambda run, m: run.generations(m), methods)
    answers = answers[answers["prompt_id"].isin(prompts["id"])]
    losses = stacked(experiment, lambda run, m: run.answer_losses(m, prompts), methods)
    options, out = experiment.config.evaluation, experiment.root / "quality"
    found = answered.quality(prompts, answers, losses, options, out=out)
    column = found["prompts"].str.replace("_", " ") + ": " + found["measure"]
    return found.assign(column=column, best=False, mark="")


@table("judge_calibration", notebook=NOTEBOOK)
def judge_calibration(experiment: Experiment) -> pd.DataFrame:
    """Agreement of the judge with people on published completions, whole and cut as here."""
    cuts = (0, experiment.config.generation.max_new_tokens)
    return calibration.calibration((experiment.config.evaluation.judge,), tokens=cuts)


@table("cost", notebook=NOTEBOOK)
def cost(experiment: Experiment) -> pd.DataFrame:
    """Measured wall time (s, of all artifacts) and peak memory (MiB) of a method, kind and seed.

    Where one method decides and another answers, the first's fit and score and the second's answers
    are its own.
    """
    rows = pd.DataFrame(experiment.artifacts(of_methods=True)).rename(columns={"name": "method"})
    rows, recipes = rows[rows["kind"].isin(STAGES)], methods_file()
    parts = [rows]
    for method in (m for m in experiment.methods if m in recipes):
        for role, kinds in LENT.items():
            theirs = rows["kind"].isin(kinds) & (rows["method"] == recipes[method].get(role))
            parts.append(rows[theirs].assign(method=method))
    rows = pd.concat(parts, ignore_index=True)
    rows = rows[rows["method"].isin(experiment.methods)]
    groups = rows.groupby(["method", "kind", "seed"], sort=False, as_index=False)
    return groups.agg({"seconds": "sum", "peak_memory_mib": "max"})
