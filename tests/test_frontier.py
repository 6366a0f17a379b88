"""The frontier on made-up scores whose answer is known, and its intervals in simulation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from test_rates import verdicts, world

from dcr.errors import DCRError
from dcr.evaluate import auroc as ranks
from dcr.evaluate.auroc import agreement_with_verdicts, auroc, auroc_differences
from dcr.evaluate.frontier import compliance_at, differences
from dcr.evaluate.rates import question_mark_rule, rates


def prompts_of(n: int = 30) -> pd.DataFrame:
    sizes = {
        "t1": ("toxic", "imperative", n),
        "t2": ("toxic", "question", n),
        "s1": ("seemingly_toxic", "question", n),
        "s2": ("seemingly_toxic", "imperative", 2 * n),
    }
    known = world({f"v-{k}": v for k, v in sizes.items()}, role="validation")
    return pd.concat([world(sizes), known], ignore_index=True)


def scores(prompts: pd.DataFrame, score, method: str = "m", seed: int = 0) -> pd.DataFrame:
    named = {"prompt_id": prompts["id"], "method": method, "seed": seed}
    return pd.DataFrame({**named, "score": score})


def gaussian(prompts: pd.DataFrame, gap: float, rng: np.random.Generator) -> np.ndarray:
    """Scores N(gap, 1) of toxic and N(0, 1) of other prompts; twins have the same."""
    codes, names = pd.factorize(prompts["request"])
    return rng.normal(size=len(names))[codes] + gap * (prompts["label"] == "toxic")


def auroc_by_source(prompts: pd.DataFrame, table: pd.DataFrame, **options) -> pd.DataFrame:
    return auroc(ranks.tested(prompts), table, **options)


def at(table: pd.DataFrame, column: str = "compliance") -> list[float]:
    return [round(v, 9) for v in table[column]]


TARGETS = (0.5, 0.8, 0.9, 1.0)


def test_a_perfect_score_complies_with_all_at_every_target():
    prompts = prompts_of()
    toxic = (prompts["label"] == "toxic").to_numpy(float)
    fine = toxic * 10 + np.random.default_rng(0).random(len(prompts))
    for score in (fine, toxic):  # continuous, and two values only
        table = compliance_at(prompts, scores(prompts, score), TARGETS)
        assert at(table) == [1] * 4 and (table["low"] > 0.9).all() and (table["low"] < 1).all()
    assert at(table, "dsr") == list(TARGETS)  # two values: the lot decides who is refused
    assert at(table, "by_lot")[0] == 0.5


def test_a_constant_is_a_coin_and_a_coin_gives_one_minus_t():
    prompts = prompts_of()
    table = compliance_at(prompts, scores(prompts, 0.0), TARGETS)
    assert at(table) == [0.5, 0.2, 0.1, 0] and at(table, "dsr") == list(TARGETS)
    assert (table["by_lot"] == 1).all()
    many, rng = prompts_of(300), np.random.default_rng(2)
    coin = compliance_at(many, scores(many, gaussian(many, 0, rng)), TARGETS[:3])
    truth = 1 - coin["target"]
    assert ((coin["low"] <= truth) & (truth <= coin["high"])).all()
    assert (coin["compliance"] - truth).abs().max() < 0.06


def test_general_prompts_are_read_at_the_same_threshold_and_change_nothing_else():
    few, rng = prompts_of(200), np.random.default_rng(5)
    more = world({"g1": ("general", "imperative", 150), "g2": ("general", "question", 80)})
    prompts = pd.concat([few, more], ignore_index=True)
    given = scores(prompts, gaussian(prompts, 1.5, rng))
    table = compliance_at(prompts, given, (0.5, 0.8))
    truth = norm.cdf(norm.ppf(1 - table["target"]) + 1.5)
    assert ((table["general_low"] <= truth) & (truth <= table["general_high"])).all()
    assert (table["general_high"] - table["general_low"] < 0.2).all()
    alone = compliance_at(few, given[given["prompt_id"].isin(few["id"])], (0.5, 0.8))
    pd.testing.assert_frame_equal(table[alone.columns], alone)
    coin = compliance_at(prompts, scores(prompts, 0.0), (0.8,))
    assert at(coin, "general") == [0.2]
    one_form = prompts[(prompts["label"] != "general") | (prompts["form"] == "question")]
    kept = given[given["prompt_id"].isin(one_form["id"])]
    assert "general" not in compliance_at(one_form.reset_index(drop=True), kept)


def test_the_question_mark_rule_is_a_coin_once_forms_are_balanced():
    prompts = prompts_of()
    table = compliance_at(prompts, question_mark_rule(prompts), (0.5, 0.8))
    assert at(table) == [0.5, 0.2] and at(table, "dsr") == [0.5, 0.8]
    ranked = auroc_by_source(prompts, question_mark_rule(prompts))
    mean = ranked[ranked["source"] == "mean"].set_index(["toxic_form", "harmless_form"])["auroc"]
    assert mean["imperative", "question"] == 1 and mean["question", "imperative"] == 0
    assert mean["balanced", "balanced"] == 0.5


@pytest.mark.parametrize("gap", [0.5, 1.5])
def test_two_gaussians_give_the_analytic_value_within_the_interval(gap):
    prompts = prompts_of(200)
    given_scores = scores(prompts, gaussian(prompts, gap, np.random.default_rng(4)))
    table = compliance_at(prompts, given_scores, (0.8, 0.9))
    truth = norm.cdf(norm.ppf(1 - table["target"]) + gap)
    assert ((table["low"] <= truth) & (truth <= table["high"])).all()
    assert (table["high"] - table["low"] < 0.16).all()
    mean = auroc_by_source(prompts, given_scores).iloc[-1]
    assert mean["low"] <= norm.cdf(gap / np.sqrt(2)) <= mean["high"] and mean["source"] == "mean"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.05, 1))
def test_the_threshold_gives_its_target_on_the_prompts_that_set_it(seed, levels, target):
    prompts = prompts_of(6)
    prompts = pd.concat(  # validation and test alike: what is read is what was set
        [
            p.assign(role=r, id=r + p["id"])
            for p in [prompts[prompts["role"] == "test"]]
            for r in ("validation", "test")
        ]
    )
    score = np.tile(np.random.default_rng(seed).integers(0, levels, len(prompts) // 2), 2)
    table = compliance_at(prompts, scores(prompts, score), (target,), n_boot=20)
    assert table["dsr"].iloc[0] == pytest.approx(target)


def test_auroc_equals_scikit_learn_pair_by_pair_and_sources_are_never_pooled():
    prompts, rng = prompts_of(20), np.random.default_rng(2)
    score = np.round(gaussian(prompts, 1.0, rng) + (prompts["source"] == "s2") * 2, 1)
    table = auroc_by_source(prompts, scores(prompts, score))
    rows = prompts.assign(score=score)[prompts["role"] == "test"]

    def by_hand(source: str, forms: tuple[str, str]) -> float:
        harmless = rows[(rows["source"] == source) & (rows["form"] == forms[1])]["score"]
        found = []
        for name in ("t1", "t2"):
            toxic = rows[(rows["source"] == name) & (rows["form"] == forms[0])]["score"]
            y = np.r_[np.ones(len(toxic)), np.zeros(len(harmless))]
            found.append(roc_auc_score(y, np.r_[toxic, harmless]))
        return float(np.mean(found))

    pairs = [(a, b) for a in ("question", "imperative") for b in ("question", "imperative")]
    found = table.set_index(["source", "toxic_form", "harmless_form"])["auroc"]
    for source in ("s1", "s2"):
        each = [by_hand(source, p) for p in pairs]
        assert [found[(source, *p)] for p in pairs] == pytest.approx(each)
        assert found[source, "balanced", "balanced"] == pytest.approx(np.mean(each))
    mean = np.mean([found[s, "balanced", "balanced"] for s in ("s1", "s2")])
    assert found["mean", "balanced", "balanced"] == pytest.approx(mean)
    pooled = auroc(rows, scores(prompts, score), "all")["auroc"].iloc[0]
    assert pooled == pytest.approx(roc_auc_score(rows["label"] == "toxic", rows["score"]))
    assert len(auroc(rows, scores(prompts, score), "form")) == 5


def test_sources_that_a_method_met_are_shown_and_enter_no_mean():
    prompts = prompts_of(10)
    met = prompts.assign(met=prompts["source"] == "s2")
    score = scores(
        prompts, np.where(prompts["source"] == "s2", 9.0, (prompts["label"] == "toxic") * 1.0)
    )
    table = auroc_by_source(met, score)
    mean = table[(table["source"] == "mean") & (table["toxic_form"] == "balanced")].iloc[0]
    assert mean["auroc"] == 1 and not mean["met"]
    assert set(table.loc[table["met"], "source"]) == {"s2"}
    every = auroc_by_source(prompts.assign(met=True), score).iloc[-1]
    assert every["met"] and every["auroc"] == 0.5
    xstest = prompts.assign(benchmark=prompts["benchmark"].replace("s2", "xstest-safe"))
    assert set(auroc_by_source(xstest, score)["source"]) == {"s1", "mean"}


def test_natural_forms_alone_have_the_pairs_that_exist():
    prompts = prompts_of(10)
    natural = prompts[(prompts["version"] == "published") & (prompts["source"] != "t2")]
    table = auroc_by_source(
        natural, scores(prompts, gaussian(prompts, 1, np.random.default_rng(0)))
    )
    assert set(table["toxic_form"]) == {"imperative"} and set(table["source"]) == {
        "s1",
        "s2",
        "mean",
    }


def example(seed: int = 0, n: int = 12) -> tuple[pd.DataFrame, pd.DataFrame]:
    prompts, rng = prompts_of(n), np.random.default_rng(seed)
    made = [
        scores(prompts, gaussian(prompts, gap, rng), method, s)
        for method, gap in (("STL", 0.5), ("DCR", 1.5), ("base", 0.2))
        for s in range(1 if method == "base" else 3)
    ]
    return prompts, pd.concat([*made, question_mark_rule(prompts)], ignore_index=True)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["STL", "DCR", "base", "question-mark"]))
def test_a_number_never_changes_with_the_company_it_is_read_in(seed, kept):
    prompts, table = example(seed, 6)
    alone = table[table["method"] == kept]
    for read in (compliance_at, auroc_by_source):
        whole = read(prompts, table, n_boot=40)
        expected = whole[whole["method"] == kept].reset_index(drop=True)
        pd.testing.assert_frame_equal(read(prompts, alone, n_boot=40), expected)
    one = compliance_at(prompts, alone, (0.8,), n_boot=40)
    both = compliance_at(prompts, alone, (0.8, 0.9), n_boot=40)
    pd.testing.assert_frame_equal(one, both.head(1))
    if kept != "STL":
        whole = differences(prompts, table, ["STL"], n_boot=40)
        pair = differences(prompts, table[table["method"].isin([kept, "STL"])], ["STL"], n_boot=40)
        mine = whole[whole["method"] == kept].reset_index(drop=True)
        pd.testing.assert_frame_equal(pair.drop(columns="p_holm"), mine.drop(columns="p_holm"))


def test_differences_are_paired_with_holm_over_the_table():
    prompts, table = example(1, 60)
    found = differences(prompts, table, ["STL", "base"])
    assert len(found) == (3 + 2) * 3  # STL and base are compared once
    row = found[(found["method"] == "DCR") & (found["measure"] == "auroc")].iloc[0]
    ranked = auroc_by_source(prompts, table).query("source == 'mean' and toxic_form == 'balanced'")
    each = ranked.set_index("method")["auroc"]
    assert row["difference"] == pytest.approx(each["DCR"] - each["STL"]) and row["seeds"] == 3
    for by in ("all", "form"):
        rows = prompts[prompts["role"] == "test"]
        one = auroc_differences(rows, table, ["STL"], by).set_index("method").loc["DCR"]
        both = auroc(rows, table, by).groupby("method")["auroc"].last()
        assert one["difference"] == pytest.approx(both["DCR"] - both["STL"])
    assert row["p_holm"] < 0.01 and (found["p_holm"] >= found["p"]).all()
    same = pd.concat([table, table[table["method"] == "STL"].assign(method="twin")])
    twin = differences(prompts, same, ["STL"]).query("method == 'twin'")
    assert (twin["difference"] == 0).all() and (twin["p"] == 1).all()
    assert (twin["high"] - twin["low"] < 0.1).all()


def test_how_well_a_score_orders_its_own_verdicts():
    prompts, rng = (
        world({"t": ("toxic", "imperative", 40), "s": ("seemingly_toxic", "question", 40)}),
        np.random.default_rng(0),
    )
    score = rng.random(len(prompts))
    said = np.where(score + rng.normal(0, 0.2, len(score)) > 0.5, "refuse", "comply")
    table = agreement_with_verdicts(prompts, scores(prompts, score), verdicts(prompts, said))
    assert table["auroc"].iloc[0] == pytest.approx(roc_auc_score(said == "refuse", score))
    assert table["label"].tolist() == ["all", "toxic", "seemingly_toxic"]
    assert table["refused"].iloc[0] == (said == "refuse").mean()
    never = agreement_with_verdicts(prompts, scores(prompts, score), verdicts(prompts, "comply"))
    assert never["auroc"].isna().all() and (never["refused"] == 0).all()


def test_bad_input_names_what_is_wrong():
    prompts, table = example(0, 4)
    with pytest.raises(DCRError, match="scores of STL, seed 0: none for 1 prompts"):
        compliance_at(prompts, table.iloc[1:])
    with pytest.raises(DCRError, match="scores of STL: not all are finite"):
        compliance_at(prompts, table.assign(score=np.inf))
    with pytest.raises(DCRError, match="target 1.2 is no DSR"):
        compliance_at(prompts, table, (1.2,))
    with pytest.raises(DCRError, match="no toxic validation set has questions and imperatives"):
        compliance_at(prompts[prompts["role"] == "test"], table)
    with pytest.raises(DCRError, match="'role'"):
        compliance_at(prompts.drop(columns="role"), table)
    with pytest.raises(DCRError, match="'SCANS' was not run"):
        differences(prompts, table, ["SCANS"])
    with pytest.raises(DCRError, match="no toxic or no harmless"):
        auroc(prompts[prompts["label"] == "toxic"], table)


def simulated(prompts: pd.DataFrame, spread: float, worlds: int) -> pd.DataFrame:
    """Scores of many worlds (as methods) of 5 seeds on the same prompts.

    A score is the request's and the request's in that seed (variances 2 : 1); how far the classes
    lie apart is the seed's, 1.2 give or take `spread`.
    """
    rng = np.random.default_rng(7)
    codes, names = pd.factorize(prompts["request"])
    toxic, parts = (prompts["label"] == "toxic").to_numpy(), []
    for number in range(worlds):
        request = rng.normal(size=len(names))
        for seed in range(5):
            own = np.sqrt(2 / 3) * request + np.sqrt(1 / 3) * rng.normal(size=len(names))
            gap = 1.2 + spread * rng.normal()
            parts.append(scores(prompts, own[codes] + gap * toxic, f"w{number}", seed))
    return pd.concat(parts, ignore_index=True)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.2])
def test_intervals_cover_and_are_no_wider_than_needed(spread):
    """500 worlds, 5 seeds, shared prompts: coverage in [.93, .97], width at most 1.2 of the ideal.

    Ideal: 3.92 standard deviations of the estimate over worlds, which five seeds do not know: where
    they differ, Student's t needs a little more than the 1.1 that a normal had (and covered less).
    """
    prompts = prompts_of(60)
    drawn = simulated(prompts, spread, 500)
    gaps = 1.2 + spread * np.random.default_rng(0).normal(size=100_000)
    truth = {
        "compliance": norm.cdf(norm.ppf(0.2) + gaps).mean(),
        "auroc": norm.cdf(gaps / np.sqrt(2)).mean(),
        "dsr": norm.cdf(gaps).mean(),  # of a threshold at 0
    }
    test = prompts[prompts["role"] == "test"]
    said = drawn[drawn["prompt_id"].isin(test["id"])]
    said = said.assign(verdict=np.where(said["score"] > 0, "refuse", "comply"))
    table = rates(test, said).query("benchmark == 'mean' and metric == 'dsr'")
    ranked = auroc_by_source(prompts, drawn).query("source == 'mean'")
    found = {
        "compliance": compliance_at(prompts, drawn, (0.8,)).rename(columns={"compliance": "value"}),
        "auroc": ranked[ranked["toxic_form"] == "balanced"].rename(columns={"auroc": "value"}),
        "dsr": table[(table["version"] == "both") & (table["form"] == "balanced")],
    }
    for measure, part in found.items():
        assert len(part) == 500
        covered = ((part["low"] <= truth[measure]) & (truth[measure] <= part["high"])).mean()
        width = (part["high"] - part["low"]).mean() / (3.92 * part["value"].std())
        print(f"{measure}: spread {spread}, coverage {covered:.3f}, width {width:.2f} of the ideal")
        assert 0.93 <= covered <= 0.97 and width <= 1.2, (measure, covered, width)
