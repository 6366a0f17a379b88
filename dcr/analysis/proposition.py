"""Proposition 1 in numbers: does the bilinear term |h'ᵀh| at layer ℓ say how large the kernel ‖K(x', x)‖_F is?

The paper bounds ‖K(x', x)‖_F by c h'ᵀQh + Δ once everything above ℓ is frozen (PAPER "Motivation", item 5). Q and c are
unknown, so Q = 1 here, and absolute values, for a norm cannot be negative. τ = 0 holds in stage 1 only.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from dcr.errors import DCRError

TIGHT = 0.7  # rank correlation from which on the bilinear term may be said to follow the kernel


def bound_pairs(states: np.ndarray, norms: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Rows a, b, pair (classes), bilinear = |h_aᵀh_b|, cosine, kernel = ‖K‖_F for every pair of different prompts.

    states: [n, hidden] at ℓ; norms: [n, n]. Raises DCRError when they do not fit together or n < 3.
    """
    n = len(states)
    if norms.shape != (n, n) or len(labels) != n or n < 3:
        raise DCRError(
            f"bound_pairs: {n} states, kernel {norms.shape}, {len(labels)} labels; need the same 3 or more prompts."
        )
    states = np.asarray(states, dtype=float)
    a, b = np.triu_indices(n, 1)
    product, size = states @ states.T, np.linalg.norm(states, axis=1)
    pair = [
        " / ".join(sorted((labels[i], labels[j]), reverse=True)) for i, j in zip(a, b, strict=True)
    ]
    return pd.DataFrame(
        {
            "a": a,
            "b": b,
            "pair": pair,
            "bilinear": np.abs(product[a, b]),
            "cosine": product[a, b] / (size[a] * size[b]),
            "kernel": norms[a, b],
        }
    )


def bound_check(pairs: pd.DataFrame, *, seed: int = 0, n_boot: int = 500) -> dict[str, object]:
    """Spearman correlation of bilinear term and kernel with a 95 % bootstrap over prompts, and how loose the bound is.

    constant: the smallest c with ‖K‖ ≤ c |h'ᵀh| for all these pairs; slack: the median of c |h'ᵀh| / ‖K‖ (1 is tight).
    reading: the same in words.
    """
    n = int(max(pairs["a"].max(), pairs["b"].max())) + 1
    table = {c: np.full((n, n), np.nan) for c in ("bilinear", "kernel")}
    for column, square in table.items():
        square[pairs["a"], pairs["b"]] = square[pairs["b"], pairs["a"]] = pairs[column]
    rng, draws = np.random.default_rng([seed, 0x50]), []
    for _ in range(n_boot):
        rows = rng.integers(n, size=n)
        i, j = (rows[t] for t in np.triu_indices(n, 1))
        other = i != j
        if len(set(rows.tolist())) > 2:
            draws.append(
                spearmanr(
                    table["bilinear"][i[other], j[other]], table["kernel"][i[other], j[other]]
                ).statistic
            )
    low, high = np.nanquantile(draws, [0.025, 0.975])
    value = float(spearmanr(pairs["bilinear"], pairs["kernel"]).statistic)
    ratio = pairs["kernel"] / pairs["bilinear"].clip(lower=np.finfo(float).tiny)
    slack = float((ratio.max() / ratio).median())
    return {
        "spearman": value,
        "low": float(low),
        "high": float(high),
        "pairs": len(pairs),
        "prompts": n,
        "constant": float(ratio.max()),
        "slack": slack,
        "reading": _reading(float(low), float(high), slack),
    }


def _reading(low: float, high: float, slack: float) -> str:
    if low > TIGHT:
        order = "the bilinear term follows the kernel"
    elif low > 0:
        order = "loose: the bilinear term orders the pairs only in part"
    elif high < 0:
        order = "against the bound's use: a larger bilinear term goes with a smaller kernel"
    else:
        order = "loose: no rank correlation beyond chance"
    return f"{order}; the bound at its smallest constant lies {slack:.1f} times above the median kernel"
