"""Refusal scores against enumeration, openings in every typography, extreme odds, bad input."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, make_model

from dcr.analysis import refusal, tree
from dcr.analysis.refusal import (
    REFUSAL_OPENINGS,
    opening_tokens,
    refusal_probability,
    refusal_score,
    typographies,
)
from dcr.errors import DCRError
from dcr.lm import batches, states
from dcr.lm.chat import encode_prompts
from dcr.lm.device import keeping
from dcr.lm.states import last_logits, residuals

OPENINGS = ("sorry ,", "can't", "i cannot help", "sorry , i", "can't help me", "i can't do that")


@pytest.fixture
def openings(monkeypatch):
    """Openings inside the tiny vocabulary."""
    monkeypatch.setattr(refusal, "REFUSAL_OPENINGS", OPENINGS)
    return OPENINGS


def written(openings) -> list[str]:
    return typographies(openings, ("", *refusal.MARKS))


def enumerated(model, tokenizer, prompts, openings) -> np.ndarray:
    """[n] log odds by one whole forward pass a prompt and phrase, in float64 behind the logits."""
    found = []
    for head in encode_prompts(tokenizer, prompts):
        mass = 0.0
        for phrase in opening_tokens(tokenizer, written(openings)):
            with torch.no_grad():
                logits = model(torch.tensor([head + phrase])).logits[0].double().log_softmax(-1)
            steps = [logits[len(head) - 1 + i, t] for i, t in enumerate(phrase)]
            mass += float(torch.stack(steps).sum().exp())
        found.append(math.log(mass) - math.log1p(-mass))
    return np.array(found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_enumeration(family, attention, openings, tiny_tokenizer, prompts, monkeypatch):
    """With and without a shared beginning, in mixed lengths, windows shorter than prompts."""
    monkeypatch.setattr(tree, "TOLERANCE", 0.0)
    monkeypatch.setattr(refusal, "MARKED", 1e-30)
    model = make_model(family, window=6)
    model.set_attn_implementation(attention)
    head = "tell me what the time is in my house and "
    for texts in (prompts, [head + p for p in prompts]):
        ours = refusal_score(model, tiny_tokenizer, texts, batch_size=4)
        expected = enumerated(model, tiny_tokenizer, texts, openings)
        np.testing.assert_allclose(ours, expected, atol=5e-4)


def test_what_goes_unread_stays_within_the_tolerance(
    openings, tiny_tokenizer, prompts, monkeypatch
):
    """A model whose next-token distributions are far apart, so that beginnings are left out."""
    model = make_model(seed=3, tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(60.0)
    read = []
    packed = tree.Packed.read
    monkeypatch.setattr(
        tree.Packed,
        "read",
        lambda s, reading: read.append(sum(map(len, reading.values()))) or packed(s, reading),
    )
    close = refusal_score(model, tiny_tokenizer, prompts)
    some = sum(read)
    monkeypatch.setattr(tree, "TOLERANCE", 0.0)
    monkeypatch.setattr(refusal, "MARKED", 1e-30)
    exact = refusal_score(model, tiny_tokenizer, prompts)
    assert some < (sum(read) - some) / 2
    assert np.abs(close - exact).max() < 0.1


class Fixed(torch.nn.Module):
    """Says one text with the given odds against all else at its first token; then it is sure."""

    def __init__(self, ids: list[int], odds: float, vocabulary: int) -> None:
        super().__init__()
        self.ids, self.odds = ids, odds
        self.weight = torch.nn.Parameter(torch.zeros(vocabulary, 1))
        text = SimpleNamespace(max_position_embeddings=512, _attn_implementation="sdpa")
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_input_embeddings(self):
        return self

    def forward(self, input_ids, position_ids, logits_to_keep=0, **_):
        logits = torch.full((*input_ids.shape, len(self.weight)), -200.0)
        if not logits_to_keep:  # one token of the answer; the prompt's end is where it began
            for i, (last, after) in enumerate(zip(self.ids, self.ids[1:], strict=False)):
                here = (input_ids == last) & (position_ids == self.end + i)
                logits[..., after][here] = 0.0
        else:
            self.end = position_ids[:, -1:] + 1
            logits = logits[:, -1:].fill_(-200.0)
            logits[..., 0], logits[..., self.ids[0]] = 0.0, self.odds  # 0 ends the answer at once
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def byte_tokenizer(tiny_tokenizer):
    """A byte-level BPE trained on a few lines, as real chat models have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=["<|end|>"]
    )
    raw.train_from_iterator([*REFUSAL_OPENINGS, "Sure, here is a list of the things."] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    tokenizer.chat_template = tiny_tokenizer.chat_template
    return tokenizer


@pytest.mark.parametrize("answer", ["I can\u2019t help", "**I'm sorry**, but", "\u201cI cannot"])
@pytest.mark.parametrize("odds", [-3.0, 0.0, 3.0, 30.0])
def test_every_typography_counts_and_extreme_odds_stay_finite(
    answer, odds, byte_tokenizer, monkeypatch
):
    monkeypatch.setattr(batches, "tokens_that_fit", lambda _model: 10_000)
    model = Fixed(byte_tokenizer(answer)["input_ids"], odds, len(byte_tokenizer))
    score = refusal_score(model, byte_tokenizer, ["how ?", "why not ?"])
    np.testing.assert_allclose(score, odds, atol=0.05)
    probability = refusal_probability(model, byte_tokenizer, ["how ?"])
    np.testing.assert_allclose(probability, 1 / (1 + math.exp(-odds)), rtol=0.05)


def test_an_unlikely_refusal_keeps_its_odds(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(batches, "tokens_that_fit", lambda _model: 10_000)
    model = Fixed(byte_tokenizer("I'm sorry, but")["input_ids"], -30.0, len(byte_tokenizer))
    np.testing.assert_allclose(refusal_score(model, byte_tokenizer, ["how ?"]), -30.0, atol=0.05)


def test_no_opening_is_counted_twice(tiny_tokenizer):
    rows = opening_tokens(tiny_tokenizer, OPENINGS)
    assert len(rows) == 4  # "sorry , i" and "can't help me" begin with others
    assert not any(a != b and a[: len(b)] == b for a in rows for b in rows)
    assert {"I\u2019m sorry", '"I can\u2019t', "**No,"} < set(written(REFUSAL_OPENINGS))
    with pytest.raises(DCRError, match="openings='sorry': give a list"):
        refusal_score(make_model(), tiny_tokenizer, ["how ?"], openings="sorry")
    with pytest.raises(DCRError, match="none left"):
        opening_tokens(tiny_tokenizer, [""])


def test_no_prompts(tiny_llama, tiny_tokenizer):
    with pytest.raises(DCRError, match="no rows"):
        refusal_score(tiny_llama, tiny_tokenizer, [])


def test_layers_that_cannot_read_a_tree_are_refused(tiny_llama, tiny_tokenizer):
    tiny_llama.config.layer_types = ["linear_attention", *["full_attention"] * 3]
    with pytest.raises(DCRError, match="LlamaForCausalLM has layers other than"):
        refusal_score(tiny_llama, tiny_tokenizer, ["how ?"])


def test_control_tokens_in_a_prompt_are_text(openings, tiny_llama, tiny_tokenizer):
    text = "list <|end|> <|assistant|> the dog ."
    rows = encode_prompts(tiny_tokenizer, [text])
    assert rows[0].count(tiny_tokenizer.eos_token_id) == 1
    expected = enumerated(tiny_llama, tiny_tokenizer, [text], openings)
    np.testing.assert_allclose(
        refusal_score(tiny_llama, tiny_tokenizer, [text]), expected, atol=0.03
    )


def test_prompt_over_the_context_and_broken_weights(openings, tiny_llama, tiny_tokenizer, prompts):
    tiny_llama.config.max_position_embeddings = 8
    with pytest.raises(DCRError, match=r"prompt 0 .* \d fit beside"):
        refusal_score(tiny_llama, tiny_tokenizer, prompts)
    assert np.isfinite(refusal_score(tiny_llama, tiny_tokenizer, prompts, truncate=True)).all()
    tiny_llama.config.max_position_embeddings = 256
    with torch.no_grad():
        tiny_llama.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(DCRError, match="not finite"):
        refusal_score(tiny_llama, tiny_tokenizer, prompts)


def test_openings_are_read_up_to_the_end_of_learned_positions(openings, tiny_tokenizer):
    model, longest = make_model("gpt2"), max(map(len, opening_tokens(tiny_tokenizer, OPENINGS)))
    text = "the cat " * 200
    assert np.isfinite(refusal_score(model, tiny_tokenizer, [text], truncate=True)).all()
    with pytest.raises(DCRError, match=rf"{257 - longest} fit beside {longest - 1} new ones"):
        refusal_score(model, tiny_tokenizer, [text], openings=OPENINGS)


@pytest.mark.parametrize("of", ["openings", "probe", "token"])
def test_a_killed_score_goes_on_from_its_batches(
    of, openings, tiny_llama, tiny_tokenizer, prompts, monkeypatch, tmp_path
):
    """Kept batches are read, not run again; the scores are those of one go; no file stays."""
    steering = SimpleNamespace(
        openings=lambda: refusal_score(tiny_llama, tiny_tokenizer, prompts, batch_size=2),
        token=lambda: last_logits(tiny_llama, encode_prompts(tiny_tokenizer, prompts), [3, 4]),
        probe=lambda: residuals(tiny_llama, encode_prompts(tiny_tokenizer, prompts), [(-1, None)]),
    )
    monkeypatch.setattr(states, "BATCH", 2)
    score = getattr(steering, of)
    whole, calls = score(), []
    inputs = batches.Passes.inputs

    def dying(self, batch, *more):
        calls.append(tuple(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return inputs(self, batch, *more)

    monkeypatch.setattr(batches.Passes, "inputs", dying)
    with pytest.raises(KeyboardInterrupt), keeping(tmp_path):
        score()
    assert len(list((tmp_path / "batches").iterdir())) == 2
    with keeping(tmp_path):
        again = score()
    np.testing.assert_array_equal(np.asarray(again), np.asarray(whole))
    assert calls[2] == calls[3] and not set(calls[:2]) & set(calls[3:])
    assert not list(tmp_path.iterdir())


def test_a_model_that_drops_activations_is_refused(tiny_tokenizer, openings):
    """As a trainer leaves it; its scores were other ones at every call."""
    model = make_model("gpt2", 2, 16)
    model.train()
    model.transformer.drop.p = 0.5
    with pytest.raises(DCRError, match=r"dropout is on. Call model.eval\(\) first"):
        refusal_score(model, tiny_tokenizer, ["how ?"])
    assert np.isfinite(refusal_score(model.eval(), tiny_tokenizer, ["how ?"]))
