"""Generation: tokens equal the library's, stop tokens, resume, sampling, bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import FAMILIES, make_model

from dcr.data.files import read_jsonl
from dcr.errors import DCRError
from dcr.lm import generate as generation
from dcr.lm.chat import encode, render
from dcr.lm.generate import generate, inference_dtype


@pytest.fixture
def table(prompts) -> pd.DataFrame:
    return pd.DataFrame({"id": [f"p{i}" for i in range(len(prompts))], "text": prompts})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_tokens_equal_the_library_one_prompt_at_a_time(family, batch_size, tiny_tokenizer, table):
    model = make_model(family, seed=3)
    ours = generate(model, tiny_tokenizer, table, max_new_tokens=8, batch_size=batch_size)
    assert ours["prompt_id"].tolist() == table["id"].tolist()
    for row, text in zip(
        ours.itertuples(), render(tiny_tokenizer, table["text"].tolist()), strict=True
    ):
        batch = encode(tiny_tokenizer, [text])
        out = model.generate(**batch, max_new_tokens=8, do_sample=False)[
            0, batch["input_ids"].shape[1] :
        ]
        assert row.response == tiny_tokenizer.decode(out, skip_special_tokens=True).strip()
        assert row.n_tokens == len(out) and row.finish == (
            "eos" if out[-1] == tiny_tokenizer.eos_token_id else "length"
        )


def test_rows_stop_at_their_own_end_token(tiny_llama, tiny_tokenizer, table):
    """Force the stop token for one prompt's path: others go on to the limit."""
    eos = tiny_tokenizer.eos_token_id
    free = generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=6)
    with torch.no_grad():
        batch = encode(tiny_tokenizer, render(tiny_tokenizer, table["text"].tolist()[:1]))
        first = int(tiny_llama(**batch).logits[0, -1].argmax())
    tiny_llama.generation_config.eos_token_id = [eos, first]
    stopped = generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=6)
    assert stopped["n_tokens"][0] == 1 and stopped["finish"][0] == "eos"
    going = [
        i
        for i in range(len(table))
        if first not in tiny_tokenizer(free["response"][i])["input_ids"]
        and free["finish"][i] == "length"
    ]
    assert all(stopped["response"][i] == free["response"][i] for i in going)


def test_a_killed_run_loses_one_batch_and_resumes(
    tmp_path, tiny_llama, tiny_tokenizer, table, monkeypatch
):
    out, whole = (
        tmp_path / "g.jsonl",
        generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=4, batch_size=2),
    )
    run, calls = generation._Decoder.run, []

    def dies(self, batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, batch)

    monkeypatch.setattr(generation._Decoder, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=4, batch_size=2, out=out)
    with open(out, "a") as handle:
        handle.write('{"prompt_id": "p')  # torn by the kill
    monkeypatch.setattr(generation._Decoder, "run", run)
    again = generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=4, batch_size=2, out=out)
    assert again["response"].tolist() == whole["response"].tolist()
    assert len(read_jsonl(out)) == len(table) and len(calls) == 3


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
import pandas as pd
from conftest import make_model, make_tokenizer
from dcr.lm import generate as generation
run = generation._Decoder.run
def slow(self, batch):
    time.sleep(0.3)
    return run(self, batch)
generation._Decoder.run = slow
table = pd.DataFrame({"id": [f"p{i}" for i in range(40)], "text": ["how do i kill a process ?"] * 40})
generation.generate(make_model("llama"), make_tokenizer(), table, max_new_tokens=3, batch_size=2, out=sys.argv[1])
"""


def test_sigkill_loses_at_most_one_batch(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    """A real process killed without warning: every finished batch is in the file, and the next call does only the rest."""
    out = tmp_path / "g.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out), str(Path(__file__).parent)])
    try:
        deadline = time.monotonic() + 120
        while not (out.exists() and out.read_text().count("\n") >= 4):
            assert process.poll() is None and time.monotonic() < deadline, (
                "the run ended or stood still before it could be killed"
            )
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = len(read_jsonl(out))
    table = pd.DataFrame(
        {"id": [f"p{i}" for i in range(40)], "text": ["how do i kill a process ?"] * 40}
    )
    run, done = generation._Decoder.run, []
    monkeypatch.setattr(
        generation._Decoder, "run", lambda self, batch: done.extend(batch) or run(self, batch)
    )
    rows = generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=3, batch_size=2, out=out)
    assert (
        4 <= kept < 40
        and len(done) == 40 - kept
        and len(rows) == 40
        and rows["prompt_id"].is_unique
    )


def test_changed_parameters_are_refused_by_name(tmp_path, tiny_llama, tiny_tokenizer, table):
    out = tmp_path / "g.jsonl"
    generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=2, out=out)
    with pytest.raises(DCRError, match="max_new_tokens: 2 -> 3"):
        generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=3, out=out)
    assert json.loads((tmp_path / "g.jsonl.settings.json").read_text())["max_new_tokens"] == 2


def test_sampling_is_seeded(tiny_llama, tiny_tokenizer, table):
    first, again, other = (
        generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=6, temperature=2.0, seed=s)[
            "response"
        ].tolist()
        for s in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize(
    "change, message",
    [(lambda t: t.iloc[:0], "no prompts"), (lambda t: t.assign(id="same"), "occurs twice")],
)
def test_bad_tables(change, message, tiny_llama, tiny_tokenizer, table):
    with pytest.raises(DCRError, match=message):
        generate(tiny_llama, tiny_tokenizer, change(table))


def test_bad_settings(tiny_llama, tiny_tokenizer, table):
    with pytest.raises(DCRError, match="at least 1"):
        generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=0)
    with pytest.raises(DCRError, match="fit beside"):
        generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=8, max_length=12)
    with pytest.raises(DCRError, match="auto, float32"):
        inference_dtype("int8", "cpu")
