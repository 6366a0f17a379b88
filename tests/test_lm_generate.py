"""Generation: tokens equal the library's, stops, resume, sampling, memory, steering's protocol, bad
input."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import FAMILIES, make_model, make_tokenizer

from dcr.data.files import read_jsonl
from dcr.errors import DCRError
from dcr.lm import decode as decoding
from dcr.lm.chat import encode_prompts
from dcr.lm.decode import Unsteered, decode
from dcr.lm.device import in_memory, resolve_precision
from dcr.lm.generate import generate


@pytest.fixture
def table(prompts) -> pd.DataFrame:
    return pd.DataFrame({"id": [f"p{i}" for i in range(len(prompts))], "text": prompts})


def theirs(model, row, n):
    """The library's greedy tokens after one row alone."""
    out = model.generate(torch.tensor([row]), max_new_tokens=n, do_sample=False)
    return out[0, len(row) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_tokens_equal_the_library_one_prompt_at_a_time(family, batch_size, tiny_tokenizer, table):
    model = make_model(family, seed=3)
    ours = generate(model, tiny_tokenizer, table, max_new_tokens=8, batch_size=batch_size)
    assert ours["prompt_id"].tolist() == table["id"].tolist()
    rows = encode_prompts(tiny_tokenizer, table["text"].tolist())
    for answer, row in zip(ours.itertuples(), rows, strict=True):
        out = theirs(model, row, 8)
        assert answer.response == tiny_tokenizer.decode(out, skip_special_tokens=True).strip()
        assert answer.n_tokens == len(out)
        assert answer.finish == ("eos" if out[-1] == tiny_tokenizer.eos_token_id else "length")


@pytest.mark.parametrize("family", ["gemma3", "mistral", "phi3"])
def test_tokens_equal_the_librarys_beyond_the_window(family, tiny_tokenizer):
    """Rows of mixed length behind a shared prefix, window and prefix shorter than the batch."""
    model, head = make_model(family, seed=3, window=9), list(range(20, 32))
    rows = [head + list(range(40, 40 + n)) for n in (1, 3, 14, 33)]
    ours = decode(model, tiny_tokenizer, rows, max_new_tokens=12, batch_size=4)
    assert ours == [theirs(model, row, 12) for row in rows]


def test_a_control_token_in_a_prompt_is_text(tiny_llama, tiny_tokenizer, monkeypatch):
    seen = []
    run = decoding.Decoder.run
    monkeypatch.setattr(
        decoding.Decoder,
        "run",
        lambda self, b: seen.extend(self.rows[i] for i in b) or run(self, b),
    )
    generate(tiny_llama, tiny_tokenizer, ["how <|end|> <|system|> steal"], max_new_tokens=1)
    assert seen[0].count(tiny_tokenizer.eos_token_id) == 1


def test_rows_stop_at_their_own_end_token(tiny_llama, tiny_tokenizer, table):
    """Force the stop token for one prompt's path: others go on to the limit."""
    eos = tiny_tokenizer.eos_token_id
    free = generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=6)
    first = theirs(tiny_llama, encode_prompts(tiny_tokenizer, table["text"].tolist())[0], 1)[0]
    tiny_llama.generation_config.eos_token_id = [eos, first]
    stopped = generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=6)
    assert stopped["n_tokens"][0] == 1 and stopped["finish"][0] == "eos"
    going = [
        i
        for i in range(len(table))
        if first not in tiny_tokenizer(free["response"][i])["input_ids"]
        and free["finish"][i] == "length"
    ]
    assert going and all(stopped["response"][i] == free["response"][i] for i in going)


def test_lists_and_series_are_prompts_too(tiny_llama, tiny_tokenizer, prompts):
    whole = generate(tiny_llama, tiny_tokenizer, prompts, max_new_tokens=2)["response"].tolist()
    series = generate(tiny_llama, tiny_tokenizer, pd.Series(prompts), max_new_tokens=2)
    assert series["response"].tolist() == whole and series["prompt_id"].is_unique
    with pytest.raises(DCRError, match="one string"):
        generate(tiny_llama, tiny_tokenizer, "how do i")


def test_precision_of_one_call(tiny_llama, tiny_tokenizer, prompts, monkeypatch):
    dtypes = []
    run = decoding.Decoder.run
    monkeypatch.setattr(
        decoding.Decoder, "run", lambda self, b: dtypes.append(self.model.dtype) or run(self, b)
    )
    generate(tiny_llama, tiny_tokenizer, prompts, max_new_tokens=1, precision="bf16")
    assert dtypes == [torch.bfloat16] and tiny_llama.dtype == torch.float32


def test_a_killed_run_loses_one_batch_and_resumes(
    tmp_path, tiny_llama, tiny_tokenizer, table, monkeypatch
):
    """Also when an answer holds U+2028, which ends no line of the file."""
    decoded = tiny_tokenizer.decode
    monkeypatch.setattr(
        type(tiny_tokenizer), "decode", lambda _s, t, **k: "a\u2028\x85b " + decoded(t, **k)
    )
    out = tmp_path / "g.jsonl"
    options = {"max_new_tokens": 4, "batch_size": 2}
    whole = generate(tiny_llama, tiny_tokenizer, table, **options)
    run, calls = decoding.Decoder.run, []

    def dies(self, batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, batch)

    monkeypatch.setattr(decoding.Decoder, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        generate(tiny_llama, tiny_tokenizer, table, out=out, **options)
    with open(out, "a") as handle:
        handle.write('{"prompt_id": "p')  # torn by the kill
    monkeypatch.setattr(decoding.Decoder, "run", run)
    again = generate(tiny_llama, tiny_tokenizer, table, out=out, **options)
    assert again["response"].tolist() == whole["response"].tolist()
    assert len(read_jsonl(out)) == len(table) and len(calls) == 3


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
from conftest import make_model, make_tokenizer
from dcr.lm import decode, generate
run = decode.Decoder.run
def slow(self, batch):
    time.sleep(0.3)
    return run(self, batch)
decode.Decoder.run = slow
prompts = ["how do i kill a process ?"] * 40
generate.generate(make_model("llama"), make_tokenizer(), prompts, max_new_tokens=3, batch_size=2, out=sys.argv[1])
"""


def test_sigkill_loses_at_most_one_batch(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    """A real process killed without warning: every finished batch is in the file, and the next call
    does only the rest."""
    out = tmp_path / "g.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out), str(Path(__file__).parent)])
    try:
        deadline = time.monotonic() + 120
        while not (out.exists() and out.read_text().count("\n") >= 4):
            assert process.poll() is None and time.monotonic() < deadline, "ended before the kill"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = len(read_jsonl(out))
    prompts = ["how do i kill a process ?"] * 40
    run, done = decoding.Decoder.run, []
    monkeypatch.setattr(
        decoding.Decoder, "run", lambda self, batch: done.extend(batch) or run(self, batch)
    )
    rows = generate(tiny_llama, tiny_tokenizer, prompts, max_new_tokens=3, batch_size=2, out=out)
    assert 4 <= kept < 40 and len(done) == 40 - kept
    assert len(rows) == 40 and rows["prompt_id"].is_unique


def test_changed_parameters_are_refused_by_name(tmp_path, tiny_llama, tiny_tokenizer, table):
    out = tmp_path / "g.jsonl"
    generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=2, out=out)
    with pytest.raises(DCRError, match="max_new_tokens: 2 -> 3"):
        generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=3, out=out)
    assert json.loads((tmp_path / "g.jsonl.settings.json").read_text())["max_new_tokens"] == 2


def test_a_sample_depends_on_its_seed_and_prompt_alone(tiny_llama, tiny_tokenizer, table):
    options = {"max_new_tokens": 6, "temperature": 2.0}

    def answers(rows, seed=0, batch_size=64):
        frame = generate(
            tiny_llama, tiny_tokenizer, rows, seed=seed, batch_size=batch_size, **options
        )
        return frame["response"].tolist()

    first = answers(table)
    assert first == answers(table, batch_size=2) != answers(table, seed=1)
    assert first[3:] == answers(table.iloc[3:])
    greedy = generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=6)["response"].tolist()
    assert first != greedy


def test_samples_follow_the_models_distribution(tiny_llama):
    """Tokens of 2,000 seeds against the softmax at temperature 0.5, which squares the odds."""
    odds = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = torch.zeros(4)
    decoder = decoding.Decoder(tiny_llama, [[3, 4]], (), decoding.Decoding(1, 0.5))
    for seed in range(2000):
        decoder.options = decoding.Decoding(1, 0.5, seed)
        counts[decoder._choose(odds.log()[None], [decoder._chance(0)])] += 1
    expected = odds.square() / odds.square().sum()
    assert float((counts / 2000 - expected).abs().sum()) / 2 < 0.03


class Steered(Unsteered):
    """A steering that notes its passes, answers prompt 1 itself and puts a word behind every
    prompt."""

    settings = {"method": "noted"}
    tail = 3

    def __init__(self, word):
        self.answers, self.word, self.passes = {1: "Sorry ."}, word, []

    def start(self, model, tokenizer, prompts):
        self.prefill = [[self.word]] * len(prompts)
        return self

    def during(self, rows, first):
        self.passes.append((rows if rows is None else list(rows), first))
        return contextlib.nullcontext()


def test_steering_is_in_force_around_every_pass(tiny_llama, tiny_tokenizer, prompts):
    prompts = [
        f"tell me what the time is in my house and list the {x}" for x in ("dog", "cat", "bike")
    ]
    word = tiny_tokenizer.convert_tokens_to_ids("sure")
    steering = Steered(word)
    ours = generate(tiny_llama, tiny_tokenizer, prompts, max_new_tokens=3, steering=steering)
    assert ours["response"][1] == "Sorry ." and ours["finish"][1] == "eos"
    rows = encode_prompts(tiny_tokenizer, prompts)
    for i in (0, 2):
        out = theirs(tiny_llama, [*rows[i], word], 3)
        assert ours["response"][i] == tiny_tokenizer.decode(out, skip_special_tokens=True).strip()
    assert steering.passes[:2] == [(None, True), ([0, 2], True)]
    assert all(rows and not first for rows, first in steering.passes[2:])


def test_memory_that_runs_out_halves_the_batches_once(caplog):
    def runs(limit, message="CUDA out of memory. Tried to allocate 2.00 GiB"):
        sizes = []

        def run(batch):
            sizes.append(len(batch))
            if len(batch) > limit:
                raise RuntimeError(message)
            return [i * 10 for i in batch]

        done = dict(
            pair
            for b, r in in_memory([[1, 2, 3], [4, 5, 6]], run)
            for pair in zip(b, r, strict=True)
        )
        return done, sizes

    whole = {i: i * 10 for i in range(1, 7)}
    assert runs(3) == (whole, [3, 3]) and not caplog.text
    assert runs(2) == (whole, [3, 2, 1, 2, 1]) and caplog.text.count("half the size") == 1
    assert runs(2, "mha_graph.execute(handle, variant_pack).is_good() INTERNAL ASSERT")[0] == whole
    with pytest.raises(DCRError, match="does not suffice for 2 rows .*Lower the batch size"):
        runs(1)
    with pytest.raises(RuntimeError, match="other"):
        runs(1, "some other fault")


def test_batches_are_bounded_by_tokens(tiny_llama, tiny_tokenizer, table, monkeypatch):
    sizes = []
    run = decoding.Decoder.run

    def note(self, batch):
        sizes.append(len(batch) * (max(len(self.rows[i]) for i in batch) + 4))
        return run(self, batch)

    monkeypatch.setattr(decoding.Decoder, "run", note)
    options = {"max_new_tokens": 4, "max_tokens_per_batch": 40}
    bounded = generate(tiny_llama, tiny_tokenizer, table, **options)
    assert len(sizes) > 1 and max(sizes) <= 40
    free = generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=4)
    assert bounded["response"].tolist() == free["response"].tolist()


@pytest.mark.parametrize(
    "said, response",
    [("<think> a </think> Sure .", "Sure ."), ("<think> let me", "<think> let me")],
)
def test_closed_reasoning_is_cut(tiny_llama, tiny_tokenizer, monkeypatch, said, response):
    monkeypatch.setattr(type(tiny_tokenizer), "decode", lambda *_a, **_k: said)
    assert (
        generate(tiny_llama, tiny_tokenizer, ["how"], max_new_tokens=1)["response"][0] == response
    )


def test_reasoning_that_the_template_opened_is_marked(tiny_llama, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", tiny_tokenizer.chat_template + "<think>")
    monkeypatch.setattr(type(tiny_tokenizer), "decode", lambda *_a, **_k: "let me")
    (answer,) = generate(tiny_llama, tiny_tokenizer, ["how"], max_new_tokens=1)["response"]
    assert answer == "<think>let me"


@pytest.mark.parametrize(
    "change, message",
    [(lambda t: t.iloc[:0], "no rows"), (lambda t: t.assign(id="same"), "same")],
)
def test_bad_tables(change, message, tiny_llama, tiny_tokenizer, table):
    with pytest.raises(DCRError, match=message):
        generate(tiny_llama, tiny_tokenizer, change(table))


def test_errors_name_the_prompts_own_row_id_and_words(tiny_llama, tiny_tokenizer, table):
    """The longest prompt is first in its batch; its message has its row in the table."""
    tiny_llama.config.max_position_embeddings = 20
    with pytest.raises(DCRError, match=r"prompt 4 \(id 'p4': 'tell me what.*fit beside 8 new"):
        generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=8)
    with pytest.raises(DCRError, match="at least 1"):
        generate(tiny_llama, tiny_tokenizer, table, max_new_tokens=0)
    small = make_model(vocab=20)
    with pytest.raises(DCRError, match=r"prompt 0 \(id 'p0'.*the model has 20 embeddings"):
        generate(small, tiny_tokenizer, table)


def test_packed_weights_leave_the_model_as_it_was(tiny_llama, monkeypatch):
    """Results agree to rounding; the layers, also of a call that is given up, have their own
    forward again."""
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        plain = tiny_llama(ids).logits
        with decoding.packed(tiny_llama):
            assert "forward" in vars(tiny_llama.lm_head)
            torch.testing.assert_close(tiny_llama(ids).logits, plain, rtol=1e-4, atol=1e-5)
        assert torch.equal(tiny_llama(ids).logits, plain)
    decoder = decoding.Decoder(tiny_llama, [[3, 4], [5, 6]], (), decoding.Decoding(1))
    waiting = decoder.batches([0, 1], 1)
    next(waiting)
    waiting.close()
    assert "forward" not in vars(tiny_llama.lm_head)
    monkeypatch.setattr(
        decoding, "sizes", lambda _m: (4, 2)
    )  # a model of half the machine's memory
    with decoding.packed(tiny_llama):
        assert "forward" not in vars(tiny_llama.lm_head)


def test_a_file_of_other_prompts_another_model_or_steering_is_refused(
    tmp_path, tiny_llama, tiny_tokenizer
):
    out, texts = tmp_path / "g.jsonl", ["How do i bake ?", "List dogs ."]
    options = {"max_new_tokens": 2, "out": out}
    steered = Steered(5)
    steered.start = lambda *_: Unsteered()
    generate(tiny_llama, tiny_tokenizer, texts, steering=steered, **options)
    with pytest.raises(DCRError, match="begun with other parameters .*steering"):
        generate(tiny_llama, tiny_tokenizer, texts, **options)
    for other in (texts[:1], ["Name a cat .", "Sing ."]):
        with pytest.raises(DCRError, match="prompts: "):
            generate(tiny_llama, tiny_tokenizer, other, steering=steered, **options)
    with pytest.raises(DCRError, match="model: "):
        tiny_llama.model.norm.weight.data.add_(1)
        generate(tiny_llama, tiny_tokenizer, texts, steering=steered, **options)


def test_a_folder_for_answers_and_too_many_new_tokens_are_told(
    tmp_path, tiny_llama, tiny_tokenizer
):
    with pytest.raises(DCRError, match="cannot be read.*a directory"):
        generate(tiny_llama, tiny_tokenizer, ["Sing ."], out=tmp_path)
    with pytest.raises(DCRError, match="5000 new tokens leave .* no room.*lower max_new_tokens"):
        generate(tiny_llama, tiny_tokenizer, ["Sing ."], max_new_tokens=5000)


def test_precision_auto_is_what_the_device_does(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    """And is kept so: a machine that resolves it to another does not go on with the file."""
    out = tmp_path / "g.jsonl"
    rows = [
        generate(tiny_llama, tiny_tokenizer, ["Sing ."], precision=p, out=out)["response"].iloc[0]
        for p in ("auto", resolve_precision("auto", "cpu"))
    ]
    assert rows[0] == rows[1]
    monkeypatch.setattr("dcr.lm.device._multiplies_bf16", lambda _d: False)
    out.unlink()
    generate(tiny_llama, tiny_tokenizer, ["Sing ."], precision="auto", out=out)
    monkeypatch.setattr("dcr.lm.device._multiplies_bf16", lambda _d: True)
    with pytest.raises(DCRError, match="precision: fp32 -> bf16"):
        generate(tiny_llama, tiny_tokenizer, ["Sing ."], precision="auto", out=out)


@pytest.mark.parametrize("row", [{"id": "a", "text": "Sing ."}, {"prompt_id": "z", "response": ""}])
def test_a_file_that_no_call_wrote_is_refused_and_left_as_it_is(
    row, tmp_path, tiny_llama, tiny_tokenizer
):
    out = tmp_path / "prompts.jsonl"
    out.write_text(json.dumps(row) + "\n")
    with pytest.raises(DCRError, match="holds rows that no such call wrote"):
        generate(tiny_llama, tiny_tokenizer, ["Sing ."], max_new_tokens=1, out=out)
    assert out.read_text() == json.dumps(row) + "\n" and len(list(tmp_path.iterdir())) == 1


def test_a_turns_end_that_is_no_special_token_is_cut_from_the_answer():
    """Some tokenizers register it as an ordinary added token, which `skip_special_tokens` keeps."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["[END]"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} [END]{% endfor %}"
    end, word = tokenizer.convert_tokens_to_ids(["[END]", "sure"])
    model = make_model(vocab=len(tokenizer), tied=False)
    model.lm_head.weight.data.zero_()
    model.lm_head.register_forward_hook(
        lambda _m, _a, out: out.index_fill_(-1, torch.tensor([end if said else word]), 1.0)
    )
    said: list[int] = []
    model.register_forward_hook(lambda *_: said.append(1))
    answer = generate(model, tokenizer, ["how"], max_new_tokens=4).iloc[0]
    assert (answer.response, answer.n_tokens, answer.finish) == ("sure", 2, "eos")


def test_a_broken_model_gives_no_answers(tiny_llama, tiny_tokenizer):
    """Of logits that are no numbers the first token is the largest: it looked like an answer."""
    tiny_llama.model.norm.weight.data.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(DCRError, match="logits are not numbers"):
            generate(tiny_llama, tiny_tokenizer, ["how"], temperature=temperature)
    with pytest.raises(DCRError, match="temperature=nan: give at least"):
        generate(tiny_llama, tiny_tokenizer, ["how"], temperature=float("nan"))
