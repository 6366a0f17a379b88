"""Ten families of tiny random models through the whole kit: refine, align, generate, hidden states,
kernel."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import FAMILIES, make_model, make_tokenizer

from dcr.analysis import tree
from dcr.analysis.kernel import entk
from dcr.analysis.refusal import opening_tokens, refusal_probability
from dcr.config import AlignConfig, RefineConfig
from dcr.errors import DCRError
from dcr.lm.blocks import decoder_layers
from dcr.lm.chat import encode_prompts
from dcr.lm.generate import generate
from dcr.lm.states import hidden_states
from dcr.train.align import align
from dcr.train.refine import refine

THINGS = ["cat", "dog", "house", "bike", "bread", "file", "story", "plan", "trip", "game"]
TOXIC = [f"how do i kill the {thing} ?" for thing in THINGS]
HARMLESS = [f"how do i bake the {thing} ." for thing in THINGS]
STAGE_ONE = RefineConfig(layer=2, max_steps=2, batch_size=8, lora_rank=4, eval_steps=2)
STAGE_TWO = AlignConfig(max_steps=2, batch_size=4, lora_rank=4, lora_targets=())


def moved(before, after, path="") -> list[int]:
    """Numbers of the blocks whose weights differ."""
    pairs = zip(decoder_layers(before, path), decoder_layers(after, path), strict=True)
    return [
        i
        for i, (a, b) in enumerate(pairs)
        if any(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    ]


def norms(model, rows, tokens, path="") -> np.ndarray:
    """‖K‖_F of the blocks' parameters between token rows, by one backward pass a logit."""
    wanted = list(decoder_layers(model, path).parameters())
    jacobians = []
    for row in rows:
        logits = model(torch.tensor([row])).logits[0, -1]
        parts = [torch.autograd.grad(logits[t], wanted, retain_graph=True) for t in tokens]
        jacobians.append(torch.stack([torch.cat([g.flatten() for g in p]) for p in parts]))
    return np.array([[float((a @ b.T).norm()) for b in jacobians] for a in jacobians])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_the_whole_kit(family, monkeypatch):
    base, tokenizer = make_model(family, seed=3), make_tokenizer()
    refined = refine(
        make_model(family, seed=3),
        tokenizer,
        toxic=TOXIC,
        seemingly_toxic=HARMLESS,
        config=STAGE_ONE,
        precision="fp32",
    ).model
    assert moved(base, refined) == [0, 1], "stage 1 trains all blocks below l, and no other"
    mix = pd.DataFrame({"text": TOXIC + HARMLESS, "response": ["sorry ."] * 10 + ["sure ."] * 10})
    before = make_model(family, seed=3)
    before.load_state_dict(refined.state_dict())
    aligned = align(refined, tokenizer, mix, config=STAGE_TWO, precision="fp32").model
    assert moved(before, aligned) == [0, 1, 2, 3], "stage 2 trains every block"

    prompts = [TOXIC[0], HARMLESS[3], "list the dog ."]
    rows = encode_prompts(tokenizer, prompts)
    answers = generate(aligned, tokenizer, prompts, max_new_tokens=5)["response"].tolist()
    states = hidden_states(aligned, tokenizer, prompts)  # [layers + 1, n, hidden]
    for i, row in enumerate(rows):
        alone = torch.tensor([row])
        out = aligned.generate(alone, max_new_tokens=5, do_sample=False)[0, len(row) :]
        assert answers[i] == tokenizer.decode(out, skip_special_tokens=True).strip()
        with torch.no_grad():
            expected = aligned(alone, output_hidden_states=True).hidden_states
        expected = torch.stack([s[0, -1] for s in expected]).numpy()
        np.testing.assert_allclose(states[:, i], expected, rtol=1e-4, atol=1e-5)

    openings = ["sorry", "i cannot", "i can't help"]
    phrases = opening_tokens(tokenizer, openings)
    monkeypatch.setattr(tree, "TOLERANCE", 0.0)
    ours = refusal_probability(aligned, tokenizer, prompts, openings=openings)
    for i, row in enumerate(rows):
        total = 0.0
        for phrase in phrases:
            with torch.no_grad():
                logits = aligned(torch.tensor([[*row, *phrase]])).logits[0].log_softmax(-1)
            at = range(len(row) - 1, len(row) - 1 + len(phrase))
            total += float(sum(logits[s, t] for s, t in zip(at, phrase, strict=True)).exp())
        assert ours[i] == pytest.approx(total, rel=1e-4)

    kernel = entk(aligned, tokenizer, prompts[:1], prompts[1:], k=3, parameters="blocks")
    expected = norms(aligned, rows, kernel.tokens)
    np.testing.assert_allclose(kernel.cross, expected[:1, 1:], rtol=2e-3)


def test_blocks_in_an_unknown_place_need_their_path_and_nothing_else():
    def make():
        torch.manual_seed(3)
        options = dict(d_model=32, n_heads=4, n_layers=4, vocab_size=128, expansion_ratio=2)
        config = transformers.MptConfig(**options, max_seq_len=256, pad_token_id=1, eos_token_id=2)
        return transformers.MptForCausalLM(config).float().eval()

    path, tokenizer = "transformer.blocks", make_tokenizer()
    classes = {"toxic": TOXIC, "seemingly_toxic": HARMLESS}
    with pytest.raises(DCRError, match=r"model.layers_path.*found: \['transformer.blocks'\]"):
        refine(make(), tokenizer, **classes, config=STAGE_ONE)
    how = {"precision": "fp32", "layers_path": path}
    model = refine(make(), tokenizer, **classes, config=STAGE_ONE, **how).model
    assert moved(make(), model, path) == [0, 1]
    mix = pd.DataFrame({"text": TOXIC, "response": ["sorry ."] * 10})
    model = align(model, tokenizer, mix, config=STAGE_TWO, **how).model
    assert moved(make(), model, path) == [0, 1, 2, 3]
    prompts = [TOXIC[0], HARMLESS[3]]
    rows = encode_prompts(tokenizer, prompts)
    states = hidden_states(model, tokenizer, prompts, layers_path=path)
    with torch.no_grad():
        theirs = model(torch.tensor(rows[:1]), output_hidden_states=True).hidden_states
    np.testing.assert_allclose(states[2, 0], theirs[2][0, -1], rtol=1e-4, atol=1e-5)
    answer = generate(model, tokenizer, prompts, max_new_tokens=4)["response"][0]
    out = model.generate(torch.tensor(rows[:1]), max_new_tokens=4, do_sample=False)[0]
    assert answer == tokenizer.decode(out[len(rows[0]) :], skip_special_tokens=True).strip()
    kernel = entk(
        model, tokenizer, prompts[:1], prompts[1:], parameters="blocks", k=3, layers_path=path
    )
    expected = norms(model, rows, kernel.tokens, path)
    np.testing.assert_allclose(kernel.cross, expected[:1, 1:], rtol=2e-3)
