"""Proposition 1's check on kernels whose relation to the bilinear term is known."""

from __future__ import annotations

import numpy as np
import pytest

from dcr.analysis.proposition import bound_check, bound_pairs
from dcr.errors import DCRError

LABELS = np.array(["toxic", "seemingly_toxic", "general"] * 6)


def states(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(18, 12))


def test_a_kernel_that_is_the_bilinear_term_is_found_tight():
    h = states()
    pairs = bound_pairs(h, 3.0 * np.abs(h @ h.T), LABELS)
    assert len(pairs) == 18 * 17 // 2 and set(pairs["pair"]) >= {
        "toxic / seemingly_toxic",
        "toxic / toxic",
    }
    check = bound_check(pairs)
    assert (
        check["spearman"] == pytest.approx(1.0)
        and check["constant"] == pytest.approx(3.0)
        and check["slack"] == pytest.approx(1.0)
    )


def test_an_unrelated_kernel_is_found_loose():
    noise = np.abs(states(1) @ states(2).T)
    check = bound_check(bound_pairs(states(), noise + noise.T, LABELS))
    assert check["low"] < 0 < check["high"] and check["slack"] > 2


def test_a_reversed_relation_is_found():
    h = states()
    check = bound_check(bound_pairs(h, 1 / (1 + np.abs(h @ h.T)), LABELS))
    assert check["high"] < 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(DCRError, match="18 states, kernel"):
        bound_pairs(states(), np.ones((4, 4)), LABELS)
