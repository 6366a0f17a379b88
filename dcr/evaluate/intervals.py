"""One interval rule: requests are drawn, and with them every prompt, form and seed of each; seeds are drawn on top.

A draw gives every request an exponential weight (Bayesian bootstrap: Rubin 1981), which is a hash of the
request's own name: a number never changes with the company it is read in, and two methods read on the
same prompts are paired. What lies between bounds also meets one made-up request at each bound, so that
n of n has the lower limit of Clopper and Pearson and not [1, 1]. Wilson stays for a single proportion,
McNemar for two of them on the same prompts, Holm for the family of comparisons that a table shows.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import norm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from dcr.errors import DCRError

N_BOOT = 1000
LEVEL = (0.025, 0.975)


@functools.lru_cache(maxsize=2**15)
def _weights_of(request: str, n_boot: int) -> np.ndarray:
    key = int.from_bytes(hashlib.sha256(request.encode()).digest()[:8], "big")
    return np.random.default_rng(key).standard_exponential(n_boot)


def request_weights(requests: Sequence[str], n_boot: int = N_BOOT) -> np.ndarray:
    """[1 + n_boot, n] weights of each row's request; row 0 is the sample itself (all 1). Raises DCRError if empty."""
    names = pd.Series(list(requests)).astype(str)
    if names.empty or n_boot < 1:
        raise DCRError(f"bootstrap: {len(names)} prompts, n_boot={n_boot}; both must be above 0.")
    codes, unique = pd.factorize(names)
    drawn = np.stack([_weights_of(u, n_boot) for u in unique])[codes].T  # [n_boot, n]
    return np.vstack([np.ones(len(names)), drawn])


def effective_n(weights: np.ndarray, requests: Sequence[str]) -> float:
    """Kish's number of requests behind a weighted mean: (Σu)² / Σu², u the weight of a request."""
    u = pd.Series(weights).groupby(list(requests), sort=False).sum().to_numpy()
    return float(u.sum() ** 2 / (u**2).sum())


@functools.cache
def _noise(n_boot: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the two made-up requests [n_boot, 2] and Student multipliers of seeds [n_boot, seeds]."""
    rng = np.random.default_rng(0x5EED)
    pseudo = rng.standard_exponential((n_boot, 2))
    normal, chi = rng.standard_normal((n_boot, seeds)), rng.chisquare(max(seeds - 1, 1), n_boot)
    return pseudo, normal / np.sqrt(chi[:, None] * seeds)


def interval(
    draws: np.ndarray, n: float | np.ndarray = 0.0, bounds: tuple[float, float] | None = (0.0, 1.0)
) -> dict[str, np.ndarray]:
    """value, low, high, se [...] of a statistic from its draws [1 + n_boot, seeds, ...]; row 0 is the sample itself.

    The value is the mean over seeds. Beyond what requests alone spread, seeds that differ widen the
    interval by Student's t. n: requests behind the statistic; bounds None: it has none, nothing is added.
    """
    seeds = draws.shape[1]
    value, drawn = draws[0].mean(0), draws[1:].mean(1)  # [...], [n_boot, ...]
    pseudo, multipliers = _noise(len(drawn), seeds)
    if seeds > 1:
        apart = draws[0] - value  # [seeds, ...]
        by_requests = (draws[1:] - drawn[:, None]).var(axis=0).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            kept = np.nan_to_num(np.sqrt(np.clip(1 - by_requests / (apart**2).sum(0), 0, 1)))
        drawn = drawn + kept * np.tensordot(multipliers, apart, (1, 0))
    if bounds is not None:
        a, b = (pseudo[:, i].reshape(-1, *[1] * (drawn.ndim - 1)) for i in (0, 1))
        drawn = (n * drawn.clip(*bounds) + a * bounds[0] + b * bounds[1]) / (n + a + b)
    low, high = np.quantile(drawn, LEVEL, axis=0)
    se = (high - low) / (norm.ppf(LEVEL[1]) - norm.ppf(LEVEL[0]))
    return {
        "value": value,
        "low": np.minimum(low, value),
        "high": np.maximum(high, value),
        "se": se,
    }


def mean_interval(
    values: Sequence[float] | np.ndarray,
    requests: Sequence[str] | None = None,
    *,
    bounds: tuple[float, float] | None = None,
    n_boot: int = N_BOOT,
) -> tuple[float, float, float]:
    """(mean, low, high) of values [n] or [n, seeds]; rows of one request are drawn together (default: each its own)."""
    table = np.asarray(values, dtype=float).reshape(len(values), -1)
    names = range(len(table)) if requests is None else requests
    weights = request_weights(list(map(str, names)), n_boot)
    draws = weights @ table / weights.sum(1, keepdims=True)
    found = interval(draws, effective_n(weights[0], list(names)), bounds)
    return float(found["value"]), float(found["low"]), float(found["high"])


def mean_over_seeds(rows: pd.DataFrame, by: Sequence[str], value: str = "value") -> pd.DataFrame:
    """`by`, value, low, high (Student's t over seeds; the value itself where there is one seed), seeds. For trajectories."""
    found = []
    for key, part in rows.groupby(list(by), sort=False, dropna=False):
        each = part.groupby("seed")[value].mean().to_numpy() if "seed" in part else part[value]
        result = interval(np.repeat(np.asarray(each)[None], N_BOOT + 1, axis=0), bounds=None)
        numbers = {value: result["value"], "low": result["low"], "high": result["high"]}
        found.append({**dict(zip(by, key, strict=True)), **numbers, "seeds": len(each)})
    return pd.DataFrame(found)


def p_value(value: float | np.ndarray, se: float | np.ndarray) -> np.ndarray:
    """Two-sided p of "no difference" from a difference and its standard error; 1 where both are 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.abs(np.asarray(value)) / np.asarray(se)
    return 2 * norm.sf(np.nan_to_num(z, nan=0.0))


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's p values over a family; NaN stays NaN and does not count."""
    values = np.asarray(p, dtype=float)
    known = np.isfinite(values)
    result = np.full(len(values), np.nan)
    if known.any():
        result[known] = multipletests(values[known], method="holm")[1]
    return result


def wilson(count: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share. Raises DCRError for n = 0 or count outside 0..n."""
    if n < 1 or not 0 <= count <= n:
        raise DCRError(f"wilson: {count} of {n}; need 0 <= count <= n and n >= 1.")
    low, high = proportion_confint(count, n, method="wilson")
    return float(low), float(high)


def mcnemar_exact(a: Sequence[bool] | np.ndarray, b: Sequence[bool] | np.ndarray) -> float:
    """Two-sided exact McNemar p value of two methods' hits on the same prompts."""
    x, y = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if x.shape != y.shape:
        raise DCRError(f"mcnemar: {x.size} and {y.size} outcomes; both need the same prompts.")
    table = [[(x & y).sum(), (x & ~y).sum()], [(~x & y).sum(), (~x & ~y).sum()]]
    return float(min(1.0, mcnemar(table, exact=True).pvalue)) if (x != y).any() else 1.0


# ---- Below: what tables/ still calls; goes with its last caller.


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
