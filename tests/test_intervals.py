"""The one interval rule: what it gives where it is known, at the edges, paired, and over seeds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binomtest, t
from statsmodels.stats.contingency_tables import mcnemar

from dcr.errors import DCRError
from dcr.evaluate.intervals import (
    effective_n,
    holm,
    interval,
    mcnemar_exact,
    mean_interval,
    request_weights,
    shares,
    wilson,
)


@settings(deadline=None)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy_and_holds_the_share(pair):
    count, n = pair
    low, high = wilson(count, n)
    expected = binomtest(count, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert low - 1e-9 <= count / n <= high + 1e-9


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_equals_statsmodels(outcomes):
    a, b = np.array(outcomes).T
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    expected = mcnemar(table, exact=True).pvalue if (a != b).any() else 1.0
    assert mcnemar_exact(a, b) == pytest.approx(min(1.0, expected))


@pytest.mark.parametrize("n", [20, 60, 300])
def test_all_of_n_has_nearly_the_lower_limit_of_clopper_and_pearson(n):
    for value in (1.0, 0.0):
        mean, low, high = mean_interval(np.full(n, value), bounds=(0, 1), n_boot=4000)
        inner = low if value else 1 - high
        assert mean == value and inner == pytest.approx(beta.ppf(0.025, n, 1), abs=0.6 / n)
        assert (high if value else low) == value and low < high


def test_no_difference_anywhere_is_no_certainty():
    _, low, high = mean_interval(np.zeros(50), bounds=(-1, 1))
    assert -0.1 < low < 0 < high < 0.1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=4), min_size=2, max_size=20, unique=True), st.data())
def test_weights_of_a_request_do_not_depend_on_its_company(names, data):
    some = data.draw(st.permutations(names))[: data.draw(st.integers(1, len(names)))]
    weights = request_weights(names, 20)
    assert np.array_equal(request_weights(some, 20), weights[:, [names.index(s) for s in some]])
    assert (weights[0] == 1).all() and (weights > 0).all()


def test_rows_of_one_request_are_drawn_together():
    weights = request_weights(["a", "b", "a"], 10)
    assert np.array_equal(weights[:, 0], weights[:, 2]) and (weights[1:, 0] != weights[1:, 1]).all()
    values = np.tile(np.random.default_rng(0).random(60) < 0.5, 4)
    alone = mean_interval(values)
    together = mean_interval(values, [f"r{i % 60}" for i in range(240)])
    assert together[2] - together[1] > 1.6 * (alone[2] - alone[1]) and alone[0] == together[0]
    assert effective_n(np.ones(240), [f"r{i % 60}" for i in range(240)]) == pytest.approx(60)
    assert effective_n(np.array([2.0, 1, 1]), list("abc")) == pytest.approx(16 / 6)


def test_the_interval_of_a_mean_is_the_textbooks():
    values = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = mean_interval(values, n_boot=4000)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.03)
    assert mean_interval(values) == mean_interval(values)


def test_seeds_that_differ_widen_and_noise_of_requests_is_not_counted_twice():
    rng = np.random.default_rng(2)
    noise = (rng.random((300, 5)) < 0.5).astype(float)  # seeds alike, answers drawn for each
    apart = (rng.random((300, 5)) < [0.2, 0.35, 0.5, 0.65, 0.8]).astype(float)
    width = [np.diff(mean_interval(v)[1:])[0] for v in (noise, apart)]
    assert width[0] < 1.25 * 3.92 * 0.5 / np.sqrt(1500)
    few = 2 * t.ppf(0.975, 4) * apart.mean(0).std(ddof=1) / np.sqrt(5)
    assert width[1] == pytest.approx(few, rel=0.15)
    assert mean_interval(np.repeat(noise[:, :1], 5, 1)) == pytest.approx(mean_interval(noise[:, 0]))


def test_few_seeds_that_differ_are_covered_and_nothing_is_no_finding():
    """Two methods of 5 seeds whose true rates differ by chance alone, 150 shared requests."""
    rng, samples = np.random.default_rng(4), 1000
    rate = (0.5 + 0.1 * rng.standard_normal((2, samples * 5))).clip(0, 1)
    hits = (rng.random((150, 2, samples * 5)) < rate).astype(float)
    weights = shares(request_weights(np.arange(150).astype(str)))
    draws = np.tensordot(weights, hits[:, 0] - hits[:, 1], (1, 0)).reshape(1001, samples, 5)
    found = interval(draws.swapaxes(1, 2), 150, (-1.0, 1.0))  # a normal: .87, .13, .025
    assert ((found["low"] <= 0) & (found["high"] >= 0)).mean() > 0.92
    assert (found["p"] < 0.05).mean() < 0.08 and (found["p"] < 0.001).mean() < 0.02


def test_p_values_and_holm():
    normal = np.random.default_rng(0).normal(1.0, 0.5, (4000, 1))
    normal[0] = 1.0
    assert interval(normal, bounds=None)["p"] == pytest.approx(0.0455, abs=0.005)
    assert interval(np.zeros((100, 1)), bounds=None)["p"] == 1
    assert holm([0.01, 0.04, np.nan, 0.03])[[0, 1, 3]] == pytest.approx([0.03, 0.06, 0.06])
    assert np.isnan(holm([np.nan])[0])


def test_columns_of_statistics_equal_one_by_one():
    draws = np.random.default_rng(3).random((101, 3, 4))
    whole = interval(draws, np.array([5.0, 10, 20, 40]))
    for i, n in enumerate((5, 10, 20, 40)):
        single = interval(draws[..., i], n)
        assert all(whole[k][i] == pytest.approx(float(single[k])) for k in whole)


def test_nonsense_is_refused():
    for count, n in ((1, 0), (5, 4), (-1, 3)):
        with pytest.raises(DCRError, match="need 0 <= count"):
            wilson(count, n)
    with pytest.raises(DCRError, match="0 prompts"):
        request_weights([])
    with pytest.raises(DCRError, match="same prompts"):
        mcnemar_exact([True], [True, False])


def test_p_is_read_about_the_intervals_centre():
    """Requests made up at the bounds draw the interval to the middle, and p with it."""
    draws = request_weights(list("abcdefgh")) @ np.array([[1.0]] * 5 + [[0.0]] * 3) / 8
    free, bound = (interval(draws, 8, b) for b in (None, (-1.0, 1.0)))
    assert free["p"] < bound["p"] and free["value"] == bound["value"]
