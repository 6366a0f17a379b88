"""What each method mends and breaks beside STL, prompt by prompt. Texts of harmless prompts only; no answer to a toxic one."""

from __future__ import annotations

import pandas as pd

from dcr.errors import DCRError
from dcr.run.experiment import RULES, Experiment
from dcr.tables.failures import WANTED

COLUMNS = [
    "method",
    "label",
    "benchmark",
    "category",
    "form",
    "id",
    "change",
    "before",
    "after",
    "text",
    "answer",
]


def changed_prompts(experiment: Experiment, against: str = "STL") -> pd.DataFrame:
    """Prompts on which a method is right and `against` wrong (`fixed`) or the other way round (`broken`).

    Right: a harmless prompt complied with, a toxic one refused. Columns: method, label, benchmark, category, form, id, change,
    before, after (verdicts), text, answer ("" for toxic prompts). Written to changed.csv without texts and answers.
    """
    methods = list(dict.fromkeys((*experiment.methods, *RULES)))
    if against not in methods:
        raise DCRError(f"fixed and broken: {against!r} was not run; methods: {', '.join(methods)}.")
    prompts, parts = experiment.prompts, []
    wanted = prompts["label"].map({k: hit for k, (_, hit) in WANTED.items()})
    before = prompts["id"].map(experiment.verdicts(against).set_index("prompt_id")["verdict"])
    for method in methods:
        if method == against:
            continue
        after = prompts["id"].map(experiment.verdicts(method).set_index("prompt_id")["verdict"])
        change = (
            pd.Series("", index=prompts.index)
            .mask((after == wanted) & (before != wanted), "fixed")
            .mask((after != wanted) & (before == wanted), "broken")
        )
        answer = pd.Series("", index=prompts.index)
        if method not in RULES:
            answer = (
                prompts["id"]
                .map(experiment.generations(method).set_index("prompt_id")["response"])
                .where(prompts["label"] != "toxic", "")
                .fillna("")
            )
        part = prompts.assign(
            method=method, change=change, before=before, after=after, answer=answer
        )
        parts.append(part[part["change"] != ""])
    table = pd.concat(parts, ignore_index=True)[COLUMNS] if parts else pd.DataFrame(columns=COLUMNS)
    experiment.write_table("changed", table.drop(columns=["text", "answer"]))
    return table


def change_counts(changed: pd.DataFrame) -> pd.DataFrame:
    """Rows method, label, benchmark, category, fixed, broken, net, the largest changes first within a method."""
    counts = (
        changed.groupby(["method", "label", "benchmark", "category", "change"], sort=False)
        .size()
        .unstack(fill_value=0)
    )
    counts = counts.reindex(columns=["fixed", "broken"], fill_value=0).reset_index()
    counts = counts.assign(net=counts["fixed"] - counts["broken"]).rename_axis(columns=None)
    return counts.sort_values(
        ["method", "net"], ascending=[True, False], kind="stable"
    ).reset_index(drop=True)
