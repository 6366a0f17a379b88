"""General ability: the harness's own numbers, perplexity by hand, changes paired item by item."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_model, make_tokenizer

from dcr.config import EvaluationConfig
from dcr.errors import DCRError
from dcr.evaluate import ability
from dcr.lm.chat import encode_examples

QUESTIONS = [
    ("what is the time ?", ["cat", "time", "dog"], "B"),
    ("how do i bake bread ?", ["bake bread", "fix bike", "kill time"], "A"),
    ("tell me about the dog .", ["cat file", "the dog", "plan trip"], "B"),
    ("list the game .", ["game", "story", "house"], "A"),
    ("who is it ?", ["it is me", "you", "the neighbour"], "C"),
    ("write python .", ["python", "bread", "cat"], "A"),
]


@pytest.fixture
def task_data(tmp_path, monkeypatch):
    path = tmp_path / "arc_easy.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "id": f"q{i}",
                    "question": q,
                    "choices": {"text": c, "label": ["A", "B", "C"]},
                    "answerKey": a,
                }
            )
            + "\n"
            for i, (q, c, a) in enumerate(QUESTIONS)
        )
    )
    monkeypatch.setattr(ability, "local_file", lambda task: path if task == "arc_easy" else None)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@torch.no_grad()
def by_hand(model, tokenizer, limit: int) -> list[float]:
    """Accuracy item by item: the choice with the largest log likelihood after the question."""
    hits = []
    for question, choices, answer in QUESTIONS[:limit]:
        head = f"Question: {question}\nAnswer:"
        scores = []
        for choice in choices:
            whole, start = (
                tokenizer(f"{head} {choice}")["input_ids"],
                len(tokenizer(head)["input_ids"]),
            )
            logits = model(input_ids=torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
            scores.append(logits[range(start - 1, len(whole) - 1), whole[start:]].sum().item())
        hits.append(float(np.argmax(scores) == "ABC".index(answer)))
    return hits


def test_harness_through_its_api_equals_counting_by_hand(task_data, tiny_llama, tiny_tokenizer):
    table = ability.run_harness(
        tiny_llama, tiny_tokenizer, ["arc_easy"], limit=5, folder=task_data / "tasks"
    )
    assert table[table["metric"] == "acc"]["hit"].tolist() == by_hand(tiny_llama, tiny_tokenizer, 5)
    assert set(table["metric"]) == {"acc", "acc_norm"} and table["item"].nunique() == 5


@pytest.mark.slow
def test_numbers_equal_the_harness_command_line(task_data, tmp_path):
    folder = tmp_path / "model"
    model, tokenizer = make_model(seed=3), make_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    table = ability.run_harness(model, tokenizer, ["arc_easy"], limit=6, folder=task_data / "tasks")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lm_eval",
            "run",
            "--model",
            "hf",
            "--model_args",
            f"pretrained={folder},dtype=float32",
            "--tasks",
            "dcr_arc_easy",
            "--include_path",
            str(task_data / "tasks"),
            "--limit",
            "6",
            "--device",
            "cpu",
            "--output_path",
            str(tmp_path / "out.json"),
        ],
        capture_output=True,
        text=True,
        timeout=280,
    )
    written = sorted(tmp_path.rglob("out*.json")) + sorted(tmp_path.rglob("results*.json"))
    assert written, done.stderr[-2000:]
    content = json.loads(written[0].read_text(encoding="utf-8"))["results"]["dcr_arc_easy"]
    for metric in ("acc", "acc_norm"):
        mine = table[table["metric"] == metric]["hit"].mean()
        assert mine == pytest.approx(content[f"{metric},none"])


@torch.no_grad()
def test_answer_losses_count_answer_tokens_only(tiny_llama, tiny_tokenizer):
    prompts = pd.DataFrame(
        {
            "id": ["a", "b", "c"],
            "text": ["list the dog .", "tell me what the time is in my house ?", "who is it ?"],
            "response": ["sure , the dog .", "time .", ""],
        }
    )
    table = ability.answer_losses(tiny_llama, tiny_tokenizer, prompts, max_tokens=64)
    rows, starts = encode_examples(tiny_tokenizer, prompts["text"][:2], prompts["response"][:2])
    assert table["item"].tolist() == ["a", "b"]
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        logits = tiny_llama(input_ids=torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        expected = -logits[range(start - 1, len(row) - 1), row[start:]].sum().item()
        assert table.loc[i, "loss"] == pytest.approx(expected, rel=1e-4)
        assert table.loc[i, "tokens"] == len(row) - start
    with pytest.raises(DCRError, match="no prompt has a response"):
        ability.answer_losses(tiny_llama, tiny_tokenizer, prompts.assign(response=""))


def items(method: str, hits, losses, seed: int = 0) -> pd.DataFrame:
    named = {"method": method, "seed": seed}
    hit = {"task": "arc_easy", "metric": "acc", "item": [f"q{i}" for i in range(len(hits))]}
    text = {"task": "held-out answers", "metric": "perplexity", "tokens": 10}
    text["item"] = [f"p{i}" for i in range(len(losses))]
    both = (
        pd.DataFrame({**named, **hit, "hit": hits}),
        pd.DataFrame({**named, **text, "loss": losses}),
    )
    return pd.concat(both, ignore_index=True)


def test_change_is_paired_with_the_base_model_over_seeds():
    rng = np.random.default_rng(0)
    base, losses = rng.random(200) < 0.6, rng.normal(20, 5, 50)
    worse = [base & (rng.random(200) < 0.8) for _ in range(2)]
    parts = [items("base", base.astype(float), losses, seed) for seed in range(2)]
    parts += [items("STL", w.astype(float), losses + 1, seed) for seed, w in enumerate(worse)]
    table = ability.ability_rows(pd.concat(parts), n_boot=400).set_index(["method", "metric"])
    acc, text = table.loc[("STL", "acc")], table.loc[("STL", "perplexity")]
    assert acc["value"] == pytest.approx(np.mean(worse)) and acc["seeds"] == 2
    assert acc["change"] == pytest.approx(np.mean(worse) - base.mean())
    assert acc["change_low"] < acc["change"] < acc["change_high"] < 0
    assert acc["change_high"] - acc["change_low"] < acc["high"] - acc["low"]  # pairing pays
    assert text["change"] == pytest.approx(math.exp(0.1)) and text["n"] == 50
    assert text["value"] == pytest.approx(math.exp((losses.mean() + 1) / 10))
    assert text["change_high"] - text["change_low"] < 1e-9
    alone = table.loc[("base", "acc")]
    assert alone[["change", "change_low", "change_high"]].tolist() == [0, 0, 0]


def test_both_forms_of_a_request_are_drawn_together():
    """Answers held out in both forms are no more requests than in one: as wide an interval."""
    losses = np.random.default_rng(0).normal(20, 8, 50)
    one = items("base", [1.0], losses)
    twins = one.query("metric == 'perplexity'").assign(item=lambda t: t["item"] + "~")
    tables = (ability.ability_rows(rows) for rows in (one, pd.concat([one, twins])))
    alone, both = (t.query("metric == 'perplexity'").iloc[0] for t in tables)
    assert both[["value", "low", "high"]].tolist() == pytest.approx(
        alone[["value", "low", "high"]].tolist()
    )


def test_one_model_is_measured_on_what_is_asked(task_data, tiny_llama, tiny_tokenizer):
    held = pd.DataFrame({"id": ["a"], "text": ["list the dog ."], "response": ["the dog ."]})
    options = EvaluationConfig(capability_tasks=("arc_easy",), capability_limit=2)
    measured = ability.measure_items(tiny_llama, tiny_tokenizer, held, options, folder=task_data)
    assert measured.groupby("metric").size().to_dict() == {"acc": 2, "acc_norm": 2, "perplexity": 1}
    facts = ability.task_facts(EvaluationConfig(capability_tasks=("arc_easy", "mmlu")))
    assert facts["mmlu"] == "hub" and len(facts["arc_easy"]) == 64
    with pytest.raises(DCRError, match="no held-out answers"):
        ability.measure_items(None, None, held.head(0), EvaluationConfig(), folder=task_data)


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(DCRError, match="'arc_eazy' is unknown; known: arc_easy"):
        ability.write_task_files(["arc_eazy"], tmp_path)
    one = items("STL", [1.0, 0.0], [2.0])
    with pytest.raises(DCRError, match="no results of 'base'"):
        ability.ability_rows(one)
    with pytest.raises(DCRError, match="hits of base, seed 0: none for 1 prompts"):
        ability.ability_rows(pd.concat([one, items("base", [1.0], [2.0])]))
