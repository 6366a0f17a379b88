"""What kernel norms say: means between classes, and Proposition 1 in numbers.

Both read pairs of prompts. Two prompts of one request (its two forms, or the members of a minimal
pair) are no pair, and a pair weighs what its two requests weigh in a draw.

Proposition 1: does |h'ᵀh| at layer ℓ say how large the kernel ‖K(x', x)‖_F is? The paper bounds
‖K(x', x)‖_F by c h'ᵀQh + Δ once everything above ℓ is frozen (PAPER "Motivation", item 5). Q and c
are unknown, so Q = 1 here, and absolute values, for a norm cannot be negative. τ = 0 holds in stage
1 only.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from dcr.errors import DCRError
from dcr.evaluate.auroc import Mass
from dcr.evaluate.intervals import SIGNED, Names, interval, request_weights, widened


def class_matrix(
    norms: np.ndarray | Sequence[np.ndarray], labels: Names, requests: Names
) -> pd.DataFrame:
    """Rows class_a, class_b, normalised, symmetric, each with _low and _high (95 %), n (pairs).

    norms: ‖K(x', x)‖_F, [n, n], x' of class_a, x of class_b; or several, one a seed, on the same
    prompts. Intervals draw requests and seeds (NaN within a class of two requests). Raises DCRError
    for a class of one request.
    """
    stack = np.stack(norms if isinstance(norms, (list, tuple)) else [norms])  # [seeds, n, n]
    own = np.diagonal(stack, axis1=1, axis2=2)  # [seeds, n]
    ratios = {
        "normalised": stack / own[:, :, None],
        "symmetric": stack / np.sqrt(own[:, :, None] * own[:, None]),
    }
    kinds, names, drawn = np.asarray(labels), np.asarray(requests), request_weights(requests)
    members = {c: np.flatnonzero(kinds == c) for c in dict.fromkeys(kinds.tolist())}
    behind = {c: len(set(names[i])) for c, i in members.items()}
    for name, m in behind.items():
        if m < 2:
            raise DCRError(f"kernel by class: {m} request of class {name!r}; give at least 2.")
    rows = []
    for a, b in itertools.product(members, repeat=2):
        i, j = (x.ravel() for x in np.meshgrid(members[a], members[b], indexing="ij"))
        i, j = (x[names[i] != names[j]] for x in (i, j))
        weights = drawn[:, i] * drawn[:, j]
        weights /= weights.sum(1, keepdims=True)
        least, row = min(behind[a], behind[b]), {"class_a": a, "class_b": b}
        for name, ratio in ratios.items():
            draws = weights @ ratio[:, i, j].T  # [1 + n_boot, seeds]
            draws = _within(draws, behind[a]) if a == b else widened(draws, least)
            found = interval(draws, bounds=None)
            row |= {name: float(found["value"])}
            known = a != b or least > 2  # two requests are one pair: nothing to draw
            row |= {f"{name}_{s}": float(found[s]) if known else np.nan for s in ("low", "high")}
        rows.append({**row, "n": len(i)})
    return pd.DataFrame(rows)


def _within(draws: np.ndarray, m: int) -> np.ndarray:
    """`widened`, and for a statistic of the pairs among m requests: each meets m - 1 others, so
    that what it differs by shows in its own pairs as (m - 2) / (m - 1) of that."""
    return draws[:1] + (m - 1) / max(m - 2, 1) * (widened(draws, m) - draws[:1])


def bound_pairs(
    states: np.ndarray, norms: np.ndarray, labels: Names, requests: Names
) -> pd.DataFrame:
    """Rows a, b, pair (classes), bilinear = |h_aᵀh_b|, cosine, kernel = ‖K‖_F of pairs of prompts.

    states: [n, hidden] at ℓ; norms: [n, n]. Raises DCRError when they do not fit, or for fewer than
    3 requests.
    """
    n, kinds, names = len(states), np.asarray(labels), np.asarray(requests)
    if norms.shape != (n, n) or {len(kinds), len(names)} != {n} or len(set(names)) < 3:
        raise DCRError(
            f"bound_pairs: {n} states, kernel {norms.shape}, {len(kinds)} labels, {len(names)} "
            "requests; need the same number of prompts, of 3 or more requests."
        )
    states = np.asarray(states, dtype=float)
    a, b = np.triu_indices(n, 1)
    a, b = (x[names[a] != names[b]] for x in (a, b))
    product, size = (states @ states.T)[a, b], np.linalg.norm(states, axis=1)
    pair = [" / ".join(sorted(two, reverse=True)) for two in zip(kinds[a], kinds[b], strict=True)]
    cosine = product / (size[a] * size[b])
    columns = {"a": a, "b": b, "pair": pair, "bilinear": np.abs(product)}
    return pd.DataFrame({**columns, "cosine": cosine, "kernel": norms[a, b]})


def bound_check(pairs: pd.DataFrame, requests: Names) -> dict[str, float]:
    """Spearman correlation of bilinear term and kernel (95 %), and the bound's slack.

    pairs: of `bound_pairs`, of prompts of these `requests`. constant: the smallest c with
    ‖K‖ ≤ c |h'ᵀh| for all these pairs; slack: the median of c |h'ᵀh| / ‖K‖ (1 is tight).
    """
    drawn, m = request_weights(requests), len(set(requests))
    weights = drawn[:, pairs["a"]] * drawn[:, pairs["b"]]
    read = spearman(pairs["bilinear"].to_numpy(), pairs["kernel"].to_numpy(), weights)
    found = interval(_within(read, m)[:, None], m, SIGNED)
    ratio = pairs["kernel"] / pairs["bilinear"].clip(lower=np.finfo(float).tiny)
    return {
        "spearman": float(found["value"]),
        "low": float(found["low"]),
        "high": float(found["high"]),
        "constant": float(ratio.max()),
        "slack": float((ratio.max() / ratio).median()),
    }


def spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[draws] Spearman's correlation of x and y [n] under weights [draws, n]."""
    share = weights / weights.sum(1, keepdims=True)
    ranks = (Mass(v, share).above(v) for v in (x, y))  # [draws, n] each
    a, b = (r - (share * r).sum(1, keepdims=True) for r in ranks)
    return (share * a * b).sum(1) / np.sqrt((share * a**2).sum(1) * (share * b**2).sum(1))
