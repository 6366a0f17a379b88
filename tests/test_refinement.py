"""Stage 1: what moves and what does not, resume, retention, the stop rule, bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import FAMILIES, make_model, make_tokenizer

from dcr.config import RefineConfig
from dcr.errors import DCRError
from dcr.models import decoder_layers
from dcr.refinement import hold_out, prompt_table, refine

FAST = RefineConfig(layer=2, batch_size=8, max_steps=6, eval_steps=3, lr=5e-3, lora_rank=4, eval_share=0.2)


def texts(n: int) -> dict:
    things = ["cat", "dog", "house", "bike", "bread", "file", "story", "plan", "trip", "game"]
    return {"toxic": [f"how do i kill the {things[i % 10]} in {i} ?" for i in range(n)],
            "seemingly_toxic": [f"how do i bake the {things[i % 10]} for {i} ." for i in range(n)]}


def run(model, config=FAST, **kwargs):
    return refine(model, make_tokenizer(), **{**texts(20), **kwargs}, config=config, seed=1)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_every_block_below_moves_and_none_above(family, rank):
    model = make_model(family)
    before = weights(model)
    result = run(model, replace(FAST, lora_rank=rank))
    path = next(n for n, m in result.model.named_modules() if m is decoder_layers(result.model))
    changed = {n for n, p in result.model.named_parameters() if not torch.equal(p, before[n])}
    moved = {n.removeprefix(path + ".").split(".")[0] for n in changed if n.startswith(path + ".")}
    assert moved == {"0", "1"} and all(n.startswith(path + ".") for n in changed)
    assert result.layer == 2 and len(result.history) == 6 and result.stop_reason == "all steps done"


def test_it_pulls_the_classes_apart():
    result = run(make_model(), replace(FAST, max_steps=40, eval_steps=20))
    similarity = [row["cross_similarity"] for row in result.evaluations]
    assert similarity[-1] < similarity[0] - 0.2
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    first, again = (weights(run(make_model()).model) for _ in range(2))
    other = weights(refine(make_model(), make_tokenizer(), **texts(20), config=FAST, seed=2).model)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_the_refined_model_is_an_ordinary_one(tmp_path):
    import transformers

    refined = run(make_model()).model
    refined.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any("lora" in n for n, _ in loaded.named_parameters())
    kept = run(make_model(), merge=False).model
    assert hasattr(kept, "merge_and_unload")


@pytest.mark.parametrize("loss", ["supcon", "infonce", "triplet"])
def test_other_losses_train(loss):
    assert len(run(make_model(), replace(FAST, loss=loss, max_steps=2)).history) == 2


def test_retention_holds_general_prompts_still():
    general = [f"list the {w} ." for w in ("cat", "dog", "bread", "plan", "trip", "house")]
    loose, held = (run(make_model(), replace(FAST, max_steps=30, general_share=0.0, retention=w), general=general)
                   for w in (1e-6, 30.0))
    assert held.history[-1]["drift"] < 0.5 * loose.history[-1]["drift"]


def test_target_stops_early_and_says_why():
    result = run(make_model(), replace(FAST, max_steps=60, eval_steps=2, target=0.6))
    assert "reached 0.6" in result.stop_reason and len(result.history) < 60
    assert min(r["cross_similarity"] for r in result.evaluations) <= 0.6


def test_patience_restores_the_best_step():
    result = run(make_model(), replace(FAST, max_steps=200, eval_steps=1, lr=0.5, patience=3))
    assert "no improvement" in result.stop_reason and len(result.history) < 200
    values = [r["cross_similarity"] for r in result.evaluations]
    assert values.index(min(values)) == len(values) - 4


def test_hold_out_keeps_pairs_together_and_shares_nothing():
    rows = pd.DataFrame({"text": [f"t{i}" for i in range(40)], "pair_id": [f"p{i // 2}" for i in range(40)]})
    table = prompt_table(rows.iloc[::2], rows.iloc[1::2], ["general one"])
    train, held = hold_out(table, 0.2, seed=0)
    assert not set(train["text"]) & set(held["text"]) and len(train) + len(held) == 41
    assert held.groupby("pair_id").size().eq(2).all() and (held["label"] == "toxic").sum() == 4


@pytest.mark.parametrize("change, config, message", [
    ({"toxic": []}, {}, "toxic: 0 prompts given"),
    ({"toxic": ["how ?"] * 20}, {}, "all 20 prompts are identical"),
    ({"toxic": ["a", "b", "c"]}, {}, "batch needs"),
    ({}, {"layer": 9}, "out of range.*4 blocks"),
    ({}, {"loss": "cosine"}, "circle, supcon"),
    ({}, {"lora_targets": ("nope",)}, "match no linear layer.*q_proj"),
    ({}, {"lr": float("inf")}, "step 2.*last good checkpoint"),
])
def test_bad_input_is_one_clear_error(change, config, message):
    with pytest.raises(DCRError, match=message):
        run(make_model(), replace(FAST, warmup=0.0, **config), **change)


RESUME = """
import sys, os, time
sys.path.insert(0, {tests!r})
from test_refinement import *
from dcr import training
if sys.argv[2] == "slow":
    step = training.HistoryCallback.on_step_end
    def slowly(self, *a, **k):
        step(self, *a, **k); time.sleep(0.3)
    training.HistoryCallback.on_step_end = slowly
result = refine(make_model(), make_tokenizer(), **texts(20), config=replace(FAST, max_steps=12, save_steps=3), seed=1,
                work_dir=sys.argv[1])
torch.save(weights(result.model), sys.argv[1] + "/final.pt")
"""


def test_killed_run_resumes_to_the_same_weights(tmp_path):
    script = RESUME.format(tests=os.path.dirname(__file__))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([sys.executable, "-c", script, str(whole), "fast"], check=True, timeout=120)
    process = subprocess.Popen([sys.executable, "-c", script, str(cut), "slow"])
    deadline = time.time() + 100
    while not list(cut.glob("checkpoint-6/trainer_state.json")) and time.time() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (cut / "final.pt").exists() and list(cut.glob("checkpoint-*"))
    subprocess.run([sys.executable, "-c", script, str(cut), "fast"], check=True, timeout=120)
    first, second = (torch.load(folder / "final.pt", weights_only=True) for folder in (whole, cut))
    assert all(torch.equal(first[n], second[n]) for n in first)
    history = [r["step"] for r in map(pd.io.json.ujson_loads, (cut / "history.jsonl").read_text().splitlines())]
    assert history == list(range(1, 13))


def test_families_can_be_refined():
    for family in FAMILIES:
        assert len(run(make_model(family), replace(FAST, max_steps=1)).history) == 1
