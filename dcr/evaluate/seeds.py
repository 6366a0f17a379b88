"""Several seeds in one table: their mean, with an interval over prompts and seeds."""

from __future__ import annotations

import numpy as np
import pandas as pd

from dcr.errors import DCRError

INDEX = (
    "step",
    "layer",
    "in_distribution",
    "bias",
    "target",
)  # numbers and flags that name a row; every other number is measured
COUNTS = ("n", "seeds")


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for what differs only in its seed: means, and `seeds`, how many went in. A single seed passes through.

    A value's interval (`low`/`high`, or `<name>_low`/`<name>_high`) becomes the mean half-width over prompts (seeds share
    their prompts) and 1.96 standard errors over seeds, added in quadrature. Raises DCRError when profiles are mixed.
    """
    if "profile" in rows and rows["profile"].nunique() > 1:
        raise DCRError(
            f"seeds of mixed profiles {sorted(rows['profile'].unique())}; combine one profile at a time."
        )
    if "seed" not in rows or rows["seed"].nunique() < 2:
        return rows.drop(columns="seed", errors="ignore").assign(seeds=1)
    rows = rows.drop(columns="seeds", errors="ignore")
    measured = [c for c in rows.select_dtypes("number") if c not in (*INDEX, *COUNTS, "seed")]
    keys = [c for c in rows if c not in (*measured, *COUNTS, "seed")]
    if not keys:
        raise DCRError(f"seeds: nothing names a row among the columns {', '.join(rows)}.")
    grouped = rows.groupby(keys, sort=False, dropna=False)
    result = grouped[measured].mean()
    spread = 1.96 * grouped[measured].std().fillna(0) / np.sqrt(grouped.size().to_numpy()[:, None])
    for value, low, high in intervals(rows.columns):
        below = np.sqrt((result[value] - result[low]) ** 2 + spread[value] ** 2)
        above = np.sqrt((result[high] - result[value]) ** 2 + spread[value] ** 2)
        result[low] = (result[value] - below).clip(lower=0 if (rows[low] >= 0).all() else None)
        result[high] = (result[value] + above).clip(upper=1 if (rows[high] <= 1).all() else None)
    if "n" in rows:
        result["n"] = grouped["n"].max()
    return result.assign(seeds=grouped["seed"].nunique()).reset_index()


def intervals(columns) -> list[tuple[str, str, str]]:
    """(value, low, high) column triples of a table: the first measured name of `low`/`high`, and every `<name>_low`."""
    columns = list(columns)
    found = [
        (c, f"{c}_low", f"{c}_high")
        for c in columns
        if f"{c}_low" in columns and f"{c}_high" in columns
    ]
    main = next((c for c in ("value", "auroc", "difference", "kappa") if c in columns), None)
    return found + (
        [(main, "low", "high")] if main and "low" in columns and "high" in columns else []
    )
