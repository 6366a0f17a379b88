"""Where methods differ, and where they fail: paired differences, prompts still refused, cost. Tables, never models."""

from __future__ import annotations

import json

import pandas as pd

from dcr.errors import DCRError
from dcr.experiment import RULES, Experiment
from dcr.metrics import compare, wilson

WANTED = {"toxic": ("dsr", "refuse"), "seemingly_toxic": ("compliance", "comply"), "general": ("compliance", "comply")}


def differences(experiment: Experiment, against: str = "STL") -> pd.DataFrame:
    """Paired difference of every method to `against`: difference, low, high, exact p, Holm p, n.

    Rows for each class of prompts (benchmark "all") and for each benchmark; Holm's correction is within such a group.
    """
    methods = [*experiment.methods, *RULES]
    if against not in methods:
        raise DCRError(f"differences: {against!r} was not run; methods: {', '.join(methods)}.")
    verdicts = {m: experiment.verdicts(m).set_index("prompt_id")["verdict"] for m in methods}
    parts = []
    groups = [(label, "all", rows) for label, rows in experiment.prompts.groupby("label", sort=False)]
    groups += [(label, name, rows) for (label, name), rows in experiment.prompts.groupby(["label", "benchmark"], sort=False)]
    for label, benchmark, rows in groups:
        metric, hit = WANTED[label]
        hits = {m: (verdicts[m].loc[rows["id"]] == hit).to_numpy() for m in methods}
        parts.append(compare(hits, against).assign(metric=metric, prompts=label, benchmark=benchmark))
    table = pd.concat(parts, ignore_index=True)[
        ["prompts", "benchmark", "metric", "method", "difference", "low", "high", "p", "p_holm", "n"]]
    experiment.write_table("differences", table)
    return table


def still_refused(experiment: Experiment, method: str) -> pd.DataFrame:
    """Harmless prompts that a method refuses: benchmark, category, form, text, answer (harmless prompts only)."""
    verdicts = experiment.verdicts(method).set_index("prompt_id")["verdict"]
    answers = experiment.generations(method).set_index("prompt_id")["response"]
    harmless = experiment.prompts[experiment.prompts["label"] != "toxic"]
    refused = harmless[harmless["id"].map(verdicts) == "refuse"]
    return refused[["benchmark", "category", "form", "text"]].assign(answer=refused["id"].map(answers))


def costs(experiment: Experiment) -> pd.DataFrame:
    """Wall time (s) and peak memory (MiB) of each artifact of the training and evaluation stages, by method."""
    rows = []
    for path in sorted(experiment.store.root.glob("*/*/manifest.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["kind"] in ("refine", "align", "generate") and content["name"] in experiment.methods:
            rows.append({k: content[k] for k in ("name", "kind", "seconds", "peak_memory_mib")})
    table = pd.DataFrame(rows)
    if table.empty:
        raise DCRError("costs: nothing has been run in this directory yet; run notebook 03 or 04.")
    experiment.write_table("cost", table)
    return table


def category_rates(experiment: Experiment) -> pd.DataFrame:
    """Refusal rate (with Wilson interval) of every method by class, benchmark and category; written to categories.csv."""
    rows = []
    for method in (*experiment.methods, *RULES):
        refused = experiment.prompts["id"].map(experiment.verdicts(method).set_index("prompt_id")["verdict"]) == "refuse"
        keys = [experiment.prompts[k].fillna("") for k in ("label", "benchmark", "category")]
        for (label, benchmark, category), hits in refused.groupby(keys, sort=False):
            low, high = wilson(int(hits.sum()), len(hits))
            rows.append({"profile": experiment.config.profile, "method": method, "label": label, "benchmark": benchmark,
                         "category": category or "(none)", "value": float(hits.mean()), "low": low, "high": high, "n": len(hits)})
    table = pd.DataFrame(rows)
    experiment.write_table("categories", table)
    return table
