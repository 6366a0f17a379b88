"""Bootstrap over prompts and seeds: the same draw of prompts for every checkpoint, and a draw of seeds on top.

A prompt and its form-swapped twin are one unit: they are drawn together, because they are one request.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from dcr.errors import DCRError


def unit_of(prompt_id: str) -> str:
    """The request behind a prompt: its id without the mark of the form-swapped twin."""
    return prompt_id.rstrip("~")


def set_of(benchmark: str) -> str:
    """The published set behind a benchmark: its name without "/swapped"."""
    return benchmark.removesuffix("/swapped")


def draw_units(
    units: Sequence[str], strata: Sequence[str], n_boot: int, rng: np.random.Generator
) -> pd.DataFrame:
    """How often each unit is drawn: counts [n_boot, units], columns the unit names; each stratum keeps its size.

    Raises DCRError when there is nothing to draw from or a unit stands in two strata.
    """
    table = pd.DataFrame({"unit": list(units), "stratum": list(strata)}).drop_duplicates()
    if table.empty or n_boot < 1:
        raise DCRError(
            f"bootstrap: {len(table)} prompts and n_boot={n_boot}; both must be at least 1."
        )
    if table["unit"].duplicated().any():
        raise DCRError(
            f"bootstrap: prompt {table.loc[table['unit'].duplicated(), 'unit'].iloc[0]!r} stands in two strata."
        )
    parts = []
    for _, members in table.groupby("stratum", sort=True):
        n = len(members)
        parts.append(
            pd.DataFrame(
                rng.multinomial(n, np.full(n, 1 / n), size=n_boot), columns=members["unit"]
            )
        )
    return pd.concat(parts, axis=1)


def draw_seeds(n_seeds: int, n_boot: int, rng: np.random.Generator) -> np.ndarray:
    """[n_boot, n_seeds] seed numbers drawn with replacement (all 0 for a single seed)."""
    return rng.integers(n_seeds, size=(n_boot, n_seeds))


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the finite values, NaN where there is none."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_over_seeds(
    values: Sequence[Sequence[float]], *, n_boot: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high) of [seeds, prompts] values, prompts and seeds both drawn with replacement.

    The same prompts are drawn for every seed: they are the same prompts. Raises DCRError for ragged or empty input.
    """
    try:
        table = np.asarray(values, dtype=float)
    except ValueError as error:
        raise DCRError("bootstrap over seeds: every seed needs the same prompts.") from error
    if table.ndim != 2 or not table.size:
        raise DCRError(
            f"bootstrap over seeds: values of shape {table.shape}; give [seeds, prompts]."
        )
    rng = np.random.default_rng([seed, 0x5EED])
    chosen = draw_seeds(len(table), n_boot, rng)
    prompts = rng.integers(table.shape[1], size=(n_boot, table.shape[1]))
    draws = np.array([table[s][:, p].mean() for s, p in zip(chosen, prompts, strict=True)])
    return float(table.mean()), *percentiles(draws)
