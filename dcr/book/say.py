"""What the notebooks' sentences are made of: a number with its interval, a verb that follows it.

A sentence that is typed with a direction is wrong for the next run; here the interval chooses.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

MAIN = ("base", "STL", "DCR", "DCR-sham", "Gate", "Token+Gate-base")


def main_rows(table: pd.DataFrame, methods: Sequence[str] = MAIN) -> pd.DataFrame:
    """The rows of the methods that a reader needs, in this order, as far as they ran."""
    rows, place = table[table["method"].isin(methods)], {m: i for i, m in enumerate(methods)}
    return rows.sort_values("method", key=lambda names: names.map(place), kind="stable")


def _ends(row: Any, low: str) -> tuple[float, float] | None:
    """The ends of a row's interval; None where there is none (a single seed, NaN)."""
    ends = row[low], row[low.replace("low", "high")]
    return ends if ends[0] < ends[1] else None


def number(row: Any, value: str = "value", low: str = "low", form: str = ".2f") -> str:
    """ "0.44 [0.40, 0.48]" of a row; "(no interval)" where a single seed gives none.

    low: the column of the lower end; the upper end's has "high" for "low" in its name.
    """
    ends = _ends(row, low)
    shown = f"[{ends[0]:{form}}, {ends[1]:{form}}]" if ends else "(no interval)"
    return f"{row[value]:{form}} {shown}"


def side(
    row: Any,
    at: float = 0.0,
    words: Sequence[str] = ("above", "below", "not told from"),
    low: str = "low",
) -> str:
    """The word for where a row's interval lies: above `at`, below it, or around it (or none)."""
    ends = _ends(row, low)
    if ends and ends[0] > at:
        return words[0]
    return words[1] if ends and ends[1] < at else words[2]


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
    old, new = _ends(before, low), _ends(after, low)
    if old and new and new[0] > old[1]:
        return words[0]
    return words[1] if old and new and new[1] < old[0] else words[2]
