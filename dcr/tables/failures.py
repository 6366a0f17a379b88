"""Where methods fail: prompts still refused, refusals by category; and what they cost. Tables, never models."""

from __future__ import annotations

import json

import pandas as pd

from dcr.errors import DCRError
from dcr.evaluate.metrics import wilson
from dcr.run.experiment import RULES, Experiment

WANTED = {
    "toxic": ("dsr", "refuse"),
    "seemingly_toxic": ("compliance", "comply"),
    "general": ("compliance", "comply"),
}


def still_refused(experiment: Experiment, method: str) -> pd.DataFrame:
    """Harmless prompts that a method refuses: benchmark, category, form, text, answer (harmless prompts only)."""
    verdicts = experiment.verdicts(method).set_index("prompt_id")["verdict"]
    answers = experiment.generations(method).set_index("prompt_id")["response"]
    harmless = experiment.prompts[experiment.prompts["label"] != "toxic"]
    refused = harmless[harmless["id"].map(verdicts) == "refuse"]
    return refused[["benchmark", "category", "form", "text"]].assign(
        answer=refused["id"].map(answers)
    )


def costs(experiment: Experiment) -> pd.DataFrame:
    """Wall time (s) and peak memory (MiB) of each artifact of the training and evaluation stages, by method."""
    rows = []
    for path in sorted(experiment.store.root.glob("*/*/manifest.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if (
            content["kind"] in ("refine", "align", "steer", "generate")
            and content["name"] in experiment.methods
        ):
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
        refused = (
            experiment.prompts["id"].map(
                experiment.verdicts(method).set_index("prompt_id")["verdict"]
            )
            == "refuse"
        )
        keys = [experiment.prompts[k].fillna("") for k in ("label", "benchmark", "category")]
        for (label, benchmark, category), hits in refused.groupby(keys, sort=False):
            low, high = wilson(int(hits.sum()), len(hits))
            rows.append(
                {
                    "profile": experiment.config.profile,
                    "method": method,
                    "label": label,
                    "benchmark": benchmark,
                    "category": category or "(none)",
                    "value": float(hits.mean()),
                    "low": low,
                    "high": high,
                    "n": len(hits),
                }
            )
    table = pd.DataFrame(rows)
    experiment.write_table("categories", table)
    return table
