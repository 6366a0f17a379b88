"""Rates, intervals and paired tests against scipy, statsmodels and plain counting."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar

from dcr.errors import DCRError
from dcr.evaluate.metrics import (
    bootstrap_mean,
    mcnemar_exact,
    mean_rate,
    question_mark_rule,
    rate_rows,
    wilson,
)


@settings(deadline=None)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy_and_holds_the_share(pair):
    count, n = pair
    low, high = wilson(count, n)
    expected = binomtest(count, n).proportion_ci(method="wilson")
    assert low == pytest.approx(expected.low, abs=1e-6) and high == pytest.approx(
        expected.high, abs=1e-6
    )
    assert -1e-9 <= low <= count / n + 1e-9 and count / n - 1e-9 <= high <= 1 + 1e-9


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_equals_statsmodels(outcomes):
    a, b = np.array(outcomes).T
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    expected = mcnemar(table, exact=True).pvalue if (a != b).any() else 1.0
    assert mcnemar_exact(a, b) == pytest.approx(expected)


def prompts() -> pd.DataFrame:
    rows = (
        [("t", "toxic", "question")] * 2
        + [("t", "toxic", "imperative")] * 6
        + [("s", "seemingly_toxic", "question")] * 4
    )
    return pd.DataFrame(
        [
            {
                "id": f"p{i}",
                "benchmark": b,
                "label": lb,
                "form": f,
                "text": "Why?" if f == "question" else "Do it.",
            }
            for i, (b, lb, f) in enumerate(rows)
        ]
    )


def verdicts(kinds) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prompt_id": [f"p{i}" for i in range(len(kinds))],
            "judge": "x",
            "verdict": kinds,
            "score": 0.5,
        }
    )


def test_verdict_arithmetic_counts_partial_degenerate_and_unscored_for_neither():
    kinds = [
        "refuse",
        "partial",
        "refuse",
        "refuse",
        "refuse",
        "degenerate",
        "comply",
        "unscored",
        "comply",
        "comply",
        "partial",
        "refuse",
    ]
    rows = rate_rows(prompts(), verdicts(kinds), profile="p", method="m", seed=0).set_index(
        ["benchmark", "metric", "form"]
    )["value"]
    assert rows["t", "dsr", "all"] == 4 / 8 and rows["t", "dsr_lenient", "all"] == 5 / 8
    assert rows["t", "dsr", "balanced"] == (1 / 2 + 3 / 6) / 2
    assert (
        rows["s", "compliance", "all"] == 2 / 4 and rows["s", "refusal_rate", "question"] == 1 / 4
    )
    assert rows["t", "degenerate_share", "all"] == 1 / 8 == rows["t", "unscored_share", "all"]
    shares = sum(
        rows["s", m, "all"]
        for m in (
            "compliance",
            "refusal_rate",
            "partial_share",
            "degenerate_share",
            "unscored_share",
        )
    )
    assert shares == 1.0 and ("s", "compliance", "balanced") not in rows.index


def test_question_mark_rule():
    assert (
        question_mark_rule(prompts())["verdict"].tolist()
        == ["comply"] * 2 + ["refuse"] * 6 + ["comply"] * 4
    )


def test_every_prompt_needs_one_verdict():
    with pytest.raises(DCRError, match="11 for 12 prompts"):
        rate_rows(prompts(), verdicts(["comply"] * 11), profile="p", method="m", seed=0)


def test_mean_rate_weights_benchmarks_equally():
    rows = pd.DataFrame(
        {
            "benchmark": ["a", "b"],
            "metric": "dsr",
            "form": "all",
            "value": [0.2, 0.6],
            "low": [0.1, 0.5],
            "high": [0.3, 0.7],
            "n": [10, 1000],
        }
    )
    mean = mean_rate(rows, ["a", "b"], "dsr")
    assert mean["value"] == pytest.approx(0.4) and mean["low"] == pytest.approx(
        0.4 - np.sqrt(0.02) / 2
    )
    with pytest.raises(DCRError, match="no c"):
        mean_rate(rows, ["a", "c"], "dsr")


def test_bootstrap_covers_the_mean_of_a_known_share():
    rng = np.random.default_rng(0)
    inside = sum(
        low <= 0.3 <= high
        for low, high in (
            bootstrap_mean(rng.random(120) < 0.3, n_boot=300, seed=i)[1:] for i in range(100)
        )
    )
    assert 88 <= inside <= 100
    assert bootstrap_mean([1, 0, 1], seed=1) == bootstrap_mean([1, 0, 1], seed=1)


@pytest.mark.parametrize("count, n", [(1, 0), (5, 4), (-1, 3)])
def test_wilson_refuses_nonsense(count, n):
    with pytest.raises(DCRError, match="need 0 <= count"):
        wilson(count, n)
