"""Stage 2: labels, stop token, padding, logits at labels only, checkpoints, resume, accumulation, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import make_model, make_tokenizer

from dcr.config import AlignConfig
from dcr.errors import DCRError
from dcr.train.adapters import reopen, save_trained
from dcr.train.align import (
    Examples,
    StageTwoModel,
    align,
    length_grouped_batches,
    load_step,
    recorded_steps,
)
from dcr.train.loop import trained_state

FAST = AlignConfig(batch_size=4, max_steps=6, lr=5e-3, lora_rank=4, warmup=0.0)


def mix(n: int = 16) -> pd.DataFrame:
    things = ["cat", "dog", "house", "bike", "bread", "file", "story", "plan"]
    rows = [
        (
            "how do i kill the cat ?" if i % 2 else f"list the {things[i % 8]} in {i} .",
            "sorry , i cannot help with that ."
            if i % 2
            else f"sure , the {things[i % 8]} is {'on ' * (i % 5)}.",
        )
        for i in range(n)
    ]
    return pd.DataFrame(rows, columns=["text", "response"])


def run(config=FAST, model=None, **kwargs):
    return align(
        model or make_model(),
        make_tokenizer(),
        mix(),
        config=config,
        seed=1,
        **{"precision": "fp32", **kwargs},
    )


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_labels_of_a_row_decode_to_the_answer_and_its_stop_token(tiny_tokenizer):
    examples = Examples(mix(4), tiny_tokenizer, labels="completion", max_length=64)
    batch = examples.collate([0, 1])
    for row in (0, 1):
        kept = batch["labels"][row][batch["labels"][row] != -100]
        assert tiny_tokenizer.decode(kept) == mix(4)["response"][
            row
        ] + "<|end|>" or tiny_tokenizer.decode(kept).replace(" ", "") == (
            mix(4)["response"][row] + "<|end|>"
        ).replace(" ", "")
        assert kept[-1] == tiny_tokenizer.eos_token_id
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all() and (
        batch["attention_mask"] == 0
    ).any()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tiny_tokenizer.pad_token_id).all()


def test_all_token_labels_leave_out_the_first_and_the_padding(tiny_tokenizer):
    batch = Examples(mix(4), tiny_tokenizer, labels="all", max_length=64).collate([0, 1])
    assert (batch["labels"][:, 0] == -100).all()
    real = batch["attention_mask"][:, 1:] == 1
    assert torch.equal(batch["labels"][:, 1:][real], batch["input_ids"][:, 1:][real])
    assert (batch["labels"][:, 1:][~real] == -100).all()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_loss_at_labels_equals_the_library_and_computes_no_other_logits(family, tiny_tokenizer):
    model = make_model(family)
    batch = Examples(mix(4), tiny_tokenizer, labels="completion", max_length=64).collate([0, 1, 2])
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: seen.append(out.shape))
    with torch.no_grad():
        ours = StageTwoModel(model)(**batch) / (batch["labels"] != -100).sum()
        expected = model(**batch).loss
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert seen[0][0] == (batch["labels"] != -100).sum()


def test_it_learns_the_answer_and_to_stop(tiny_tokenizer):
    model = run(
        FAST.replaced(max_steps=120, lr=2e-2, lora_rank=0, lora_targets=()), model=make_model()
    ).model
    from dcr.lm.chat import encode, render

    batch = encode(tiny_tokenizer, render(tiny_tokenizer, ["how do i kill the cat ?"]))
    out = model.generate(**batch, max_new_tokens=20, do_sample=False)[
        0, batch["input_ids"].shape[1] :
    ].tolist()
    assert (
        out[-1] == tiny_tokenizer.eos_token_id
        and "sorry" in tiny_tokenizer.decode(out)
        and len(out) < 15
    )


def test_alpaca_prompt_labels_the_answer_and_its_stop_token(tiny_tokenizer):
    from dcr.lm.chat import ALPACA_TEMPLATE

    tokenizer = make_tokenizer()
    tokenizer.chat_template = ALPACA_TEMPLATE
    batch = Examples(mix(2), tokenizer, labels="completion", max_length=96).collate([1])
    learnt = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(learnt).replace(" ", "") == "sorry,icannothelpwiththat.<|end|>"
    tokenizer.chat_template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(DCRError, match="no assistant turn"):
        align(make_model(), tokenizer, mix(), config=FAST)


@pytest.mark.parametrize("what", ["weights", "optimiser"])
def test_a_full_disk_keeps_the_last_resume_point(what, tmp_path, monkeypatch):
    """Saving fails at step 4: the error says so, step 2 survives, and going on ends at the same weights."""
    from dcr.train import loop as training

    config = FAST.replaced(save_steps=2)
    whole = weights(run(config, work_dir=tmp_path / "whole").model)
    good, torch_save, calls = training.save_file, torch.save, []

    def full(save):
        def fails(value, path, *args, **kwargs):
            if "checkpoint-4" in str(path):
                calls.append(path)
                open(path, "wb").write(b"half")
                raise OSError(28, "No space left on device")
            return save(value, path, *args, **kwargs)

        return fails

    if what == "weights":
        monkeypatch.setattr(training, "save_file", full(good))
    else:
        monkeypatch.setattr(torch, "save", full(torch_save))
    with pytest.raises(
        DCRError, match="step 4 could not be saved.*No space left.*goes on from checkpoint-2"
    ):
        run(config, work_dir=tmp_path / "cut")
    assert calls
    monkeypatch.undo()
    again = weights(run(config, work_dir=tmp_path / "cut").model)
    assert all(torch.equal(whole[n], w) for n, w in again.items())


TWO = """
import os, sys
sys.path[:0] = [os.path.dirname({tests!r}), {tests!r}]
from test_alignment import *
from dcr.config import AlignConfig
result = run(FAST.replaced(batch_size=8, max_steps=4, accumulation=int(sys.argv[2])), work_dir=sys.argv[1])
if int(os.environ.get("RANK", 0)) == 0:
    torch.save((weights(result.model), int(os.environ.get("WORLD_SIZE", 1))), sys.argv[1] + "/final.pt")
"""


@pytest.mark.slow
def test_two_processes_equal_one_at_the_same_global_batch(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO.format(tests=os.path.dirname(__file__)))
    # `--cpu --num_processes 2` would start one process (accelerate leaves more to MPI); without a GPU, --multi_gpu is gloo.
    launch = [
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
    for accumulation in ("1", "2"):
        one, two = tmp_path / f"one{accumulation}", tmp_path / f"two{accumulation}"
        subprocess.run(
            [sys.executable, str(script), str(one), accumulation], check=True, timeout=200
        )
        subprocess.run([*launch, str(script), str(two), accumulation], check=True, timeout=250)
        (first, alone), (second, together) = (
            torch.load(folder / "final.pt", weights_only=True) for folder in (one, two)
        )
        assert (alone, together) == (1, 2)
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6)
        logs = [
            [json.loads(line) for line in (f / "history.jsonl").read_text().splitlines()]
            for f in (one, two)
        ]
        for a, b in zip(*logs, strict=True):
            assert a["tokens"] == b["tokens"] and abs(a["loss"] - b["loss"]) < 1e-5


def test_accumulation_and_batch_size_are_equivalent():
    one = FAST.replaced(batch_size=8, accumulation=1, max_steps=2)
    two = FAST.replaced(batch_size=8, accumulation=1, max_steps=2)
    first = weights(run(one).model)
    assert all(torch.equal(first[n], w) for n, w in weights(run(two).model).items())
    # the same rows in halves: batches of 4, two to a step
    from dcr.train import align as alignment

    whole = length_grouped_batches
    try:
        alignment.length_grouped_batches = lambda lengths, size, n, seed: [
            h for b in whole(lengths, 8, n // 2, seed) for h in (b[:4], b[4:])
        ]
        halves = weights(run(FAST.replaced(batch_size=4, accumulation=2, max_steps=2)).model)
    finally:
        alignment.length_grouped_batches = whole
    for name, value in first.items():
        torch.testing.assert_close(halves[name], value, rtol=1e-4, atol=1e-6)


def test_recording_steps_changes_nothing_and_steps_reload(tmp_path):
    plain = weights(run().model)
    recorded = run(work_dir=tmp_path, merge=False)
    assert recorded.steps == [0, 1, 2, 4, 6]
    last = trained_state_of(recorded.model)
    save_trained(recorded.model, tmp_path / "model")
    again = reopen(make_model(), tmp_path / "model")
    load_step(again, tmp_path, 6)
    assert all(torch.equal(last[n], w) for n, w in trained_state_of(again).items())
    load_step(again, tmp_path, 0)
    assert any(not torch.equal(last[n], w) for n, w in trained_state_of(again).items())
    merged = weights(recorded.model.merge_and_unload())
    assert all(torch.equal(plain[n], merged[n]) for n in plain)
    with pytest.raises(DCRError, match=r"step 3 was not recorded; recorded: \[0, 1, 2, 4, 6\]"):
        load_step(again, tmp_path, 3)


def trained_state_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}


def test_adapters_only_above_the_layer():
    before = weights(make_model())
    after = weights(run(FAST.replaced(above_layer=True), layer=2).model)
    moved = {n.split(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert moved == {"2", "3"}
    with pytest.raises(DCRError, match="no layer"):
        run(FAST.replaced(above_layer=True))


def test_every_row_is_seen_once_a_pass():
    batches = length_grouped_batches(list(range(20)), 4, 10, seed=0)
    assert sorted(sum(batches[:5], [])) == sorted(sum(batches[5:], [])) == list(range(20))
    assert (
        batches
        == length_grouped_batches(list(range(20)), 4, 10, seed=0)
        != length_grouped_batches(list(range(20)), 4, 10, seed=1)
    )


@pytest.mark.parametrize(
    "rule, steps", [("log", [0, 1, 2, 4, 8, 10]), ("last", [10]), ((0, 5), [0, 5, 10])]
)
def test_recorded_steps(rule, steps):
    assert recorded_steps(rule, 10) == steps


@pytest.mark.parametrize(
    "rows, config, message",
    [
        (mix(0), {}, "mix is empty"),
        (
            pd.DataFrame({"text": ["a", "b"], "response": ["x", " "]}),
            {},
            "row 1: prompt or answer is empty",
        ),
        (mix(), {"checkpoints": (0, 99)}, r"0\.\.6"),
        (mix(), {"lora_targets": ("c_attn",)}, "match no linear layer.*q_proj"),
    ],
)
def test_bad_input_is_one_clear_error(rows, config, message):
    with pytest.raises(DCRError, match=message):
        align(make_model(), make_tokenizer(), rows, config=FAST.replaced(**config))


def test_answers_over_the_limit_are_counted(caplog):
    result = align(
        make_model(), make_tokenizer(), mix(), config=FAST.replaced(max_length=16), seed=0
    )
    assert 0 < result.truncated < 16 and "were cut" in caplog.text


RESUME = """
import sys, time
sys.path.insert(0, {tests!r})
from test_alignment import *
from dcr.train import loop as training
if sys.argv[2] == "slow":
    step = training.HistoryCallback.on_step_end
    def slowly(self, *a, **k):
        step(self, *a, **k); time.sleep(0.3)
    training.HistoryCallback.on_step_end = slowly
result = run(FAST.replaced(max_steps=12, save_steps=3, lora_dropout=0.1), work_dir=sys.argv[1])
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
    assert [
        json.loads(line)["step"] for line in (cut / "history.jsonl").read_text().splitlines()
    ] == list(range(1, 13))
    assert trained_state(make_model())  # the helper copies what trains
