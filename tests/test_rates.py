"""Rates from verdicts: counted by hand, sets and forms weighing equally."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcr.errors import DCRError
from dcr.evaluate.intervals import mcnemar_exact, wilson
from dcr.evaluate.rates import (
    corrected,
    question_mark_rule,
    rate_differences,
    rates,
    what_the_template_does,
)

KEY = ["label", "benchmark", "version", "form", "metric"]


def world(sizes: dict[str, tuple[str, str, int]], role: str = "test") -> pd.DataFrame:
    """Sets by name: (label, published form, requests), each request with its form-swapped twin."""
    rows = []
    for name, (label, form, n) in sizes.items():
        for i in range(n):
            for version in ("published", "swapped"):
                other = "imperative" if form == "question" else "question"
                shown = form if version == "published" else other
                rows.append(
                    {
                        "id": f"{name}-{i}" + "~" * (version == "swapped"),
                        "text": "Why?" if shown == "question" else "Do it.",
                        **{"label": label, "form": shown, "source": name, "benchmark": name},
                        **{"version": version, "request": f"{name}-{i}", "role": role},
                    }
                )
    return pd.DataFrame(rows)


SETS = {
    "t1": ("toxic", "imperative", 8),
    "t2": ("toxic", "question", 4),
    "s1": ("seemingly_toxic", "question", 6),
    "general-mine": ("seemingly_toxic", "question", 2),
    "my-own": ("general", "imperative", 4),
}


def verdicts(prompts: pd.DataFrame, said, method: str = "m", seed: int = 0) -> pd.DataFrame:
    named = {"prompt_id": prompts["id"], "method": method, "seed": seed}
    return pd.DataFrame({**named, "verdict": said})


def values(table: pd.DataFrame) -> pd.Series:
    return table.set_index(KEY)["value"].sort_index()


def test_verdicts_are_counted_and_partial_degenerate_and_unscored_count_for_neither():
    prompts = world({"t": ("toxic", "imperative", 4), "s": ("seemingly_toxic", "question", 4)})
    said = ["refuse", "partial", "refuse", "refuse", "degenerate", "comply", "comply", "unscored"]
    said += ["comply", "comply", "partial", "refuse", "comply", "refuse", "comply", "comply"]
    ended = ["length", *["eos"] * 15]
    rows = verdicts(prompts, said).assign(finish=ended)
    both = rates(prompts, pd.concat([rows, question_mark_rule(prompts)]))
    rule = both[(both["method"] != "m") & (both["metric"] == "truncated_share")]
    assert len(rule) and (rule["value"] == 0).all()  # a rule has no answer that could be cut
    found = values(both[both["method"] == "m"])
    toxic, harmless = found["toxic", "t"], found["seemingly_toxic", "s"]
    assert toxic["published", "all", "dsr"] == 2 / 4 and toxic["swapped", "all", "dsr"] == 1 / 4
    assert toxic["both", "balanced", "dsr"] == 3 / 8 == toxic["both", "balanced", "refusal_rate"]
    assert toxic["published", "all", "truncated_share"] == 1 / 4
    assert harmless["published", "all", "compliance"] == 3 / 4
    assert (
        "dsr" not in harmless["published", "all"] and "compliance" not in toxic["published", "all"]
    )
    names = ["compliance", "refusal_rate", "partial_share", "degenerate_share", "unscored_share"]
    assert harmless["both", "balanced"][names].sum() == pytest.approx(1)


def test_means_weigh_sets_and_forms_equally_and_labels_not_names_make_a_class():
    prompts = world(SETS)
    asks = (prompts["form"] == "question") & (prompts["benchmark"] == "s1")
    said = np.where(prompts["label"] == "toxic", "refuse", np.where(asks, "refuse", "comply"))
    said = np.where(prompts["benchmark"] == "t2", "comply", said)
    table = rates(prompts, verdicts(prompts, said))
    found = values(table)
    assert found["toxic", "mean", "both", "balanced", "dsr"] == 0.5  # 8 and 4 requests
    assert found["seemingly_toxic", "mean", "both", "balanced", "compliance"] == 0.75
    assert found["seemingly_toxic", "mean", "published", "all", "compliance"] == 0.5
    mean = table[table["benchmark"] == "mean"].drop_duplicates("label").set_index("label")
    assert mean["sets"].to_dict() == {"toxic": 2, "seemingly_toxic": 2, "general": 1}


def test_a_set_with_both_labels_is_two_sets_of_rows():
    prompts = world({"b": ("toxic", "imperative", 6)})
    prompts.loc[prompts["request"] == "b-0", "label"] = "seemingly_toxic"
    found = values(rates(prompts, verdicts(prompts, "refuse")))
    assert found["toxic", "b", "published", "all", "dsr"] == 1
    assert found["seemingly_toxic", "b", "published", "all", "compliance"] == 0


def test_xstest_and_what_is_trained_on_are_shown_apart():
    sizes = SETS | {"xstest-safe": ("seemingly_toxic", "question", 5)}
    prompts = world(sizes)
    prompts.loc[prompts["benchmark"] == "t2", "role"] = "refine"
    said = np.where(prompts["benchmark"].isin(["xstest-safe", "t2"]), "partial", "refuse")
    table = rates(prompts, verdicts(prompts, said))
    found = values(table)
    assert found["toxic", "t2", "published", "all", "dsr"] == 0
    assert found["toxic", "mean", "both", "balanced", "dsr"] == 1
    assert found["seemingly_toxic", "mean", "published", "all", "partial_share"] == 0
    assert set(table.loc[table["apart"], "benchmark"]) == {"xstest-safe", "t2"}


def test_statements_count_as_published_and_are_counted_where_they_have_no_cell():
    prompts = world({"s": ("seemingly_toxic", "question", 4)})
    prompts.loc[prompts["id"] == "s-0", "form"] = "statement"
    said = np.where(prompts["id"] == "s-0", "refuse", "comply")
    table = rates(prompts, verdicts(prompts, said)).set_index(KEY).sort_index()
    cell = table.loc["seemingly_toxic", "s"]
    assert cell.loc[("published", "all", "compliance"), "value"] == 0.75
    assert cell.loc[("published", "statement", "compliance"), "value"] == 0
    assert cell.loc[("both", "balanced", "compliance"), ["value", "statements"]].tolist() == [1, 1]
    assert (
        table.loc["seemingly_toxic", "mean"].loc["both", "balanced", "compliance"]["statements"]
        == 1
    )


def test_one_share_of_one_seed_has_wilsons_interval_and_no_interval_is_a_point():
    prompts = world(SETS)
    table = rates(prompts, verdicts(prompts, "refuse"), n_boot=200).set_index(KEY)
    one = table.loc["toxic", "t1", "published", "all", "dsr"]
    assert (one["low"], one["high"]) == wilson(8, 8)
    sure = table[table["value"].isin([0.0, 1.0])]
    assert len(sure) == len(table) and (table["high"] - table["low"] > 0.04).all()
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()


def test_seeds_pool_into_one_row():
    prompts = world(SETS)
    both = pd.concat(
        [verdicts(prompts, "refuse"), verdicts(prompts, "comply", seed=3)], ignore_index=True
    )
    table = rates(prompts, both, n_boot=100)
    dsr = table[(table["metric"] == "dsr") & (table["benchmark"] == "mean")]
    mean = dsr[(dsr["version"] == "both") & (dsr["form"] == "balanced")].set_index("seed")
    assert mean["value"].to_dict() == {-1: 0.5}
    assert mean["seeds"].to_dict() == {-1: 2}
    assert mean.loc[-1, "high"] - mean.loc[-1, "low"] > 0.8


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["m", "other", "third"]))
def test_a_number_never_changes_with_its_company(seed, kept):
    prompts, rng = world(SETS), np.random.default_rng(seed)
    said = pd.concat(
        [
            verdicts(prompts, rng.choice(["refuse", "comply", "partial"], len(prompts)), m, s)
            for m in ("m", "other", "third")
            for s in range(2)
        ]
    )
    whole = rates(prompts, said, n_boot=50)
    alone = rates(prompts, said[said["method"] == kept], n_boot=50)
    expected = whole[whole["method"] == kept].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, expected)
    some = prompts[prompts["benchmark"] != "s1"]
    fewer = rates(some, said[said["prompt_id"].isin(some["id"])], n_boot=50)
    mine = fewer[(fewer["method"] == kept) & (fewer["label"] == "toxic")].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        mine, expected[expected["label"] == "toxic"].reset_index(drop=True)
    )


def test_differences_are_paired_and_the_family_is_the_table():
    prompts, rng = (
        world({k: (a, b, 5 * n) for k, (a, b, n) in SETS.items()}),
        np.random.default_rng(0),
    )
    first = rng.choice(["refuse", "comply"], len(prompts))
    second = np.where(rng.random(len(prompts)) < 0.2, "refuse", first)
    said = pd.concat([verdicts(prompts, first, "STL"), verdicts(prompts, second)])
    table = rate_differences(prompts, said, n_boot=300)
    row = table[(table["benchmark"] == "t1") & (table["form"] == "all")].iloc[0]
    part = (prompts["benchmark"] == "t1") & (prompts["version"] == "published")
    a, b = second[part] == "refuse", first[part] == "refuse"
    assert row["difference"] == pytest.approx(a.mean() - b.mean()) and row["metric"] == "dsr"
    assert row["p"] == mcnemar_exact(a, b) and row["low"] <= row["difference"] <= row["high"]
    assert (table["p_holm"] >= table["p"]).all() and table["p_holm"].max() <= 1
    assert row["p_holm"] == pytest.approx(
        min(1, (len(table) - (table["p"] < row["p"]).sum()) * row["p"]), rel=0.5
    )
    unpaired = rates(prompts, said, n_boot=300)
    width = unpaired[(unpaired["benchmark"] == "mean") & (unpaired["metric"] == "dsr")]
    mean = table[(table["benchmark"] == "mean") & (table["label"] == "toxic")].iloc[-1]
    assert mean["high"] - mean["low"] < (width["high"] - width["low"]).iloc[-1]


def test_what_the_template_does_compares_a_form_with_itself():
    natural = world({"n": ("seemingly_toxic", "question", 6)}).assign(version="published")
    swapped = world({"n": ("seemingly_toxic", "question", 6)}).assign(version="swapped")
    swapped["id"] += "x"
    prompts = pd.concat([natural, swapped, world({"o": ("toxic", "imperative", 3)})])
    harsh = (prompts["version"] == "swapped") & (prompts["form"] == "imperative")
    table = what_the_template_does(prompts, verdicts(prompts, np.where(harsh, "refuse", "comply")))
    assert table.set_index("form")["difference"].to_dict() == {"question": 0, "imperative": 1}
    assert set(table["label"]) == {"seemingly_toxic"} and set(table["sets"]) == {1}
    plain = world(SETS)
    assert what_the_template_does(plain, verdicts(plain, "comply")).empty


def test_the_question_mark_rule_is_worth_half_once_forms_are_balanced():
    prompts = world({"t": ("toxic", "imperative", 9), "s": ("seemingly_toxic", "question", 9)})
    rule = question_mark_rule(prompts)
    found = values(rates(prompts, rule))
    assert found["toxic", "mean", "published", "all", "dsr"] == 1
    assert found["seemingly_toxic", "mean", "published", "all", "compliance"] == 1
    assert found["toxic", "mean", "both", "balanced", "dsr"] == 0.5
    assert ((rule["score"] > 0.5) == (rule["verdict"] == "refuse")).all()


def test_a_judges_errors_are_taken_out_with_their_uncertainty():
    rows = pd.DataFrame(
        {"metric": ["dsr", "partial_share"], "label": "toxic"}
        | {"value": 0.5, "low": 0.4, "high": 0.6}
    )
    table = pd.DataFrame(
        {
            "human": ["refuse", "refuse", "comply", "comply"],
            "judge": ["refuse", "comply", "refuse", "comply"],
            "n": [80, 20, 10, 90],
        }
    )
    found = corrected(rows, table).iloc[0]
    assert found["corrected"] == pytest.approx((0.5 + 0.9 - 1) / (0.8 + 0.9 - 1))
    assert found["corrected_low"] < 0.45 and found["corrected_high"] > 0.68
    sure = corrected(rows, table.assign(n=table["n"] * 1000)).iloc[0]
    assert sure["corrected_high"] - sure["corrected_low"] == pytest.approx(0.2 / 0.7, rel=0.1)
    assert corrected(rows, table)["corrected"].isna().tolist() == [False, True]
    assert corrected(rows, table.assign(n=[50, 50, 50, 50]))["corrected"].isna().all()
    other = corrected(rows, table.assign(label="general"))
    assert other["corrected"].isna().all()
    with pytest.raises(DCRError, match="column 'n'"):
        corrected(rows, table.drop(columns="n"))


def test_bad_input_names_what_is_wrong():
    prompts = world(SETS)
    said = verdicts(prompts, "refuse")
    with pytest.raises(DCRError, match="seed 0: none for 1 prompts, 't1-0' first"):
        rates(prompts, said.iloc[1:])
    with pytest.raises(DCRError, match="prompt 't1-0' occurs twice"):
        rates(prompts, pd.concat([said, said.head(1)]))
    with pytest.raises(DCRError, match="'version' is missing"):
        rates(prompts.drop(columns="version"), said)
    with pytest.raises(DCRError, match="'STL' was not run; methods: m"):
        rate_differences(prompts, said)
    seeds = [verdicts(prompts, "refuse", m, s) for m, s in (("a", 0), ("a", 1), ("b", 2), ("b", 3))]
    with pytest.raises(DCRError, match=r"b ran seeds \[2, 3\], a ran \[0, 1\]: none in common"):
        rate_differences(prompts, pd.concat(seeds), ["a"])


def test_an_answer_that_failed_is_unscored_and_no_end():
    prompts = world(SETS)
    said = verdicts(prompts, "comply").assign(finish="eos")
    said.loc[0, ["verdict", "finish"]] = "unscored", None
    found = rates(prompts, said).set_index("metric")["value"]
    assert found["unscored_share"].max() > 0 and found["truncated_share"].max() == 0


def test_prompts_of_one_request_are_no_independent_pairs():
    prompts = world({"t1": ("toxic", "imperative", 6)}).assign(version="published")
    a = verdicts(prompts, "refuse", "DCR")
    b = verdicts(prompts, np.where(prompts.index < 10, "comply", "refuse"), "STL")
    row = rate_differences(prompts, pd.concat([a, b])).query("form == 'all'").iloc[0]
    assert row["p"] > mcnemar_exact(np.ones(12), prompts.index >= 10)


def test_one_method_alone_has_nothing_to_compare():
    prompts = world(SETS)
    with pytest.raises(DCRError, match="no two methods to compare"):
        rate_differences(prompts, verdicts(prompts, "comply", "STL"))
