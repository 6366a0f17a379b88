"""Kernels between classes, and Proposition 1's check where the relation is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from dcr.errors import DCRError
from dcr.evaluate.intervals import mean_interval
from dcr.evaluate.kernels import bound_check, bound_pairs, class_matrix, spearman

LABELS = np.array(["toxic", "seemingly_toxic", "general"] * 6)
ASKED = np.array([f"r{i}" for i in range(18)])


def states(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(18, 12))


def kernel(requests, noise: float = 0.05, between: float = 0.3, seed: int = 0) -> np.ndarray:
    """Norms that are 2 on the diagonal, 1.9 within a request, else `between` and its request's."""
    rng, names = np.random.default_rng(seed), np.asarray(requests)
    own = dict(zip(dict.fromkeys(requests), rng.normal(scale=noise, size=99), strict=False))
    each = np.array([own[r] for r in requests])
    norms = np.where(np.equal.outer(names, names), 1.9, between + each[:, None] + each)
    np.fill_diagonal(norms, 2.0)
    return norms


def test_class_means_leave_out_the_other_form_and_intervals_draw_requests():
    """A class asked in both forms says what it says in one: its twins are no further prompts."""
    labels, requests = ["toxic"] * 8 + ["general"] * 7, [f"r{i}" for i in range(15)]
    once = class_matrix(kernel(requests), labels, requests)
    twice = class_matrix(kernel(requests * 2), labels * 2, requests * 2)
    numbers = [c for c in once if c.endswith(("normalised", "symmetric", "low", "high"))]
    np.testing.assert_allclose(twice[numbers], once[numbers], atol=1e-9)
    assert once["n"].tolist() == [56, 56, 56, 42] and (twice["n"] == 4 * once["n"]).all()
    cross = once.set_index(["class_a", "class_b"]).loc[("toxic", "general")]
    assert cross["normalised"] == pytest.approx(0.15, abs=0.03)
    assert cross["normalised_low"] < cross["normalised"] < cross["normalised_high"]
    with pytest.raises(DCRError, match="1 request of class 'general'"):
        class_matrix(kernel(requests[:9] * 2), labels[:9] * 2, requests[:9] * 2)


def test_intervals_of_class_means_are_as_wide_as_requests_ask_for():
    """Each adds its own to both sides of its pairs: the mean is that of twice what they add."""
    requests = [f"r{i}" for i in range(8)]
    found = class_matrix(kernel(requests), ["toxic"] * 8, requests).iloc[0]
    added = np.random.default_rng(0).normal(scale=0.05, size=99)[:8] / 2  # over the diagonal's 2
    _, low, high = mean_interval(2 * added, requests)
    assert found["normalised_high"] - found["normalised_low"] == pytest.approx(high - low, rel=0.1)


def test_bound_pairs_leave_out_one_request_and_the_check_draws_requests():
    h, asked = np.repeat(states()[:9], 2, axis=0), np.repeat(ASKED[:9], 2)
    norms = np.abs(h @ h.T) + np.abs(states(3) @ states(3).T)[:9, :9].repeat(2, 0).repeat(2, 1)
    every = bound_pairs(h, norms, LABELS, asked)
    assert len(every) == 4 * 9 * 8 // 2 and (asked[every["a"]] != asked[every["b"]]).all()
    once = bound_pairs(h[::2], norms[::2, ::2], LABELS[::2], asked[::2])
    assert bound_check(every, asked) == pytest.approx(bound_check(once, asked[::2]))


def test_spearman_is_scipys_and_weights_stand_for_copies():
    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=(2, 30)).astype(float)
    copies = rng.integers(1, 4, size=30)
    found = spearman(x, y, np.stack([np.ones(30), copies]))
    expected = [spearmanr(x.repeat(n), y.repeat(n)).statistic for n in (1, copies)]
    np.testing.assert_allclose(found, expected)


def test_a_kernel_that_is_the_bilinear_term_is_found_tight():
    h = states()
    pairs = bound_pairs(h, 3.0 * np.abs(h @ h.T), LABELS, ASKED)
    assert len(pairs) == 18 * 17 // 2 and set(pairs["pair"]) >= {
        "toxic / seemingly_toxic",
        "toxic / toxic",
    }
    check = bound_check(pairs, ASKED)
    assert (
        check["spearman"] == pytest.approx(1.0)
        and check["constant"] == pytest.approx(3.0)
        and check["slack"] == pytest.approx(1.0)
    )


def test_an_unrelated_kernel_is_found_loose():
    noise = np.abs(states(1) @ states(2).T)
    check = bound_check(bound_pairs(states(), noise + noise.T, LABELS, ASKED), ASKED)
    assert check["low"] < 0 < check["high"] and check["slack"] > 2


def test_a_reversed_relation_is_found():
    h = states()
    check = bound_check(bound_pairs(h, 1 / (1 + np.abs(h @ h.T)), LABELS, ASKED), ASKED)
    assert check["high"] < 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(DCRError, match="18 states, kernel"):
        bound_pairs(states(), np.ones((4, 4)), LABELS, ASKED)


def test_two_requests_of_a_class_give_no_interval_within_it():
    norms = np.random.default_rng(0).uniform(1, 2, (8, 8))
    found = class_matrix(norms, ["a"] * 4 + ["b"] * 4, [f"r{i // 2}" for i in range(8)])
    within = found["class_a"] == found["class_b"]
    assert found.loc[within, "normalised_low"].isna().all() and found["normalised"].notna().all()
    assert (found.loc[~within, "normalised_low"] < found.loc[~within, "normalised_high"]).all()
