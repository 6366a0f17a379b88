"""Old names of `dcr.data.sources` and `dcr.data.read`, until their callers have switched."""

import hashlib

import numpy as np
import pandas as pd

from dcr.data import sources
from dcr.data.read import prompts_of
from dcr.data.sources import BUNDLED, audit, load_bundled  # noqa: F401


def load(name: str, *, audited: bool = False, download: bool = True) -> pd.DataFrame:
    """Old: `sources.load`, audited or not."""
    table = sources.load(name, download=download)
    marks = table["id"].map(audit()).fillna("harmful")
    return table[marks == "harmful"].reset_index(drop=True) if audited else table


def read_user_table(path, label: str | None = None) -> pd.DataFrame:
    """Old: `prompts_of`."""
    return prompts_of(str(path), label=label or "")


def stratified_subset(table: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """Old: `sets.first_requests`."""
    if n >= len(table):
        return table.reset_index(drop=True)
    order = table["id"].map(lambda i: hashlib.sha256(f"{seed}:{i}".encode()).hexdigest())
    shuffled = table.assign(_order=order).sort_values("_order")
    strata = [p for _, p in shuffled.groupby(["form", "category"], sort=True, dropna=False)]
    quota = np.array([len(part) * n / len(table) for part in strata])
    counts = np.floor(quota).astype(int)
    for i in np.argsort(-(quota - counts), kind="stable")[: n - counts.sum()]:
        counts[i] += 1
    picked = pd.concat([part.head(c) for part, c in zip(strata, counts, strict=True)])
    return picked.drop(columns="_order").sort_index().reset_index(drop=True)
