"""Compliance at matched safety: the fit against scikit-learn, no extrapolation, intervals that cover, forms balanced."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from dcr.errors import DCRError
from dcr.evaluate.intervals import bootstrap_over_seeds, draw_units
from dcr.evaluate.matched import (
    Curve,
    balanced_rates,
    compliance_at,
    curve_of,
    curve_points,
    dominated_area,
    matched_safety,
    monotone_fit,
)
from dcr.tables.comparisons import combined_p

RATE = st.integers(0, 20).map(lambda k: k / 20)
POINTS = st.lists(st.tuples(RATE, RATE), min_size=1, max_size=12)


@settings(deadline=None)
@given(POINTS)
def test_fit_equals_scikit_learn_falls_and_stays_within_the_data(points):
    dsr, compliance = np.array(points).T
    x, y = monotone_fit(dsr, compliance)
    oracle = IsotonicRegression(increasing=False).fit(dsr, compliance)
    assert (
        np.allclose(y, oracle.predict(x), atol=1e-9)
        and (np.diff(x) > 0).all()
        and (np.diff(y) <= 1e-12).all()
    )
    assert compliance.min() - 1e-9 <= y.min() and y.max() <= compliance.max() + 1e-9


@settings(deadline=None)
@given(POINTS, RATE)
def test_reading_equals_scikit_learn_inside_and_is_nothing_outside(points, target):
    dsr, compliance = np.array(points).T
    value, reason = compliance_at(dsr, compliance, target)
    expected = (
        IsotonicRegression(increasing=False, out_of_bounds="nan")
        .fit(dsr, compliance)
        .predict([target])[0]
    )
    inside = dsr.min() <= target <= dsr.max()
    assert np.isfinite(value) == inside == (reason == "") and (
        not inside or value == pytest.approx(expected, abs=1e-9)
    )
    assert inside or reason.startswith("not reached")


@settings(deadline=None)
@given(POINTS, RATE, RATE)
def test_area_is_a_share_and_a_better_point_never_lowers_it(points, dsr, compliance):
    x, y = np.array(points).T
    area = dominated_area(x, y)
    assert 0 <= area <= 1
    assert dominated_area(x, np.minimum(1, y + 0.1)) >= area - 1e-12
    assert dominated_area([dsr], [compliance]) == pytest.approx(dsr * compliance)


def prompts(n: int = 40, swapped: bool = True) -> pd.DataFrame:
    """Two sets a class; published harmless prompts are questions, toxic ones imperatives; with their form-swapped twins."""
    rows = []
    for label, form in (("seemingly_toxic", "question"), ("toxic", "imperative")):
        for number in range(2):
            for i in range(n if number else n // 2):
                row = {
                    "id": f"{label}{number}-{i}",
                    "label": label,
                    "form": form,
                    "benchmark": f"{label}{number}",
                    "source": f"{label}{number}",
                }
                rows.append(row)
                if swapped:
                    other = "imperative" if form == "question" else "question"
                    rows.append(
                        {
                            **row,
                            "id": row["id"] + "~",
                            "form": other,
                            "benchmark": row["benchmark"] + "/swapped",
                        }
                    )
    return pd.DataFrame(rows)


def simulated(
    seed: int, n: int = 40, shift: float = 0.0, method: str = "m", number: int = 0
) -> Curve:
    """A curve whose true rates are DSR 0.1, 0.5, 0.9 at compliance 0.9, 0.7, 0.3 (+ shift); twins share their fate."""
    table, rng = prompts(n), np.random.default_rng(seed)
    level = dict(zip(sorted({i.rstrip("~") for i in table["id"]}), rng.random(10**4), strict=False))
    u = table["id"].map(lambda i: level[i.rstrip("~")]).to_numpy()
    toxic = (table["label"] == "toxic").to_numpy()
    hits = [
        np.where(toxic, u < d, u < c + shift).astype(float)
        for d, c in ((0.1, 0.9), (0.5, 0.7), (0.9, 0.3))
    ]
    return Curve(method, number, table, np.stack(hits, 1), (0, 1, 2))


def test_rates_weigh_sets_and_forms_equally():
    table = prompts(10)
    hits = (
        (table["form"] == "question") & (table["benchmark"].str.startswith("seemingly_toxic0"))
    ).to_numpy(float)[:, None]
    assert balanced_rates(Curve("m", 0, table, hits, (0,)), "seemingly_toxic") == pytest.approx(
        [0.25]
    )
    assert balanced_rates(Curve("m", 0, table, np.ones_like(hits), (0,)), "toxic") == pytest.approx(
        [1.0]
    )


def test_the_question_mark_rule_is_worth_half_on_each_side_once_forms_are_balanced():
    from dcr.evaluate.metrics import question_mark_rule

    table = prompts(10).assign(text=lambda t: np.where(t["form"] == "question", "x?", "x."))
    curve = curve_of("rule", 0, table, {0: question_mark_rule(table)})
    row = curve_points([curve]).iloc[0]
    assert row["dsr"] == 0.5 and row["compliance"] == 0.5
    published = table[~table["id"].str.endswith("~")]
    row = curve_points([curve_of("rule", 0, published, {0: question_mark_rule(published)})]).iloc[0]
    assert row["dsr"] == row["compliance"] == 1.0


def test_interval_covers_the_truth():
    inside = 0
    for seed in range(40):
        row = matched_safety([simulated(seed, 60)], (0.7,), n_boot=100, seed=seed).iloc[0]
        inside += row["low"] <= 0.5 <= row["high"]  # half-way between (0.5, 0.7) and (0.9, 0.3)
    assert inside >= 33, inside


def test_not_reached_has_no_value_and_says_why():
    table = matched_safety([simulated(1)], (0.7, 0.99), n_boot=50).set_index("target")
    assert (
        table.loc[0.7, "reason"] == ""
        and table.loc[0.7, "reached"] == 1.0
        and 0 < table.loc[0.7, "compliance"] < 1
    )
    far = table.loc[0.99]
    assert np.isnan([far["compliance"], far["low"], far["high"]]).all() and far[
        "reason"
    ].startswith("not reached (highest DSR 0.")


def test_seeds_widen_the_interval_and_all_must_reach():
    alike = [simulated(5, number=i) for i in range(3)]
    apart = [simulated(5, shift=s, number=i) for i, s in enumerate((-0.2, 0.0, 0.2))]
    width = [
        matched_safety(c, (0.7,), n_boot=200).iloc[0].pipe(lambda r: r["high"] - r["low"])
        for c in (alike, apart)
    ]
    assert width[1] > 1.3 * width[0]
    short = simulated(5, number=7)
    short = Curve("m", 7, short.prompts, short.hits[:, :2], (0, 1))  # ends near DSR 0.5
    row = matched_safety([*alike, short], (0.7,), n_boot=50).iloc[0]
    assert (
        np.isnan(row["compliance"])
        and row["reason"].startswith("seed 7: not reached")
        and row["seeds"] == 4
        and 0 < row["reached"] < 1
    )


def test_twins_are_drawn_together_and_strata_keep_their_size():
    table = prompts(12)
    units = table["id"].str.rstrip("~")
    counts = draw_units(
        units.tolist(),
        table["benchmark"].str.removesuffix("/swapped").tolist(),
        20,
        np.random.default_rng(0),
    )
    assert counts.shape == (20, units.nunique())
    assert (counts.loc[:, counts.columns.str.startswith("toxic0")].sum(axis=1) == 6).all()


def test_seed_bootstrap_is_wider_than_prompts_alone_when_seeds_differ():
    rng = np.random.default_rng(0)
    values = np.stack([(rng.random(100) < p) for p in (0.2, 0.5, 0.8)])
    mean, low, high = bootstrap_over_seeds(values, seed=1)
    assert mean == pytest.approx(values.mean()) and high - low > 0.3
    assert bootstrap_over_seeds(values, seed=1) == (mean, low, high)
    with pytest.raises(DCRError, match="same prompts"):
        bootstrap_over_seeds([[1, 0], [1]])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_combined_p_is_valid_for_equal_values_and_never_below_the_smallest(values):
    assert min(values) <= combined_p(values) <= 1 and combined_p([0.01]) == 0.01
    assert combined_p([0.01, 1.0]) == 0.02


def test_missing_repeated_and_empty_are_refused():
    table = prompts(6)
    verdicts = pd.DataFrame({"prompt_id": table["id"], "verdict": "refuse"})
    with pytest.raises(DCRError, match="none for prompt 'seemingly_toxic0-0'"):
        curve_of("m", 0, table, {0: verdicts.iloc[1:]})
    with pytest.raises(DCRError, match="occurs twice"):
        curve_of("m", 0, table, {0: pd.concat([verdicts, verdicts.head(1)])})
    with pytest.raises(DCRError, match="no toxic prompts are left after toxic0, toxic1"):
        curve_of("m", 0, table, {0: verdicts}, leave_out=["toxic0", "toxic1"])
    with pytest.raises(DCRError, match="target 1.2 is no DSR"):
        matched_safety([curve_of("m", 0, table, {0: verdicts})], (1.2,))
