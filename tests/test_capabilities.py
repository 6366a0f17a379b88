"""General ability: the harness's own numbers, perplexity by hand, paired change against the base model."""

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
from test_comparisons import experiments  # noqa: F401 (a fixture)

from dcr.errors import DCRError
from dcr.tables import ability as capabilities

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
    monkeypatch.setattr(
        capabilities, "local_file", lambda task: path if task == "arc_easy" else None
    )
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
    table = capabilities.run_harness(
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
    table = capabilities.run_harness(
        model, tokenizer, ["arc_easy"], limit=6, folder=task_data / "tasks"
    )
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
    numbers = capabilities.harness_numbers(written[0])
    for metric in ("acc", "acc_norm"):
        assert table[table["metric"] == metric]["hit"].mean() == pytest.approx(
            numbers[f"dcr_arc_easy {metric}"]
        )


@torch.no_grad()
def test_answer_losses_count_answer_tokens_only(tiny_llama, tiny_tokenizer):
    from dcr.lm.chat import render

    prompts = pd.DataFrame(
        {
            "id": ["a", "b"],
            "text": ["list the dog .", "tell me what the time is in my house ?"],
            "response": ["sure , the dog .", "time ."],
        }
    )
    table = capabilities.answer_losses(tiny_llama, tiny_tokenizer, prompts, batch_size=2)
    for i, row in prompts.iterrows():
        head = tiny_tokenizer(render(tiny_tokenizer, [row["text"]])[0], add_special_tokens=False)[
            "input_ids"
        ]
        whole = tiny_tokenizer(
            render(tiny_tokenizer, [row["text"]], [row["response"]])[0], add_special_tokens=False
        )["input_ids"]
        logits = tiny_llama(input_ids=torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
        expected = -logits[range(len(head) - 1, len(whole) - 1), whole[len(head) :]].sum().item()
        assert table.loc[i, "loss"] == pytest.approx(expected, rel=1e-4) and table.loc[
            i, "tokens"
        ] == len(whole) - len(head)
    with pytest.raises(DCRError, match="no prompt has a response"):
        capabilities.answer_losses(tiny_llama, tiny_tokenizer, prompts.assign(response=""))


def items(hits, losses) -> pd.DataFrame:
    acc = pd.DataFrame({"task": "arc_easy", "metric": "acc", "item": range(len(hits)), "hit": hits})
    return pd.concat(
        [
            acc,
            pd.DataFrame(
                {
                    "task": "held-out answers",
                    "metric": "perplexity",
                    "item": [f"p{i}" for i in range(len(losses))],
                    "loss": losses,
                    "tokens": 10,
                }
            ),
        ],
        ignore_index=True,
    )


def test_change_is_paired_with_the_base_model():
    rng = np.random.default_rng(0)
    base, losses = rng.random(200) < 0.6, rng.normal(20, 5, 50)
    worse = base & (rng.random(200) < 0.9)
    table = capabilities.ability_rows(
        {"base": items(base.astype(float), losses), "STL": items(worse.astype(float), losses + 1)},
        n_boot=400,
    ).set_index(["method", "metric"])
    acc, ppl = table.loc[("STL", "acc")], table.loc[("STL", "perplexity")]
    assert (
        acc["change"] == pytest.approx(worse.mean() - base.mean())
        and acc["change_low"] < acc["change"] < acc["change_high"] < 0
    )
    assert (
        acc["change_high"] - acc["change_low"] < acc["high"] - acc["low"]
    )  # pairing removes what the items share
    assert ppl["change"] == pytest.approx(math.exp(0.1)) and ppl["value"] == pytest.approx(
        math.exp((losses.mean() + 1) / 10)
    )
    assert (
        ppl["change_high"] - ppl["change_low"] < 1e-9 and table.loc[("base", "acc"), "change"] == 0
    )


def test_an_experiment_is_read_beside_any_of_its_methods(experiments):  # noqa: F811
    e = experiments[0]
    base, other = capabilities.capability_table(e), capabilities.capability_table(e, "STL")
    assert (
        base.set_index("method").loc["base", "change"] == 1
        and other.set_index("method").loc["STL", "change"] == 1
    )
    ratio = other.set_index("method")["value"]
    assert other.set_index("method").loc["base", "change"] == pytest.approx(
        ratio["base"] / ratio["STL"]
    )
    assert set(e.read_table("capabilities_STL")["method"]) == {"base", "STL"} and len(
        e.read_table("capabilities")
    ) == len(base)


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(DCRError, match="'arc_eazy' is unknown; known: arc_easy"):
        capabilities.write_task_files(["arc_eazy"], tmp_path)
    one = items([1.0, 0.0], [2.0])
    with pytest.raises(DCRError, match="no results of 'base'"):
        capabilities.ability_rows({"STL": one})
    with pytest.raises(DCRError, match="measured on other items"):
        capabilities.ability_rows({"base": one, "STL": items([1.0], [2.0])})
