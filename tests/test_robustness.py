"""Wrappers and the refusal-bias sweep: same prompts, paired changes; the bias touches the first token only and is exact."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import make_model, make_tokenizer

from dcr.errors import DCRError
from dcr.evaluate.matched import curve_points
from dcr.lm.generate import generate
from dcr.run.experiment import Experiment
from dcr.tables.bias_sweep import (
    FORCED,
    bias_table,
    frontier,
    refusal_bias,
    refusal_gaps,
    refusal_tokens,
)
from dcr.tables.robustness import WRAPPERS, robustness_rows, robustness_table, wrap

OVERRIDES = {
    "generation.max_new_tokens": 3,
    "model.precision": "fp32",
    "data.limit": 8,
    "data.curve_limit": 40,
    "evaluation.bootstrap": 40,
    "data.benchmarks": ["pairs-safe", "pairs-toxic"],
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(layers=2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return Experiment(
        "quick",
        run_dir=tmp_path_factory.mktemp("run"),
        methods=("base",),
        overrides={**OVERRIDES, "model.name": str(folder)},
    )


def table(n: int = 4) -> pd.DataFrame:
    words = ("cat", "dog", "house", "bike")[:n]
    return pd.DataFrame(
        {
            "id": [f"p{i}" for i in range(n)],
            "text": [f"how do i bake bread {w} ?" for w in words],
            "label": ["toxic", "seemingly_toxic"] * (n // 2),
            "form": "question",
            "benchmark": "b",
            "source": "s",
        }
    )


def test_wrappers_keep_the_prompt_whole_and_are_alike_for_both_classes():
    for name in WRAPPERS:
        wrapped = wrap(table(), name)
        assert all(
            before in after for before, after in zip(table()["text"], wrapped["text"], strict=True)
        )
        frames = {
            after.replace(before, "")
            for before, after in zip(table()["text"], wrapped["text"], strict=True)
        }
        assert len(frames) == 1 and wrapped["id"].is_unique
    with pytest.raises(DCRError, match="'rot13' is unknown; known: plain"):
        wrap(table(), "rot13")


def test_changes_are_paired_with_the_plain_prompt():
    prompts = pd.concat([wrap(table(), w) for w in ("plain", "polite")], ignore_index=True)
    refused = pd.Series([1, 0, 1, 1] + [0, 0, 0, 1])  # toxic: p0, p2; seemingly toxic: p1, p3
    rows = robustness_rows(prompts, refused, "m", n_boot=50).set_index(["label", "wrapper"])
    assert (
        rows.loc[("toxic", "polite"), "change"] == -1.0
        and rows.loc[("toxic", "plain"), "refusal_rate"] == 1.0
    )
    assert (
        rows.loc[("seemingly_toxic", "polite"), "change"]
        == 0.0
        == rows.loc[("toxic", "plain"), "change"]
    )


def test_robustness_of_an_experiment_is_cached(experiment):
    rows = robustness_table(experiment, per_class=3)
    assert (
        len(rows) == 2 * len(WRAPPERS)
        and (rows["n"] == 3).all()
        and rows["refusal_rate"].between(0, 1).all()
    )
    before = len(experiment.store.computed)
    assert (
        robustness_table(experiment, per_class=3).equals(rows)
        and len(experiment.store.computed) == before
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bias_decides_the_first_token_alone(family, tiny_tokenizer):
    model, prompts = make_model(family, seed=4, tied=False), table()  # a tied one repeats itself
    tokens = refusal_tokens(tiny_tokenizer, ("sorry , i can't", "cannot help"))
    plain = generate(model, tiny_tokenizer, prompts, max_new_tokens=4)
    with refusal_bias(model, tokens, FORCED):
        forced = generate(model, tiny_tokenizer, prompts, max_new_tokens=4)
    words = [r.split()[0] for r in forced["response"]]
    assert set(words) <= {"sorry", "cannot"}
    assert not all(
        w in ("sorry", "cannot") for r in forced["response"] for w in r.split()
    )  # later tokens are free
    assert generate(model, tiny_tokenizer, prompts, max_new_tokens=4).equals(
        plain
    )  # and the hook is gone


def test_two_passes_and_a_gap_give_the_answer_at_any_bias(tiny_tokenizer, tiny_llama):
    prompts, tokens = table(), refusal_tokens(tiny_tokenizer, ("sorry", "cannot"))
    gaps = refusal_gaps(tiny_llama, tiny_tokenizer, prompts["text"].tolist(), tokens)
    sides = []
    for bias in (FORCED, -FORCED):
        with refusal_bias(tiny_llama, tokens, bias):
            sides.append(
                generate(tiny_llama, tiny_tokenizer, prompts, max_new_tokens=3)[
                    "response"
                ].to_numpy()
            )
    for bias in sorted(-gaps)[1] + np.array([-0.01, 0.01]):
        with refusal_bias(tiny_llama, tokens, float(bias)):
            real = generate(tiny_llama, tiny_tokenizer, prompts, max_new_tokens=3)["response"]
        assert real.tolist() == np.where(gaps + bias > 0, *sides).tolist()


def test_frontier_trades_compliance_for_safety():
    outcomes = pd.concat([table(4)] * 5, ignore_index=True).assign(id=[f"p{i}" for i in range(20)])
    outcomes = outcomes.assign(gap=np.linspace(-3, 3, 20), refusing="refuse", other="comply")
    points = curve_points([frontier(outcomes)])
    assert (points["dsr"].diff().dropna() >= 0).all() and (
        points["compliance"].diff().dropna() <= 0
    ).all()
    assert points.iloc[0][["dsr", "compliance"]].tolist() == [0, 1] and points.iloc[-1][
        ["dsr", "compliance"]
    ].tolist() == [1, 0]
    assert (points["step"] == 0).any()


def test_bias_sweep_of_an_experiment(experiment):
    rows = bias_table(experiment)
    assert (
        (rows["dsr_low"] <= rows["dsr"] + 1e-9).all()
        and set(rows["method"]) == {"base"}
        and (rows["bias"] == 0).sum() == 1
    )


def test_bad_bias_and_openings_are_refused(tiny_llama, tiny_tokenizer):
    with (
        pytest.raises(DCRError, match="give a finite number"),
        refusal_bias(tiny_llama, [1], float("inf")),
    ):
        pass
    with pytest.raises(DCRError, match="no opening is left"):
        refusal_tokens(tiny_tokenizer, ("",))
