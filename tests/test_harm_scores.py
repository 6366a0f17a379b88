"""Scores of harm: read off a real model, their AUROC over seeds, differences on the same draws, thresholds as curves."""

from __future__ import annotations

import fake_run
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from test_comparisons import experiments  # noqa: F401 (a fixture)

from dcr.errors import DCRError
from dcr.evaluate.matched import matched_safety
from dcr.tables.harm_scores import score_auroc, score_curves, score_differences, scores_table
from dcr.tables.outcomes import compare


def made_up(seeds: int = 2) -> pd.DataFrame:
    return pd.concat([fake_run.tables(s)["scores"] for s in range(seeds)], ignore_index=True)


def test_scores_of_an_experiment_are_what_its_models_say(experiments):  # noqa: F811
    from dcr.analysis.refusal import refusal_probability

    e = experiments[0]
    table = scores_table(e)
    assert [c for c in table if "@" in c] == [
        "refusal@base",
        "refusal@STL",
        "probe@base",
        "means@base",
    ] and "text" not in table
    assert (
        table["id"].tolist()
        == e.curve_prompts.loc[e.curve_prompts["label"] != "general", "id"].tolist()
    )
    model, tokenizer = e.model("STL")
    texts = e.curve_prompts.set_index("id").loc[table["id"], "text"].tolist()
    assert table["refusal@STL"].to_numpy() == pytest.approx(
        refusal_probability(model, tokenizer, texts), rel=1e-4
    )
    computed = len(e.store.computed)
    assert scores_table(e).equals(table) and len(e.store.computed) == computed
    pd.testing.assert_frame_equal(e.read_table("scores"), table)


def test_a_source_that_the_probe_was_fitted_on_does_not_count(experiments, monkeypatch):  # noqa: F811
    from dcr.tables import harm_scores

    e = experiments[0]
    prompts = e.curve_prompts.assign(
        source=np.where(e.curve_prompts["pair_id"].str.contains("1"), "bundled", "other")
    )
    assert prompts.groupby("source")["label"].nunique().min() >= 2
    monkeypatch.setattr(e, "curve_prompts", prompts)
    monkeypatch.setattr(harm_scores, "left_out", lambda _: set())
    monkeypatch.setattr(
        harm_scores, "harm_prompts", lambda *a: prompts[prompts["source"] == "bundled"]
    )
    assert set(scores_table(e)["source"]) == {"other"}


def test_auroc_over_seeds_is_the_mean_of_what_scikit_learn_gives_each_pair_of_forms():
    scores = made_up()
    table, differences = (
        score_auroc(scores, n_boot=200),
        score_differences(scores, "STL", n_boot=200),
    )
    got = table.set_index(["reader", "method", "toxic_form", "harmless_form"])["auroc"]
    each = []
    for _, rows in scores.groupby("seed"):
        part = rows[
            np.where(
                rows["label"] == "toxic", rows["form"] == "question", rows["form"] == "imperative"
            )
        ]
        each.append(roc_auc_score(part["label"] == "toxic", part["refusal@DCR"]))
    assert got["refusal", "DCR", "question", "imperative"] == pytest.approx(np.mean(each))
    balanced = table[table["toxic_form"] == "balanced"].set_index(["reader", "method"])
    assert (
        balanced.loc[("probe", "base"), ["auroc", "low", "high"]].tolist() == [1, 1, 1]
        and (balanced["seeds"] == 2).all()
    )
    assert balanced.loc[("refusal", "STL"), "low"] < 0.5 < balanced.loc[("refusal", "STL"), "high"]
    told = differences.set_index(["reader", "method"])
    assert ("refusal", "STL") not in told.index and told.loc[("refusal", "DCR"), "low"] > 0
    expected = balanced.loc[("refusal", "DCR"), "auroc"] - balanced.loc[("refusal", "STL"), "auroc"]
    assert told.loc[("refusal", "DCR"), "difference"] == pytest.approx(expected)
    pd.testing.assert_frame_equal(score_auroc(scores, n_boot=200), table)


def test_a_threshold_on_a_score_is_a_curve_from_refusing_nothing_to_refusing_all():
    read = matched_safety(score_curves(made_up()), (0.8,), n_boot=20)
    read = read[read["quantity"] == "compliance"].set_index("method")
    assert read.loc["probe@base", "compliance"] == pytest.approx(1) and (read["reason"] == "").all()
    assert read.loc["refusal@STL", "compliance"] < 0.4 < read.loc["refusal@DCR", "compliance"]
    rates = {
        c.method: (
            c.hits[c.prompts["label"] == "toxic"].mean(0),
            c.hits[c.prompts["label"] != "toxic"].mean(0),
        )
        for c in score_curves(made_up(1))
    }
    dsr, compliance = rates["refusal@DCR"]
    assert (dsr[0], compliance[0]) == (0, 1) and (dsr[-1], compliance[-1]) == (1, 0)


def test_compare_writes_the_tables_of_scores_and_wrong_input_is_named(tmp_path):
    run = fake_run.write_run(tmp_path / "run", seeds=2)
    found = compare(run, against=("STL", "DCR"), out=tmp_path / "out", n_boot=20)
    for seed in (0, 1):  # DCR as a method that steers: outcomes, but no scores of its own
        path = run / f"seed-{seed}" / "tables" / "scores.csv"
        pd.read_csv(path).drop(columns="refusal@DCR").to_csv(path, index=False)
    steered = compare(run, against=("DCR",), n_boot=20)
    assert (
        set(steered["seeds_differences"]["against"]) == {"DCR"}
        and "seeds_auroc_differences" not in steered
    )
    assert (
        set(found["seeds_auroc_differences"]["against"]) == {"STL", "DCR"}
        and (tmp_path / "out" / "seeds_score_safety.csv").exists()
    )
    difference = found["seeds_score_differences"].set_index(
        ["method", "against", "quantity", "target"]
    )["difference"]
    read = found["seeds_score_safety"].set_index(["method", "quantity", "target"])["compliance"]
    expected = read["refusal@DCR", "compliance", 0.8] - read["refusal@STL", "compliance", 0.8]
    assert difference["refusal@DCR", "refusal@STL", "compliance", 0.8] == pytest.approx(expected)
    one = made_up()
    one = one[(one["seed"] == 0) | (one["form"] == "question")]
    with pytest.raises(
        DCRError, match="scores of refusal@STL: the seeds have prompts of different forms"
    ):
        score_auroc(one, n_boot=5)
    with pytest.raises(DCRError, match="no refusal probability of 'SCANS'; methods: STL, DCR"):
        score_differences(made_up(), "SCANS")
    with pytest.raises(DCRError, match="column 'seed' is missing"):
        score_auroc(made_up().drop(columns="seed"))
