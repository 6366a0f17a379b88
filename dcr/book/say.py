"""What the notebooks' sentences are made of: a number with its interval, a verb that follows it.

A sentence that is typed with a direction is wrong for the next run; here the interval chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

MAIN = ("base", "STL", "DCR", "DCR-sham", "Gate", "Token+Gate-base")


def main_rows(table: pd.DataFrame, methods: Sequence[str] = MAIN) -> pd.DataFrame:
    """The rows of the methods that a reader needs, in this order, as far as they ran."""
    rows, place = table[table["method"].isin(methods)], {m: i for i, m in enumerate(methods)}
    return rows.sort_values("method", key=lambda names: names.map(place), kind="stable")


def number(row: Any, value: str = "value", low: str = "low", form: str = ".2f") -> str:
    """ "0.44 [0.40, 0.48]" of a row; "(no interval)" where a single seed gives none.

    low: the column of the lower end; the upper end's has "high" for "low" in its name.
    """
    ends = row[low], row[low.replace("low", "high")]
    if not ends[0] < ends[1]:  # NaN as well
        return f"{row[value]:{form}} (no interval)"
    return f"{row[value]:{form}} [{ends[0]:{form}}, {ends[1]:{form}}]"


def side(
    row: Any,
    at: float = 0.0,
    words: Sequence[str] = ("above", "below", "not told from"),
    low: str = "low",
) -> str:
    """The word for where a row's interval lies: above `at`, below it, or around it (or none)."""
    ends = row[low], row[low.replace("low", "high")]
    if not ends[0] < ends[1]:
        return words[2]
    return words[0] if ends[0] > at else words[1] if ends[1] < at else words[2]


def change(
    before: Any,
    after: Any,
    words: Sequence[str] = ("rises", "falls", "cannot be told to change"),
    low: str = "low",
) -> str:
    """The word for two intervals: the second lies above the first, below it, or they overlap.

    A cautious rule: intervals that overlap a little may still hide a change. Where one of the two
    has no interval, no change is told.
    """
    high = low.replace("low", "high")
    if not (before[low] < before[high] and after[low] < after[high]):
        return words[2]
    return (
        words[0]
        if after[low] > before[high]
        else words[1]
        if after[high] < before[low]
        else words[2]
    )
