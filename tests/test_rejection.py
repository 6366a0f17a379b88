"""Refusal probability against enumeration; prefixes; AUROC per form."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FAMILIES, make_model

from dcr.analysis.refusal import auroc_by_form, opening_tokens, refusal_probability, reliability
from dcr.errors import DCRError
from dcr.lm.chat import render

OPENINGS = ("sorry ,", "can't", "i cannot help", "sorry , i")


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_token_by_token_products(family, tiny_tokenizer, prompts):
    model = make_model(family)
    ours = refusal_probability(model, tiny_tokenizer, prompts, openings=OPENINGS, batch_size=4)
    expected = []
    for text in render(tiny_tokenizer, prompts):
        head, mass = tiny_tokenizer(text, add_special_tokens=False)["input_ids"], 0.0
        for phrase in opening_tokens(tiny_tokenizer, OPENINGS):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([head + phrase])).logits[0].log_softmax(-1)
            mass += float(
                torch.stack([logits[len(head) - 1 + i, t] for i, t in enumerate(phrase)])
                .sum()
                .exp()
            )
        expected.append(mass)
    np.testing.assert_allclose(ours, expected, rtol=2e-4)


def test_no_opening_is_counted_twice(tiny_tokenizer):
    rows = opening_tokens(tiny_tokenizer, OPENINGS)
    assert len(rows) == 3 and not any(a != b and a[: len(b)] == b for a in rows for b in rows)


def test_auroc_by_form():
    rows = pd.DataFrame(
        {
            "label": ["toxic"] * 4 + ["seemingly_toxic"] * 4,
            "form": ["question", "question", "imperative", "imperative"] * 2,
        }
    )
    table = auroc_by_form(rows, np.array([0.9, 0.8, 0.9, 0.8, 0.1, 0.2, 0.95, 0.99]))
    auroc = table.set_index(["toxic_form", "harmless_form"])["auroc"]
    assert auroc["question", "question"] == 1.0 and auroc["imperative", "imperative"] == 0.0
    assert auroc["balanced", "balanced"] == pytest.approx(0.5)
    with pytest.raises(DCRError, match="no pair of forms"):
        auroc_by_form(rows.iloc[:4], np.ones(4))


def test_no_prompts(tiny_llama, tiny_tokenizer):
    with pytest.raises(DCRError, match="no prompts"):
        refusal_probability(tiny_llama, tiny_tokenizer, [])


def test_reliability_of_a_calibrated_and_of_a_useless_probability():
    rng = np.random.default_rng(0)
    probability = rng.uniform(size=400)
    scores, table = reliability(probability, rng.uniform(size=400) < probability)
    assert (
        scores["auroc"] > 0.75
        and scores["calibration_error"] < 0.1
        and scores["low"] < scores["auroc"] < scores["high"]
    )
    assert (
        table["n"].sum() == 400
        and (table["low"] <= table["refused"]).all()
        and table["probability"].is_monotonic_increasing
    )
    useless, _ = reliability(probability, rng.uniform(size=400) < 0.5)
    assert useless["low"] < 0.5 < useless["high"] and useless["calibration_error"] > 0.15
    with pytest.raises(DCRError, match="0 of 400 answers were refused"):
        reliability(probability, np.zeros(400, dtype=bool))


def test_prompt_over_the_context_and_broken_weights(tiny_llama, tiny_tokenizer, prompts):
    with pytest.raises(DCRError, match="prompt 0 has .* tokens, the context holds 8"):
        refusal_probability(tiny_llama, tiny_tokenizer, prompts, openings=OPENINGS, max_length=8)
    cut = refusal_probability(
        tiny_llama, tiny_tokenizer, prompts, openings=OPENINGS, max_length=8, truncate=True
    )
    assert ((cut >= 0) & (cut <= 1)).all()
    with torch.no_grad():
        tiny_llama.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(DCRError, match="not finite"):
        refusal_probability(tiny_llama, tiny_tokenizer, prompts, openings=OPENINGS)
