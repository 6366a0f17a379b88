"""One interval rule: requests are drawn, each with all its prompts, forms and seeds; seeds on top.

A draw gives every request an exponential weight (the Bayesian bootstrap, Rubin 1981) that is a hash
of its name: no number changes with the company it is read in, and methods read on the same prompts
are paired. A statistic with bounds also meets one made-up request at each bound, so that n of n has
nearly the lower limit of Clopper and Pearson and not [1, 1]. Wilson stays for a single proportion,
McNemar for two of them on the same prompts, Holm for the comparisons that a table shows.
Seeds are few, so Student's t stands for what they differ by beyond their requests, and p has the
degrees of freedom of both (Satterthwaite). Where seeds' true rates lie .1 apart, five cover .93 (a
normal: .87; test_intervals simulates it).
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import t as student
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from dcr.errors import DCRError

N_BOOT = 1000
LEVEL = (0.025, 0.975)
SHARE, SIGNED = (0.0, 1.0), (-1.0, 1.0)  # bounds of a share, of a difference of shares
Names = Sequence[str] | np.ndarray | pd.Series


@functools.lru_cache(maxsize=2**15)
def _weights_of(request: str, n_boot: int) -> np.ndarray:
    key = int.from_bytes(hashlib.sha256(request.encode()).digest()[:8], "big")
    return np.random.default_rng(key).standard_exponential(n_boot)


def request_weights(requests: Names, n_boot: int = N_BOOT) -> np.ndarray:
    """[1 + n_boot, n] weight of each row's request; row 0 is the sample itself (all 1)."""
    codes, unique = pd.factorize(np.asarray(requests, dtype=object))
    if not len(codes) or n_boot < 1:
        raise DCRError(f"bootstrap: {len(codes)} prompts, n_boot={n_boot}; need at least 1 each.")
    drawn = np.stack([_weights_of(str(u), n_boot) for u in unique])[codes].T  # [n_boot, n]
    return np.vstack([np.ones(len(codes)), drawn])


def shares(weights: np.ndarray) -> np.ndarray:
    """[1 + n_boot, n] the weights of a mean: they add up to 1 in each draw.

    They are `widened` (a share may fall below 0 by a hair).
    """
    m = len(np.unique(weights[-1]))  # requests: each has a weight of its own
    return widened(weights / weights.sum(1, keepdims=True), m)


def widened(draws: np.ndarray, m: int) -> np.ndarray:
    """Draws [1 + n_boot, ...] of a statistic of m requests, as far apart as they should lie.

    The Bayesian bootstrap spreads a mean by (m - 1) / (m + 1) of its unbiased variance.
    """
    return draws[:1] + np.sqrt((m + 1) / max(m - 1, 1)) * (draws - draws[:1])


def effective_n(weights: np.ndarray, requests: Names) -> float:
    """Kish's number of requests behind a weighted mean: (Σu)² / Σu², u a request's weight."""
    u = np.bincount(pd.factorize(np.asarray(requests, dtype=object))[0], np.abs(weights))
    return float(u.sum() ** 2 / (u**2).sum())


def interval(
    draws: np.ndarray, n: float | np.ndarray = 0.0, bounds: tuple[float, float] | None = SHARE
) -> dict[str, np.ndarray]:
    """value, low, high, p [...] from draws [1 + n_boot, seeds, ...] (row 0: the sample).

    The value is the mean over seeds. Seeds that differ by more than what requests spread (drawn
    apart for each, that spread is in the draws already) widen the interval by the rest. p: of the
    value 0, two-sided, Student's, about the interval's centre. n: requests behind the statistic.
    bounds: None where it has none.
    """
    seeds, drawn = draws.shape[1], draws[1:].mean(1)
    value = np.round(draws[0].mean(0), 12)  # sums of weights miss 1 by a few bits
    rng, column = np.random.default_rng(0x5EED), (-1, *[1] * (drawn.ndim - 1))
    degrees: float | np.ndarray = np.inf  # Satterthwaite's, of Student's t
    if seeds > 1:
        apart = draws[0] - value  # [seeds, ...]
        by_requests, total = (draws[1:] - drawn[:, None]).var(0).sum(0), (apart**2).sum(0)
        rest = np.sqrt(np.clip(1 - by_requests / np.where(total > 0, total, np.inf), 0, 1))
        multipliers = rng.standard_normal((len(drawn), seeds)) / np.sqrt(seeds * (seeds - 1))
        multipliers *= np.sqrt((seeds - 1) / rng.chisquare(seeds - 1, (len(drawn), 1)))
        by_seeds = rest**2 * total / (seeds * (seeds - 1))
        share = by_seeds / np.maximum(by_seeds + drawn.var(0), 1e-300)
        degrees = (seeds - 1) / np.maximum(share, 1e-6) ** 2
        drawn = drawn + rest * np.tensordot(multipliers, apart, (1, 0))
    if bounds is not None:
        a, b = (x.reshape(column) for x in rng.standard_exponential((2, len(drawn))))
        drawn = (n * drawn.clip(*bounds) + a * bounds[0] + b * bounds[1]) / (n + a + b)
    low, high = np.quantile(drawn, LEVEL, axis=0)
    se = np.maximum((high - low) / (2 * student.ppf(LEVEL[1], degrees)), 1e-12)
    centre = value if bounds is None else (n * value + sum(bounds)) / (n + 2)
    low, high = np.minimum(low, value), np.maximum(high, value)
    p = 2 * student.sf(np.abs(centre) / se, degrees)
    return {"value": value, "low": low, "high": high, "p": p}


def mean_interval(
    values: Sequence | np.ndarray | pd.Series,
    requests: Names | None = None,
    *,
    bounds: tuple[float, float] | None = None,
    n_boot: int = N_BOOT,
) -> tuple[float, float, float]:
    """(mean, low, high) of values [n] or [n, seeds]; `requests` [n]: what is drawn (the rows)."""
    table = np.asarray(values, dtype=float).reshape(len(values), -1)
    names = np.arange(len(table)).astype(str) if requests is None else requests
    weights = request_weights(names, n_boot)
    found = interval(shares(weights) @ table, effective_n(weights[0], names), bounds)
    return float(found["value"]), float(found["low"]), float(found["high"])


def holm(p: Sequence[float] | np.ndarray | pd.Series) -> np.ndarray:
    """Holm's p values over a family; NaN stays NaN and does not count."""
    values = np.asarray(p, dtype=float)
    known, result = np.isfinite(values), np.full(len(values), np.nan)
    if known.any():
        result[known] = multipletests(values[known], method="holm")[1]
    return result


def wilson(count: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share. Raises DCRError for n = 0 or count outside 0..n."""
    if n < 1 or not 0 <= count <= n:
        raise DCRError(f"wilson: {count} of {n}; need 0 <= count <= n and n >= 1.")
    low, high = proportion_confint(count, n, method="wilson")
    return float(low), float(high)


def mcnemar_exact(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided exact McNemar p value of two methods' hits on the same prompts."""
    x, y = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if x.shape != y.shape:
        raise DCRError(f"mcnemar: {x.size} and {y.size} outcomes; both need the same prompts.")
    table = [[(x & y).sum(), (x & ~y).sum()], [(~x & y).sum(), (~x & ~y).sum()]]
    return float(min(1.0, mcnemar(table, exact=True).pvalue))
