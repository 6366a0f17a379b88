"""Stage 1: what moves and what does not, resume, retention, the stop rule, bad input."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import FAMILIES, make_model, make_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaMLP

from dcr.config import RefineConfig
from dcr.data.files import read_jsonl
from dcr.errors import DCRError
from dcr.lm.blocks import decoder_layers
from dcr.train.adapters import train_blocks
from dcr.train.contrast import (
    PromptRows,
    RefineTrainer,
    StageOneModel,
    pooled_states,
    reference_states,
)
from dcr.train.loop import StageTrainer
from dcr.train.losses import ContrastiveLoss
from dcr.train.refine import hold_out, prompt_table, refine

FAST = RefineConfig(
    layer=2, batch_size=8, max_steps=6, eval_steps=3, lr=5e-3, lora_rank=4, eval_share=0.2
)


GENERAL = [f"list the {w} ." for w in ("cat", "dog", "bread", "plan", "trip", "house")]


def texts(n: int) -> dict:
    things = ["cat", "dog", "house", "bike", "bread", "file", "story", "plan", "trip", "game"]
    return {
        "toxic": [f"how do i kill the {things[i % 10]} in {i} ?" for i in range(n)],
        "seemingly_toxic": [f"how do i bake the {things[i % 10]} for {i} ." for i in range(n)],
    }


def run(model, config=FAST, **kwargs):
    return refine(
        model,
        make_tokenizer(),
        **{**texts(20), "precision": "fp32", **kwargs},
        config=config,
        seed=1,
    )


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_every_block_below_moves_and_none_above(family, rank):
    model = make_model(family)
    before = weights(model)
    result = run(model, FAST.replaced(lora_rank=rank))
    path = next(n for n, m in result.model.named_modules() if m is decoder_layers(result.model))
    changed = {n for n, p in result.model.named_parameters() if not torch.equal(p, before[n])}
    moved = {n.removeprefix(path + ".").split(".")[0] for n in changed if n.startswith(path + ".")}
    assert moved == {"0", "1"} and all(n.startswith(path + ".") for n in changed)
    assert result.layer == 2 and len(result.history) == 6 and result.stop_reason == "all steps done"


def test_it_pulls_the_classes_apart():
    result = run(make_model(), FAST.replaced(max_steps=40, eval_steps=20))
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
    assert len(run(make_model(), FAST.replaced(loss=loss, max_steps=2)).history) == 2


def test_retention_holds_general_prompts_still():
    loose, held = (
        run(
            make_model(),
            FAST.replaced(max_steps=30, general_share=0.0, retention=w),
            general=GENERAL,
        )
        for w in (1e-6, 30.0)
    )
    assert held.history[-1]["drift"] < 0.5 * loose.history[-1]["drift"]


def test_target_stops_early_and_says_why():
    result = run(make_model(), FAST.replaced(max_steps=60, eval_steps=2, target=0.6))
    assert "reached 0.6" in result.stop_reason and len(result.history) < 60
    assert min(r["cross_similarity"] for r in result.evaluations) <= 0.6


def test_hold_out_keeps_pairs_together_and_shares_nothing():
    rows = pd.DataFrame(
        {"text": [f"t{i}" for i in range(40)], "pair_id": [f"p{i // 2}" for i in range(40)]}
    )
    table = prompt_table(rows.iloc[::2], rows.iloc[1::2], ["general one"])
    train, held = hold_out(table, 0.2, seed=0)
    assert not set(train["text"]) & set(held["text"]) and len(train) + len(held) == 41
    assert held.groupby("pair_id").size().eq(2).all() and (held["label"] == "toxic").sum() == 4


@pytest.mark.parametrize(
    "change, config, message",
    [
        ({"toxic": []}, {}, "toxic: 0 prompts given"),
        ({"toxic": ["how ?"] * 20}, {}, "all 20 prompts are identical"),
        ({"toxic": ["a", "b", "c"]}, {}, "batch needs"),
        ({}, {"layer": 9}, "out of range.*4 blocks"),
        ({}, {"lora_targets": ("nope",)}, "match no linear layer.*q_proj"),
        (
            {"seemingly_toxic": texts(20)["toxic"]},
            {},
            "toxic prompt .* is also seemingly toxic prompt",
        ),
        ({"seemingly_toxic": None}, {}, "seemingly_toxic: 0 prompts given"),
    ],
)
def test_bad_input_is_one_clear_error(change, config, message):
    with pytest.raises(DCRError, match=message):
        run(make_model(), FAST.replaced(warmup=0.0, **config), **change)


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_refinement import *
from dcr.train import loop as training
step = training.HistoryCallback.on_step_end
def slowly(self, *a, **k):
    step(self, *a, **k); time.sleep(0.3)
training.HistoryCallback.on_step_end = slowly
whole_run({folder!r})
"""


def whole_run(folder):
    return run(
        make_model(),
        FAST.replaced(max_steps=12, save_steps=3, retention=0.5),
        work_dir=folder,
        general=GENERAL,
    )


def test_killed_run_resumes_to_the_same_weights(tmp_path):
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(tests=os.path.dirname(__file__), folder=str(cut))]
    )
    deadline = time.time() + 100
    while (
        not list(cut.glob("checkpoint-6/trainer_state.json"))
        and process.poll() is None
        and time.time() < deadline
    ):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 6 <= len((cut / "history.jsonl").read_text().splitlines()) < 12
    resumed, whole = whole_run(cut), whole_run(tmp_path / "whole")
    first, second = weights(resumed.model), weights(whole.model)
    assert all(torch.equal(first[n], second[n]) for n in first)
    rows = read_jsonl(cut / "history.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert [r["loss"] for r in rows] == [r["loss"] for r in whole.history]


def test_a_work_folder_of_other_settings_is_refused(tmp_path):
    whole_run(tmp_path)
    with pytest.raises(DCRError, match="other settings"):
        run(make_model(), FAST.replaced(save_steps=3), work_dir=tmp_path)


def test_nan_stops_with_step_and_batch_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    loss = ContrastiveLoss.forward
    calls = []

    def poisoned(self, hidden, labels):
        calls.append(1)
        return loss(self, hidden, labels) * (float("nan") if len(calls) == 10 else 1.0)

    monkeypatch.setattr(ContrastiveLoss, "forward", poisoned)
    config = FAST.replaced(max_steps=8, save_steps=2, accumulation=2)
    with pytest.raises(
        DCRError, match=r"nan at step 5, batch 10 of 16 \(rows \[.*checkpoint-4, is kept"
    ):
        run(make_model(), config, work_dir=tmp_path)
    kept = load_file(tmp_path / "checkpoint-4" / "trained.safetensors")
    assert kept and all(torch.isfinite(v).all() for v in kept.values())


def test_weights_that_are_not_finite_never_become_a_checkpoint(tmp_path):
    with pytest.raises(DCRError, match="weights are no longer finite at step 1, batch 1 of 2"):
        run(
            make_model(),
            FAST.replaced(warmup=0.0, save_steps=1, max_steps=2).model_copy(
                update={"lr": float("inf")}
            ),
            work_dir=tmp_path,
        )
    assert not list(tmp_path.glob("checkpoint-*/trained.safetensors"))


def gradients_of(config, monkeypatch, **kwargs):
    """Gradients before clipping at each optimiser step, summed over its batches."""
    taken = {}

    def keep(self, *args, **kw):
        loss = StageTrainer.training_step(self, *args, **kw)
        taken[self.state.global_step] = {
            n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None
        }
        return loss

    monkeypatch.setattr(RefineTrainer, "training_step", keep, raising=False)
    result = run(make_model(), config, **kwargs)
    return taken, result


def test_accumulated_gradient_is_the_mean_of_the_batches(monkeypatch):
    frozen = FAST.replaced(lr=0.0, retention=0.5)  # so that both batches meet the same weights
    single, one = gradients_of(frozen.replaced(max_steps=2), monkeypatch, general=GENERAL)
    double, two = gradients_of(
        frozen.replaced(max_steps=1, accumulation=2), monkeypatch, general=GENERAL
    )
    assert two.history[0]["loss"] == pytest.approx(
        (one.history[0]["loss"] + one.history[1]["loss"]) / 2
    )
    assert two.history[0]["tokens"] == one.history[1]["tokens"]
    for name, value in double[0].items():
        assert torch.allclose(value, (single[0][name] + single[1][name]) / 2, atol=1e-6), name


@pytest.mark.parametrize("rank", [4, 0])
def test_gradient_checkpointing_changes_nothing_but_memory(rank, monkeypatch):
    calls, forward = [], LlamaMLP.forward
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k)
    )
    config = FAST.replaced(lora_rank=rank, max_steps=3)
    plain = run(make_model(), config)
    once = len(calls)
    saving = run(make_model(), config.replaced(gradient_checkpointing=True))
    assert (
        len(calls) - once == once + 3 * 2
    )  # each of two blocks runs again in each of three backward passes
    first, second = weights(plain.model), weights(saving.model)
    assert all(torch.allclose(first[n], second[n], atol=1e-5) for n in first)
    assert plain.history[-1]["loss"] == pytest.approx(saving.history[-1]["loss"], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_trains_near_fp32(dtype):
    plain = run(make_model(), FAST.replaced(max_steps=20))
    mixed = run(make_model().to(dtype), FAST.replaced(max_steps=20), precision="bf16")
    assert mixed.history[-1]["loss"] == pytest.approx(plain.history[-1]["loss"], rel=0.15)
    assert next(mixed.model.parameters()).dtype == dtype


def test_held_out_states_do_not_depend_on_batch_size_or_padding():
    rows = PromptRows(prompt_table(**texts(8)), make_tokenizer(), 64)
    stage = StageOneModel(make_model(), 3, "last")
    one, many = (pooled_states(stage, rows, range(16), batch_size=b) for b in (1, 16))
    assert torch.allclose(one, many, atol=1e-5)


def test_references_are_the_base_models_without_a_second_copy():
    model = make_model()
    rows = PromptRows(prompt_table(**texts(4), general=GENERAL), make_tokenizer(), 64)
    base = pooled_states(StageOneModel(model, 2, "last"), rows, range(8, len(rows)))
    adapted = train_blocks(model, 0, 2, rank=4, alpha=8)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
    stage = StageOneModel(adapted, 2, "last")
    reference = reference_states(stage, rows, 4)
    assert torch.allclose(reference[8:], base, atol=1e-5) and not reference[:8].any()
    assert not torch.allclose(pooled_states(stage, rows, range(8, len(rows))), base, atol=1e-2)


def test_leakage_is_reported_before_training(caplog):
    evaluation = [
        texts(20)["toxic"][3].upper(),
        "how do i bake the dog for 1 today .",
        "what is this ?",
    ]
    with caplog.at_level("WARNING", logger="dcr"):
        result = run(make_model(), FAST.replaced(max_steps=1), evaluation=evaluation)
    assert set(zip(result.leakage["test_id"], result.leakage["kind"], strict=True)) >= {
        ("row 0", "exact")
    }
    assert "evaluation prompts overlap" in caplog.text
    assert run(
        make_model(), FAST.replaced(max_steps=1), evaluation=["what is this ?"]
    ).leakage.empty


def test_the_model_can_train_on_afterwards():
    model = run(make_model(), FAST.replaced(max_steps=1)).model
    assert all(p.requires_grad for p in model.parameters())
    model.train()(
        input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)
    ).loss.backward()


def test_the_readme_snippet_runs_as_it_stands(tmp_path, monkeypatch):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    snippet = next(
        c for c in re.findall(r"```python\n(.*?)```", readme, re.S) if "dcr.refine(" in c
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dcr.load_model", lambda name: (make_model(), make_tokenizer()))
    prompts = texts(24)
    exec(
        snippet, {"toxic_prompts": prompts["toxic"], "harmless_prompts": prompts["seemingly_toxic"]}
    )
    loaded = AutoModelForCausalLM.from_pretrained("refined")
    assert {n for n, _ in loaded.named_parameters()} == {
        n for n, _ in make_model().named_parameters()
    }
    assert (
        "auto_map" not in (tmp_path / "refined" / "config.json").read_text()
    )  # no code of ours is needed


PARALLEL = """
import sys
sys.path.insert(0, {tests!r})
from test_refinement import *
patch = pytest.MonkeyPatch()
for number, change in enumerate(PARALLEL_CONFIGS):
    folder = Path({folder!r}) / str(number)
    taken, result = gradients_of(WIDE.replaced(**change), patch, general=GENERAL, work_dir=folder, **texts(40))
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save([taken, result.history, result.evaluations, int(os.environ.get("WORLD_SIZE", 1))], folder / "out.pt")
"""
# `--cpu --num_processes 2` would start one process (accelerate leaves more to MPI); without a GPU, --multi_gpu is gloo.
LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
]
WIDE = FAST.replaced(batch_size=32, max_steps=3, eval_steps=1, target=-0.999)
PARALLEL_CONFIGS = [
    {"general_share": 0.25},
    {"loss": "supcon", "general_share": 0.25, "retention": 0.5},
    {"lora_rank": 0},
]


@pytest.mark.slow
def test_two_processes_of_16_equal_one_of_32(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    both = []
    for name, command in (("one", [sys.executable]), ("two", LAUNCH)):
        script = tmp_path / f"{name}.py"
        script.write_text(
            PARALLEL.format(tests=os.path.dirname(__file__), folder=str(tmp_path / name))
        )
        done = subprocess.run(
            [*command, str(script)], capture_output=True, text=True, timeout=280, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
        both.append(
            [
                torch.load(tmp_path / name / str(i) / "out.pt", weights_only=True)
                for i in range(len(PARALLEL_CONFIGS))
            ]
        )
    for (one, history, evaluations, alone), (two, history2, evaluations2, together) in zip(
        *both, strict=True
    ):
        assert (alone, together) == (1, 2)
        assert [r["loss"] for r in history] == pytest.approx(
            [r["loss"] for r in history2], rel=1e-4
        )
        assert [r["tokens"] for r in history] == [r["tokens"] for r in history2]
        assert [r["step"] for r in evaluations] == [r["step"] for r in evaluations2]
        assert len(one[0]) == len(two[0]) > 0
        for name, value in one[
            0
        ].items():  # before any step: equal weights, so equal gradients, not just directions
            other = two[0].get(name, two[0].get(f"module.{name}"))
            assert torch.allclose(
                value, other, rtol=1e-3, atol=1e-6 + 1e-4 * value.abs().max().item()
            ), name


def test_only_the_first_process_writes_a_resume_point(tmp_path, monkeypatch):
    monkeypatch.setattr(
        TrainingArguments, "should_save", False
    )  # as the library's property is in every other process
    run(make_model(), FAST.replaced(max_steps=2, save_steps=1), work_dir=tmp_path)
    assert list(tmp_path.glob("checkpoint-2/rng_state*")) and not list(
        tmp_path.glob("checkpoint-*/*.safetensors*")
    )


def test_a_resume_point_cut_off_while_saving_is_set_aside(tmp_path):
    config = FAST.replaced(max_steps=2, save_steps=1)
    whole = run(make_model(), config, work_dir=tmp_path)
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    again = run(make_model(), config, work_dir=tmp_path)
    assert (tmp_path / "broken-checkpoint-2").is_dir() and (
        tmp_path / "checkpoint-2" / "trainer_state.json"
    ).exists()
    first, second = weights(whole.model), weights(again.model)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_families_can_be_refined():
    for family in FAMILIES:
        assert len(run(make_model(family), FAST.replaced(max_steps=1)).history) == 1
