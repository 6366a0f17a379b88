"""Stage 1: what moves and what does not, shared prefix, retention, hold-out, target, bad input."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FAMILIES, make_model, make_tokenizer
from tiny_training import GENERAL, REFINE, refined, texts, weights
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from dcr.data.files import read_jsonl
from dcr.errors import DCRError
from dcr.lm.batches import common_prefix
from dcr.lm.blocks import decoder_layers
from dcr.train import contrast
from dcr.train.adapters import Lora, train_blocks
from dcr.train.contrast import PromptRows, StageOneModel, pooled_states, reference_states
from dcr.train.refine import hold_out, prompt_table


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_every_block_below_moves_and_none_above(family, rank):
    model = make_model(family)
    before = weights(model)
    result = refined(model, REFINE.replaced(lora_rank=rank))
    path = next(n for n, m in result.model.named_modules() if m is decoder_layers(result.model))
    changed = {n for n, p in result.model.named_parameters() if not torch.equal(p, before[n])}
    moved = {n.removeprefix(path + ".").split(".")[0] for n in changed if n.startswith(path + ".")}
    assert moved == {"0", "1"} and all(n.startswith(path + ".") for n in changed)
    assert result.layer == 2 and len(result.history) == 6 and result.stop_reason == "all steps done"


def test_it_pulls_the_classes_apart():
    result = refined(config=REFINE.replaced(max_steps=20, eval_steps=20))
    similarity = [row["cross_similarity"] for row in result.evaluations]
    assert similarity[-1] < similarity[0] - 0.2
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    first, again, other = (weights(refined(seed=s).model) for s in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_the_refined_model_is_an_ordinary_one_that_can_train_on(tmp_path):
    model = refined(config=REFINE.replaced(max_steps=1)).model
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any("lora" in n for n, _ in loaded.named_parameters())
    assert hasattr(refined(config=REFINE.replaced(max_steps=1), merge=False).model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())
    ids = torch.ones(1, 4, dtype=torch.long)
    model.train()(input_ids=ids, labels=ids).loss.backward()


def test_an_adapter_too_small_for_bf16_survives_the_merge():
    """W + ΔW in bf16 is W again where ΔW is under half a unit in the last place."""
    model = make_model().bfloat16()
    before = weights(model)
    config = REFINE.replaced(lr=1e-5, warmup=0.0, max_steps=2)
    merged = refined(model, config, precision="bf16").model
    name = "model.layers.0.mlp.up_proj.weight"
    now, then = merged.state_dict()[name], before[name]
    assert (now != then.float()).float().mean() > 0.9 and merged.dtype == torch.float32
    assert (now.bfloat16() == then).float().mean() > 0.9  # what adding in bf16 would have kept


@pytest.mark.parametrize("loss", ["supcon", "infonce", "triplet"])
def test_other_losses_train(loss):
    assert len(refined(config=REFINE.replaced(loss=loss, max_steps=2)).history) == 2


def test_retention_holds_general_prompts_still():
    loose, held = (
        refined(config=REFINE.replaced(max_steps=12, retention=w), general=GENERAL)
        for w in (1e-6, 30.0)
    )
    assert held.history[-1]["drift"] < 0.5 * loose.history[-1]["drift"]


def test_the_target_stops_early_and_says_why():
    result = refined(config=REFINE.replaced(max_steps=60, eval_steps=2, target=0.6))
    assert "reached 0.6" in result.stop_reason and len(result.history) < 60
    assert result.evaluations[-1]["cross_similarity"] <= 0.6
    assert all(r["cross_similarity"] > 0.6 for r in result.evaluations[:-1])


def test_a_stage_that_met_its_target_trains_no_more(tmp_path):
    config = REFINE.replaced(max_steps=60, eval_steps=2, target=0.6)
    first, again = (refined(config=config, work_dir=tmp_path) for _ in range(2))
    assert again.history == first.history and again.evaluations == first.evaluations
    assert again.stop_reason == first.stop_reason != "all steps done"
    kept, now = weights(first.model), weights(again.model)
    assert all(torch.equal(kept[n], now[n]) for n in kept)
    assert len(read_jsonl(tmp_path / "history.jsonl")) == len(first.history)


def test_weights_that_ran_away_are_one_clear_error_at_a_reading_too():
    config = REFINE.replaced(lr=1e30, eval_steps=1, target=-0.99, warmup=0.0)
    with pytest.raises(DCRError, match="hidden states are no longer finite at step 1 of 6"):
        refined(config=config)


def test_a_model_that_is_broken_before_training_is_not_told_to_train_slower():
    model = make_model()
    model.model.layers[0].mlp.up_proj.weight.data.fill_(float("inf"))
    with pytest.raises(DCRError, match="the model as it was given are not finite") as caught:
        refined(model)
    assert "lr" not in str(caught.value)


def test_tables_are_read_from_their_paths(tmp_path):
    paths = {k: tmp_path / f"{k}.csv" for k in texts()}
    for name, path in paths.items():
        pd.DataFrame({"text": texts()[name]}).to_csv(path, index=False)
    config = REFINE.replaced(max_steps=1)
    assert refined(config=config, **paths).history[0]["loss"] == pytest.approx(
        refined(config=config).history[0]["loss"]
    )


@pytest.mark.parametrize("batch", [16])
def test_held_out_readings_take_no_more_than_a_twentieth_of_the_stage(batch):
    config = REFINE.replaced(max_steps=90, batch_size=batch, eval_steps=1, lr=1e-5)
    result = refined(config=config)
    read = [r["step"] for r in result.evaluations]
    rows = 32 + 2 * max(2, round(0.2 * 20))  # 16 a class to fit on, a fifth of each class held out
    assert read[0] == 0 and read[-1] == 90 and len(read) >= batch / 4
    assert contrast.READING * rows * len(read) <= 0.05 * 90 * batch
    kept = [
        r["step"] for r in refined(config=config.replaced(target=-0.99, max_steps=4)).evaluations
    ]
    assert kept == [0, 1, 2, 3, 4]  # a stop rule reads when it was told to


def test_the_layer_is_chosen_by_the_probe_that_reads_the_classes_best(monkeypatch):
    result = refined(config=REFINE.replaced(layer="auto", max_steps=1))
    best = result.layers.sort_values(["auroc", "log_loss"], ascending=[False, True]).iloc[0]
    assert result.layer == best["layer"] and set(result.layers["layer"]) == {1, 2, 3}
    assert refined(config=REFINE.replaced(max_steps=1)).layers.empty


def test_the_sham_probe_reads_true_labels(monkeypatch):
    """Training sees shuffled labels; what is logged about harm is fitted on the true ones."""
    seen = {}
    measure = contrast.HeldOutWatcher.measure

    def keep(self, step):
        seen["watched"] = self.toxic[: self.fitted]
        seen["trained"] = self.trainer.rows.classes
        return measure(self, step)

    monkeypatch.setattr(contrast.HeldOutWatcher, "measure", keep)
    result = refined(config=REFINE.replaced(pairing="sham", max_steps=1))
    train, _ = hold_out(prompt_table(**texts()), REFINE.eval_share, 1)
    true = (train["label"] == "toxic").to_numpy().astype(int)
    assert (seen["watched"] == true).all() and (seen["trained"].numpy() != true).any()
    assert result.evaluations[0]["probe_auroc"] > 0.9  # words tell the classes apart at once


def test_hold_out_keeps_a_request_whole_and_shares_nothing():
    """Both members of a pair and its two forms (p3-q, p3-i) stand on one side."""
    rows = pd.DataFrame(
        {
            "text": [f"word{i // 4} deed{i // 4} {'ab'[i % 2]}{i // 2 % 2} ?" for i in range(80)],
            "pair_id": [f"p{i // 4}-{'qi'[i // 2 % 2]}" for i in range(80)],
        }
    )
    table = prompt_table(rows.iloc[::2], rows.iloc[1::2], ["general one"])
    train, held = hold_out(table, 0.2, seed=0)
    pairs = [set(t["pair_id"].str.replace(r"-[qi]$", "", regex=True)) - {""} for t in (train, held)]
    assert not pairs[0] & pairs[1] and len(train) + len(held) == 81
    assert held.groupby("pair_id").size().eq(2).all()
    assert (held["label"] == "toxic").sum() == (held["label"] == "seemingly_toxic").sum() == 8


def test_lists_series_and_frames_are_the_same_prompts():
    given = texts()
    as_series = {k: pd.Series(v) for k, v in given.items()}
    as_frames = {k: pd.DataFrame({"text": v, "label": k}) for k, v in given.items()}
    first, *others = (
        refined(config=REFINE.replaced(max_steps=2), **g).history[-1]["loss"]
        for g in (given, as_series, as_frames, {k: np.array(v) for k, v in given.items()})
    )
    assert others == [first] * 3


@pytest.mark.parametrize(
    "change, config, message",
    [
        ({"toxic": []}, {}, "toxic: 0 prompts given"),
        ({"toxic": ["how ?"] * 20}, {}, "toxic: 20 prompts given, 1 of them different"),
        ({"toxic": ["a", "b", "c"]}, {}, "batch needs"),
        ({"toxic": "how do i kill ?"}, {}, "one string"),
        ({"toxic": ["kill it ?", None]}, {}, "toxic.*1"),
        ({"seemingly_toxic": texts()["toxic"]}, {}, "is also seemingly toxic prompt"),
        ({"seemingly_toxic": None}, {}, "seemingly_toxic: 0 prompts given"),
        ({}, {"layer": 9}, "out of range.*4 blocks"),
        ({}, {"lora_targets": ("nope",)}, "match no linear layer.*q_proj"),
        ({}, {"lora_targets": ("q_proj", "vproj")}, "lora_targets: vproj match no linear layer"),
        (
            {n: [f"how do i {n} the cat {i} ?" for i in "ab"] for n in texts()},
            {},
            "make 1 toxic and 1 seemingly_toxic requests in all",
        ),
        ({"toxic": Path("no.csv")}, {}, "no.csv"),
        ({}, {"max_length": 8}, "toxic prompt 'toxic-.*has .* tokens, the limit is 8: 'how do i"),
        ({"precision": "half"}, {}, "auto"),
    ],
)
def test_bad_input_is_one_clear_error(change, config, message):
    with pytest.raises(DCRError, match=message):
        refined(config=REFINE.replaced(**config), **change)


def test_leakage_is_reported_before_training(caplog):
    again = [texts()["toxic"][3].upper(), "how do i bake the dog for 1 today .", "what is this ?"]
    with caplog.at_level("WARNING", logger="dcr"):
        twice = [*texts()["toxic"], again[0].title()]  # one evaluation prompt, met in two rows
        result = refined(config=REFINE.replaced(max_steps=1), toxic=twice, evaluation=again)
    assert ("evaluation-0000", "exact") in set(
        zip(result.leakage["test_id"], result.leakage["kind"], strict=True)
    )
    assert "2 of 3 evaluation prompts overlap with training prompts (1 exactly)" in caplog.text
    plain = refined(config=REFINE.replaced(max_steps=1), evaluation=["what is this ?"])
    assert plain.leakage.empty


def gradient(stage: StageOneModel, rows: list[list[int]], max_tokens: int = 10**6) -> torch.Tensor:
    """Of a smooth function of the pooled states; in the stage's own precision."""
    stage.zero_grad()
    unit = torch.nn.functional.normalize(stage(rows, max_tokens))  # [rows, hidden]
    (unit @ unit.T).pow(3).sum().backward()
    return torch.cat([p.grad.flatten() for p in stage.parameters() if p.grad is not None])


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_the_shared_prefix_and_micro_batches_leave_the_gradient_alone(family, pooling, monkeypatch):
    rows = PromptRows(prompt_table(**texts(8)), make_tokenizer(), 64).ids
    rows = [[3] * 10 + row[: 5 + i % 4] for i, row in enumerate(rows)]
    assert common_prefix(rows) >= 10
    trainable = train_blocks(make_model(family), 0, 3, Lora(0, 1))
    stage = StageOneModel(trainable.double(), 3, pooling)
    shared, cut = gradient(stage, rows), gradient(stage, rows, max_tokens=60)
    monkeypatch.setattr(contrast, "common_prefix", lambda rows: 0)
    plain = gradient(stage, rows)
    assert (shared - plain).norm() < 1e-5 * plain.norm()
    assert (cut - plain).norm() < 1e-5 * plain.norm()


def test_micro_batches_keep_no_more_than_their_own_activations(monkeypatch):
    """Over the bound every row runs forward twice (once without keeping anything), else once."""
    calls, forward = [], LlamaMLP.forward
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: calls.append(x.shape[:2].numel()) or forward(self, x)
    )
    rows = PromptRows(prompt_table(**texts(8)), make_tokenizer(), 64).ids
    stage = StageOneModel(train_blocks(make_model(), 0, 2, Lora(4, 1)), 2, "last")
    gradient(stage, rows)
    whole, calls[:] = sum(calls), []
    gradient(stage, rows, max_tokens=60)
    assert sum(calls) == pytest.approx(2 * whole, rel=0.1) and max(calls) <= 60


def test_accumulated_gradient_is_the_mean_of_the_batches():
    config = REFINE.replaced(lr=0.0, retention=0.5, warmup=0.0)  # both batches meet equal weights
    single = refined(config=config.replaced(max_steps=2), general=GENERAL).history
    double = refined(config=config.replaced(max_steps=1, accumulation=2), general=GENERAL).history
    assert double[0]["loss"] == pytest.approx((single[0]["loss"] + single[1]["loss"]) / 2)
    assert double[0]["tokens"] == single[1]["tokens"]


@pytest.mark.parametrize("rank", [4, 0])
def test_gradient_checkpointing_changes_nothing_but_memory(rank, monkeypatch):
    calls, forward = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(1) or forward(self, x))
    config = REFINE.replaced(lora_rank=rank, max_steps=3)
    plain = refined(config=config)
    once, calls[:] = len(calls), []
    saving = refined(config=config.replaced(gradient_checkpointing=True))
    assert len(calls) > 1.2 * once or rank == 0
    first, second = weights(plain.model), weights(saving.model)
    assert all(torch.allclose(first[n], second[n], atol=1e-5) for n in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_trains_near_fp32(dtype):
    plain = refined(config=REFINE.replaced(max_steps=20))
    mixed = refined(make_model().to(dtype), REFINE.replaced(max_steps=20), precision="bf16")
    first, second = (r.evaluations[-1]["cross_similarity"] for r in (plain, mixed))
    assert second == pytest.approx(first, abs=0.3)


def test_whole_weights_train_in_fp32_and_adapters_leave_the_base_in_bf16():
    half = lambda: make_model().bfloat16()  # noqa: E731
    whole = train_blocks(half(), 0, 2, Lora(0, 1), precision="bf16")
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    adapted = train_blocks(half(), 0, 2, Lora(4, 1), precision="bf16")
    kinds = {p.requires_grad: p.dtype for p in adapted.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_held_out_states_do_not_depend_on_batch_size_or_padding():
    rows = PromptRows(prompt_table(**texts(8)), make_tokenizer(), 64)
    stage = StageOneModel(make_model(), 3, "last")
    one, many = (pooled_states(stage, rows, range(16), max_tokens=n) for n in (1, 10**6))
    assert torch.allclose(one, many, atol=1e-5)


def test_references_are_the_base_models_without_a_second_copy():
    model = make_model()
    rows = PromptRows(prompt_table(**texts(4), general=GENERAL), make_tokenizer(), 64)
    base = pooled_states(StageOneModel(model, 2, "last"), rows, range(8, len(rows.ids)))
    adapted = train_blocks(model, 0, 2, Lora(4, 8))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
    stage = StageOneModel(adapted, 2, "last")
    reference = reference_states(stage, rows)
    assert torch.allclose(reference[8:], base, atol=1e-5) and not reference[:8].any()
    moved = pooled_states(stage, rows, range(8, len(rows.ids)))
    assert not torch.allclose(moved, base, atol=1e-2)


def test_stage_one_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code = next(c for c in re.findall(r"```python\n(.*?)```", readme, re.S) if "dcr.refine(" in c)
    snippet = code[: code.index("\n", code.index("save_pretrained"))]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dcr.load_model", lambda name: (make_model(), make_tokenizer()))
    given = texts(24)
    exec(snippet, {"toxic": given["toxic"], "harmless": given["seemingly_toxic"]})
    loaded = AutoModelForCausalLM.from_pretrained("refined")
    assert {n for n, _ in loaded.named_parameters()} == set(weights(make_model()))
    assert "auto_map" not in (tmp_path / "refined" / "config.json").read_text()  # needs no code


@pytest.mark.parametrize("family", FAMILIES)
def test_families_can_be_refined(family):
    assert len(refined(make_model(family), REFINE.replaced(max_steps=1)).history) == 1
