"""What a short answer hides: the same prompts answered at greater length, and the verdicts on both side by side."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from dcr.data.loaders import stratified_subset
from dcr.errors import DCRError
from dcr.evaluate.judges.calibration import agreement
from dcr.tables.answers import judged_answers

LABELS = ("toxic", "seemingly_toxic")


def longer_answers(
    experiment, methods: Sequence[str] = (), *, tokens: int = 128, per_class: int = 40
) -> pd.DataFrame:
    """Each method's verdict on its usual, short answer and on one of up to `tokens` tokens, a row a prompt and method.

    Columns method, id, label, short, long (verdicts), cut (whether the long answer, too, ended at its limit). The judge is the
    curve's; no answer is in the table. Written to longer_answers.csv. Raises DCRError when `tokens` is no longer than the run's limit.
    """
    usual = experiment.config.generation.max_new_tokens
    if tokens <= usual:
        raise DCRError(
            f"longer_answers: tokens={tokens} must be above generation.max_new_tokens={usual}."
        )
    rows = experiment.curve_prompts
    prompts = pd.concat(
        [
            stratified_subset(part, min(per_class, len(part)), experiment.config.seed)
            for part in (rows[rows["label"] == label] for label in LABELS)
            if len(part)
        ],
        ignore_index=True,
    )
    parts = []
    for method in methods or experiment.methods:
        long = judged_answers(
            experiment, method, prompts, "longer", method, max_new_tokens=tokens
        ).set_index("prompt_id")
        short = experiment.verdicts(method, experiment.steps(method)[-1]).set_index("prompt_id")[
            "verdict"
        ]
        parts.append(
            prompts[["id", "label"]].assign(
                method=method,
                short=prompts["id"].map(short),
                long=prompts["id"].map(long["verdict"]),
                cut=prompts["id"].map(long["finish"]) == "length",
            )
        )
    table = pd.concat(parts, ignore_index=True)
    experiment.write_table("longer_answers", table)
    return table


def length_agreement(table: pd.DataFrame, *, bootstrap: int = 500, seed: int = 0) -> pd.DataFrame:
    """What the short answers miss, of all methods together (the first row) and a row a method.

    Columns n, kappa (refused or not, long taken as the truth) with low and high, same (share of equal verdicts), missed (refusals
    seen only at length) and taken_back (refusals that the longer answer is not).
    """
    rows = []
    for method, part in [("all", table), *table.groupby("method", sort=False)]:
        refused_short, refused_long = part["short"] == "refuse", part["long"] == "refuse"
        measured = agreement(
            part["long"].to_numpy(), part["short"].to_numpy(), bootstrap, seed, apart=()
        )
        rows.append(
            {
                "method": method,
                **{k: measured[k] for k in ("n", "kappa", "low", "high")},
                "same": float((part["short"] == part["long"]).mean()),
                "missed": int((refused_long & ~refused_short).sum()),
                "taken_back": int((refused_short & ~refused_long).sum()),
            }
        )
    return pd.DataFrame(rows)
