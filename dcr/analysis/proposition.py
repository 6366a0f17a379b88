"""Proposition 1 in numbers: does |h'ᵀh| at layer ℓ say how large the kernel ‖K(x', x)‖_F is?

The paper bounds ‖K(x', x)‖_F by c h'ᵀQh + Δ once everything above ℓ is frozen (PAPER "Motivation",
item 5). Q and c are unknown, so Q = 1 here, and absolute values, for a norm cannot be negative.
τ = 0 holds in stage 1 only.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from dcr.errors import DCRError

DRAWS = 500  # of the bootstrap


def bound_pairs(states: np.ndarray, norms: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Rows a, b, pair (classes), bilinear = |h_aᵀh_b|, cosine, kernel = ‖K‖_F of different prompts.

    states: [n, hidden] at ℓ; norms: [n, n]. Raises DCRError when they do not fit, or n < 3.
    """
    n = len(states)
    if norms.shape != (n, n) or len(labels) != n or n < 3:
        raise DCRError(
            f"bound_pairs: {n} states, kernel {norms.shape}, {len(labels)} labels; need the same 3 "
            "or more prompts."
        )
    states = np.asarray(states, dtype=float)
    a, b = np.triu_indices(n, 1)
    product, size = (states @ states.T)[a, b], np.linalg.norm(states, axis=1)
    pair = [
        " / ".join(sorted(names, reverse=True)) for names in zip(labels[a], labels[b], strict=True)
    ]
    cosine = product / (size[a] * size[b])
    columns = {"a": a, "b": b, "pair": pair, "bilinear": np.abs(product)}
    return pd.DataFrame({**columns, "cosine": cosine, "kernel": norms[a, b]})


def bound_check(pairs: pd.DataFrame) -> dict[str, float]:
    """Spearman correlation of bilinear term and kernel (95 % over prompts), and the bound's slack.

    constant: the smallest c with ‖K‖ ≤ c |h'ᵀh| for all these pairs; slack: the median of
    c |h'ᵀh| / ‖K‖ (1 is tight).
    """
    n = int(pairs[["a", "b"]].to_numpy().max()) + 1
    table = np.full((2, n, n), np.nan)
    for square, column in zip(table, ("bilinear", "kernel"), strict=True):
        square[pairs["a"], pairs["b"]] = square[pairs["b"], pairs["a"]] = pairs[column]
    rng, draws = np.random.default_rng([0, 0x50]), []
    upper = np.triu_indices(n, 1)
    for rows in rng.integers(n, size=(DRAWS, n)):
        i, j = (rows[t] for t in upper)
        bilinear, kernel = table[:, i[i != j], j[i != j]]
        if len(set(rows.tolist())) > 2:
            draws.append(spearmanr(bilinear, kernel).statistic)
    low, high = np.nanquantile(draws, [0.025, 0.975])
    ratio = pairs["kernel"] / pairs["bilinear"].clip(lower=np.finfo(float).tiny)
    return {
        "spearman": float(spearmanr(pairs["bilinear"], pairs["kernel"]).statistic),
        "low": float(low),
        "high": float(high),
        "constant": float(ratio.max()),
        "slack": float((ratio.max() / ratio).median()),
    }
