"""Automatic ℓ: the sweep is shown, the base is left untouched, the choice follows the score, finished candidates are reused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_model, make_tokenizer
from test_refinement import FAST, texts, weights

from dcr.data.files import read_jsonl
from dcr.train import layer_choice
from dcr.train.refine import refine

AUTO = replace(FAST, layer="auto", auto_layers=(0.5, 0.75), auto_steps=2, max_steps=3)


def choose(model, config=AUTO, **kwargs):
    return layer_choice.choose_layer(
        model, make_tokenizer(), **texts(20), config=config, seed=1, **kwargs
    )


@pytest.mark.parametrize("rank", [4, 0])
def test_every_candidate_starts_from_the_same_base_which_stays(rank):
    model = make_model()
    before = weights(model)
    choice = choose(model, replace(AUTO, lora_rank=rank))
    assert not hasattr(model, "peft_config") or not any(
        "lora" in n for n, _ in model.named_parameters()
    )
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    alone = choose(make_model(), replace(AUTO, lora_rank=rank, auto_layers=(0.75,))).table[0]
    last = next(r for r in choice.table if r["layer"] == 3)
    assert {k: v for k, v in last.items() if k != "seconds"} == pytest.approx(
        {k: v for k, v in alone.items() if k != "seconds"}
    )


def test_the_choice_follows_separation_less_drift():
    choice = choose(make_model())
    assert [r["layer"] for r in sorted(choice.table, key=lambda r: r["layer"])] == [2, 3]
    for row in choice.table:
        assert row["score"] == pytest.approx(
            row["within_similarity"] - row["cross_similarity"] - row["general_drift"]
        )
        assert row["general_drift"] > 0 and 0 <= row["probe_auroc"] <= 1
    assert choice.layer == max(choice.table, key=lambda r: r["score"])["layer"]
    careful = choose(make_model(), drift_weight=1e6)
    assert careful.layer == min(careful.table, key=lambda r: r["general_drift"])["layer"]


def test_refine_uses_the_choice_and_shows_the_sweep(tmp_path):
    result = refine(
        make_model(), make_tokenizer(), **texts(20), config=AUTO, seed=1, work_dir=tmp_path
    )
    assert result.layer == result.layer_sweep[0]["layer"] and len(result.layer_sweep) == 2
    assert all(p.requires_grad for p in result.model.parameters()) and len(result.history) == 3
    fixed = refine(
        make_model(),
        make_tokenizer(),
        **texts(20),
        config=replace(AUTO, layer=result.layer),
        seed=1,
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(result.model.parameters(), fixed.model.parameters(), strict=True)
    )
    assert len(read_jsonl(tmp_path / "layer_sweep.jsonl")) == 2 and not list(
        tmp_path.glob("candidate-*")
    )


def test_finished_candidates_are_reused(tmp_path, monkeypatch):
    first = choose(make_model(), work_dir=tmp_path)
    monkeypatch.setattr("dcr.train.refine.refine", lambda *a, **k: pytest.fail("trained again"))
    assert choose(make_model(), work_dir=tmp_path) == first
