"""Outcomes without a word of text: what every method did with every prompt at every point of its curve.

One small table a seed (`outcomes.csv`), from which seeds that ran on other days or machines are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dcr.data.files import write_atomic
from dcr.errors import DCRError
from dcr.evaluate.matched import FACTS, TARGETS, curves_from, matched_differences, matched_safety
from dcr.run.experiment import Experiment
from dcr.tables.comparisons import curves_of
from dcr.tables.figure_data import load_tables
from dcr.tables.harm_scores import score_auroc, score_curves, score_differences


def outcomes_table(experiment: Experiment) -> pd.DataFrame:
    """A row per curve prompt that counts (no source that a method trained on), a column METHOD@POINT of 1 (as wanted) and 0.

    As wanted: a toxic prompt refused, a seemingly toxic one answered. Written to outcomes.csv.
    """
    curves = curves_of(experiment)
    table = (
        curves[0]
        .prompts[list(FACTS)]
        .assign(profile=experiment.config.profile, seed=experiment.config.seed)
    )
    columns = {
        f"{c.method}@{point}": c.hits[:, i].astype(int)
        for c in curves
        for i, point in enumerate(c.points)
    }
    table = pd.concat([table, pd.DataFrame(columns, index=table.index)], axis=1)
    experiment.write_table("outcomes", table)
    return table


def compare(
    folder: str | Path,
    *,
    against: Sequence[str] = ("STL",),
    targets: Sequence[float] = TARGETS,
    out: str | Path = "",
    n_boot: int = 1000,
) -> dict[str, pd.DataFrame]:
    """Tables `seeds_matched_safety` and `seeds_differences` of a run directory or of one that holds seed-*/.

    With scores.csv there also `seeds_auroc`, `seeds_score_safety`, and the differences of both (see `dcr.tables.harm_scores`).
    `against`: every method is compared with each. With `out` the tables are written there. Raises DCRError without outcomes.
    """
    tables = load_tables(folder)
    if "outcomes" not in tables:
        raise DCRError(
            f"{folder}: no outcomes.csv in tables/ or seed-*/tables/; write it with `dcr run`."
        )
    curves = curves_from(tables["outcomes"])
    result = {
        "seeds_matched_safety": matched_safety(curves, targets, n_boot=n_boot),
        "seeds_differences": pd.concat(
            [matched_differences(curves, a, targets, n_boot=n_boot) for a in against],
            ignore_index=True,
        ),
    }
    if "scores" in tables:
        result |= _scored(tables["scores"], against, targets, n_boot)
    for name, table in result.items():
        if out:
            write_atomic(Path(out) / f"{name}.csv", table.to_csv(index=False))
    return result


def _scored(
    scores: pd.DataFrame, against: Sequence[str], targets: Sequence[float], n_boot: int
) -> dict[str, pd.DataFrame]:
    """The tables of scores; a steered method has none of its own, and nothing is compared with it there."""
    curves = score_curves(scores)
    result = {
        "seeds_auroc": score_auroc(scores, n_boot=n_boot),
        "seeds_score_safety": matched_safety(curves, targets, n_boot=n_boot),
    }
    if known := [a for a in against if f"refusal@{a}" in scores]:
        result |= {
            "seeds_auroc_differences": pd.concat(
                [score_differences(scores, a, n_boot=n_boot) for a in known], ignore_index=True
            ),
            "seeds_score_differences": pd.concat(
                [
                    matched_differences(curves, f"refusal@{a}", targets, n_boot=n_boot)
                    for a in known
                ],
                ignore_index=True,
            ),
        }
    return result
