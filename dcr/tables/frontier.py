"""Notebook 04, scores: methods at equal safety, by source, and between refusals and probe."""

import pandas as pd

from dcr.analysis.probes import fit_probe, is_toxic
from dcr.evaluate import auroc as ranks
from dcr.evaluate import frontier as scored
from dcr.run.readings import Run
from dcr.study.experiment import Experiment
from dcr.study.registry import table
from dcr.tables.gather import methods_of, scored_prompts, scores, stacked, verdicts
from dcr.tables.representations import pairings, unseen

NOTEBOOK = "04_evaluation"
BASELINES = ("STL", "STL-aug", "SCANS", "Surgical", "DCR-sham")  # what a method has to beat
PER_SET = 40  # requests of a set on which the gap is read


def baselines(experiment: Experiment) -> list[str]:
    """The baselines that this run has."""
    return [m for m in BASELINES if m in experiment.methods]


@table("frontier", notebook=NOTEBOOK)
def frontier(experiment: Experiment) -> pd.DataFrame:
    """Compliance at a DSR of 0.80 and 0.90; thresholds from validation prompts, forms equal."""
    return scored.compliance_at(scored_prompts(experiment), scores(experiment))


@table("frontier_differences", notebook=NOTEBOOK)
def frontier_differences(experiment: Experiment) -> pd.DataFrame:
    """Every method less every baseline at equal safety and in AUROC, paired; Holm over all."""
    read, against = scores(experiment), baselines(experiment)
    return scored.differences(scored_prompts(experiment), read, against)


@table("auroc_by_source", notebook=NOTEBOOK)
def auroc_by_source(experiment: Experiment) -> pd.DataFrame:
    """AUROC of every method's refusal score by harmless source and forms; sources never pooled."""
    return ranks.auroc(ranks.tested(experiment.prompts), scores(experiment))


@table("score_agreement", notebook=NOTEBOOK)
def score_agreement(experiment: Experiment) -> pd.DataFrame:
    """How well each method's refusal score orders its own generated verdicts, by class."""
    read, said = scores(experiment), verdicts(experiment)
    return ranks.agreement_with_verdicts(experiment.answered, read, said)


@table("gap", notebook=NOTEBOOK)
def gap(experiment: Experiment) -> pd.DataFrame:
    """AUROC on unseen sources of each method's refusals, and of a probe at ℓ around its alignment.

    Forms equal. The probe is fitted on pairings whose sources hold both classes.
    """
    held, aligned = unseen(experiment.runs[0], PER_SET), methods_of(experiment, "align")
    every = list(dict.fromkeys(["base", *methods_of(experiment)]))
    readers = (
        ("refusal", "last", every, lambda run, m: run.scores(m)),
        ("probe", "before alignment", ["base", *aligned], lambda run, m: _probe(run, m, 0, held)),
        ("probe", "after alignment", aligned, lambda run, m: _probe(run, m, -1, held)),
    )
    parts = []
    for reader, stage, methods, read in readers:
        rows = ranks.auroc(held, stacked(experiment, read, methods))
        mean = rows[(rows["source"] == "mean") & (rows["toxic_form"] == "balanced")]
        parts.append(mean.assign(reader=reader, stage=stage))
    whole = pd.concat(parts, ignore_index=True)
    return whole[["method", "reader", "stage", "auroc", "low", "high", "n", "seeds"]]


def _probe(run: Run, method: str, step: int, held: pd.DataFrame) -> pd.DataFrame:
    """prompt_id, score of `held` by a probe at ℓ of a method's model after step `step`."""
    clean = [rows for name, rows in pairings(run).items() if name != "sources (paper)"]
    train = pd.concat(clean).drop_duplicates("id")
    train = train[~train["request"].isin(held["request"])].reset_index(drop=True)
    at = [run.states(method, rows, step)[run.layer(method)] for rows in (train, held)]
    found = fit_probe(at[0], is_toxic(train)).decision_function(at[1])
    return pd.DataFrame({"prompt_id": held["id"], "score": found})
