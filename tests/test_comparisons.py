"""Matched safety and paired differences of real experiments on a tiny model, one seed and two."""

from __future__ import annotations

import pandas as pd
import pytest
from conftest import make_model, make_tokenizer

from dcr.errors import DCRError
from dcr.evaluate.metrics import mcnemar_exact
from dcr.run.experiment import Experiment
from dcr.tables.comparisons import matched_safety_table, paired_table

OVERRIDES = {
    "align.max_steps": 2,
    "align.lora_rank": 2,
    "align.batch_size": 8,
    "align.checkpoints": [0, 1],
    "generation.max_new_tokens": 2,
    "model.precision": "fp32",
    "data.limit": 6,
    "data.curve_limit": 30,
    "data.benchmarks": ["pairs-safe", "pairs-toxic"],
    "evaluation.forms": True,
    "evaluation.bootstrap": 50,
}


@pytest.fixture(scope="module")
def experiments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(layers=2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return [
        Experiment(
            "quick",
            seed=s,
            run_dir=tmp_path_factory.mktemp(f"run{s}"),
            methods=("base", "STL"),
            overrides={**OVERRIDES, "model.name": str(folder)},
        )
        for s in (0, 1)
    ]


def canned(experiment: Experiment, monkeypatch) -> None:
    """Verdicts by rule: a method's DSR rises and its compliance falls with the step; the last step refuses all but one kind."""
    levels = {
        ("base", 0): (0, 9),
        ("base", -1): (0, 9),
        ("STL", 0): (0, 9),
        ("STL", 1): (4, 6),
        ("STL", 2): (9, 2),
        ("STL", -1): (9, 2),
    }

    def verdicts(method, step=-1):
        prompts = experiment.prompts if step < 0 else experiment.curve_prompts
        if method == "question-mark":
            from dcr.evaluate.metrics import question_mark_rule

            return question_mark_rule(prompts)
        refuses, complies = levels[method, step]
        kinds = [
            ("refuse" if i % 10 < refuses else "comply")
            if label == "toxic"
            else ("comply" if i % 10 < complies else "refuse")
            for i, label in enumerate(prompts["label"])
        ]
        return pd.DataFrame(
            {"prompt_id": prompts["id"], "judge": "x", "verdict": kinds, "score": 0.5}
        )

    monkeypatch.setattr(experiment, "verdicts", verdicts)


def test_tables_of_one_seed_and_of_two(experiments, monkeypatch):
    for e in experiments:
        canned(e, monkeypatch)
    table = matched_safety_table(experiments[0], (0.5, 0.99))
    rows = table[table["quantity"] == "compliance"].set_index(["method", "target"])
    assert (
        rows.loc[("STL", 0.5), "low"]
        <= rows.loc[("STL", 0.5), "compliance"]
        <= rows.loc[("STL", 0.5), "high"]
    )
    assert rows.loc[("base", 0.5), "reason"] == "not reached (highest DSR 0.00)"
    assert rows.loc[("question-mark", 0.5), "compliance"] == 0.5 and table["in_distribution"].all()
    assert experiments[0].read_table("matched_safety").shape == table.shape
    both = matched_safety_table(experiments, (0.5,))
    assert set(both["seeds"]) == {2}


def test_paired_differences_per_set_and_pooled(experiments, monkeypatch):
    first = experiments[0]
    canned(first, monkeypatch)
    table = paired_table(first).set_index(["prompts", "benchmark", "method"])
    assert {b for _, b, _ in table.index} == {
        "all",
        "pairs-safe",
        "pairs-toxic",
        "pairs-safe/swapped",
        "pairs-toxic/swapped",
    }
    part = first.prompts[first.prompts["benchmark"] == "pairs-toxic"]
    hits = {
        m: first.verdicts(m).set_index("prompt_id")["verdict"].loc[part["id"]] == "refuse"
        for m in ("base", "STL")
    }
    row = table.loc[("toxic", "pairs-toxic", "base")]
    assert row["p"] == mcnemar_exact(hits["base"], hits["STL"]) <= row["p_holm"]
    assert row["difference"] == pytest.approx(hits["base"].mean() - hits["STL"].mean())
    assert row["low"] <= row["difference"] <= row["high"] < 0 and row["n"] == len(part)


def test_sources_that_any_method_trained_on_count_for_none(experiments, monkeypatch):
    first = experiments[0]
    canned(first, monkeypatch)
    mixed = first.curve_prompts.assign(
        source=["seen" if i % 3 == 0 else "unseen" for i in range(len(first.curve_prompts))]
    )
    monkeypatch.setitem(first.__dict__, "curve_prompts", mixed)
    monkeypatch.setattr(
        first, "in_distribution", lambda method: {"seen"} if method == "STL" else set()
    )
    table = matched_safety_table(first, (0.5,))
    assert (
        set(table["n"]) == {int((mixed["source"] == "unseen").sum())}
        and not table["in_distribution"].any()
    )


def test_wrong_groups_are_refused(experiments):
    with pytest.raises(DCRError, match="different seeds"):
        matched_safety_table([experiments[0], experiments[0]])
    with pytest.raises(DCRError, match="'DCR' was not run"):
        paired_table(experiments[0], "DCR")
