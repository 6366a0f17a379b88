"""Steering: planted directions come back, ablation removes, generation equals a slow loop, the model stays untouched."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from conftest import FAMILIES, make_model

from dcr.errors import DCRError
from dcr.lm.blocks import decoder_layers
from dcr.lm.chat import render
from dcr.lm.generate import generate
from dcr.steering import (
    Scans,
    Surgical,
    ablated,
    choose_threshold,
    fit_scans,
    fit_surgical,
    shifted,
)
from dcr.steering.hooks import instruction_tail, left_padded, residuals, token_rows, writers
from dcr.steering.surgical import orthogonal, refusal_score

LIMIT = 6


@pytest.fixture
def table(prompts) -> pd.DataFrame:
    return pd.DataFrame({"id": [f"p{i}" for i in range(len(prompts))], "text": prompts})


def unit(size: int = 32, seed: int = 5):
    return torch.nn.functional.normalize(
        torch.randn(size, generator=torch.Generator().manual_seed(seed)), dim=0
    )


def plant(model, tokenizer, words: str, block: int, direction, size: float = 30.0):
    """Make block `block` write `direction` wherever the stream comes from one of `words` (through its embedding)."""
    ids, seen = set(tokenizer(words)["input_ids"]), {}

    def note(_module, _args, kwargs):
        seen["hit"] = torch.tensor(
            [
                [any(t in ids for t in row[: i + 1]) for i in range(len(row))]
                for row in kwargs["input_ids"].tolist()
            ]
        )

    return [
        model.model.register_forward_pre_hook(note, with_kwargs=True),
        decoder_layers(model)[block].register_forward_hook(
            lambda _m, _a, out: out + size * seen["hit"].unsqueeze(-1) * direction
        ),
    ]


# ---- the slow reference: no cache, no common prefix, one prompt at a time, edits written out --------------------


def slow(model, tokenizer, text: str, edit_block=None, choose=None) -> list[int]:
    """Greedy tokens; `edit_block(i, x, start)` edits block i's output, `start` the end-of-instruction position."""
    ids = tokenizer(render(tokenizer, [text])[0], add_special_tokens=False)["input_ids"]
    start, out = len(ids) - instruction_tail(tokenizer), []
    for _ in range(LIMIT):
        handles = (
            [
                block.register_forward_hook(
                    lambda _m, _a, r, i=i: (
                        edit_block(i, r, start)
                        if torch.is_tensor(r)
                        else (edit_block(i, r[0], start), *r[1:])
                    )
                )
                for i, block in enumerate(decoder_layers(model))
            ]
            if edit_block
            else []
        )
        with torch.no_grad():
            logits = model(torch.tensor([ids + out])).logits[0, -1]
        for handle in handles:
            handle.remove()
        out.append(int(logits.argmax()))
        if out[-1] == tokenizer.eos_token_id:
            break
    return out


def texts_of(tokenizer, tokens: list[list[int]]) -> list[str]:
    return [tokenizer.decode(t, skip_special_tokens=True).strip() for t in tokens]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("opt", "granite")])
def test_scans_generation_equals_the_slow_loop(family, tiny_tokenizer, table):
    model = make_model(family, seed=3)
    plain = generate(model, tiny_tokenizer, table, max_new_tokens=LIMIT)["response"].tolist()
    vectors = torch.nn.functional.normalize(
        torch.randn(4, 32, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    scans = Scans(
        vectors, vectors, threshold=0.0, alpha=40.0, tail=instruction_tail(tiny_tokenizer)
    )
    signs = scans.signs(model, tiny_tokenizer, table["text"].tolist())
    scans.known.update(
        {t: s for t, s in zip(table["text"], [1, -1, 1, -1, -1, 1], strict=True)}
    )  # mixed signs in one batch
    signs = scans.signs(model, tiny_tokenizer, table["text"].tolist())
    assert set(signs) == {-1.0, 1.0}
    ours = generate(
        model, tiny_tokenizer, table, max_new_tokens=LIMIT, batch_size=4, steering=scans
    )["response"].tolist()
    expected = []
    for text, sign in zip(table["text"], signs, strict=True):

        def edit(i, x, start, sign=sign):
            if i not in scans.steered:
                return x
            x = x.clone()
            for position in range(start, x.shape[1]):
                x[0, position] = x[0, position] + sign * 40.0 * vectors[i]
            return x

        expected.append(slow(model, tiny_tokenizer, text, edit))
    assert ours == texts_of(tiny_tokenizer, expected) and ours != plain


def test_rows_that_stop_take_their_sign_along(tiny_tokenizer, table):
    """Make one row's first token the stop token: the others' signs must not shift."""
    model = make_model(seed=3)
    vectors = torch.nn.functional.normalize(
        torch.randn(4, 32, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    scans = Scans(vectors, vectors, 0.0, 40.0, instruction_tail(tiny_tokenizer))
    scans.known.update(zip(table["text"], [1, -1, 1, -1, 1, -1], strict=True))
    free = generate(model, tiny_tokenizer, table, max_new_tokens=LIMIT, steering=scans)
    first = tiny_tokenizer(free["response"][0], add_special_tokens=False)["input_ids"][0]
    model.generation_config.eos_token_id = [2, first]
    again = generate(model, tiny_tokenizer, table, max_new_tokens=LIMIT, steering=scans)
    stopped = again["finish"] == "eos"
    assert stopped.any() and not stopped.all()
    assert again.loc[~stopped, "response"].tolist() == free.loc[~stopped, "response"].tolist()


def test_equal_prompts_are_steered_from_the_end_of_instruction_too(tiny_tokenizer):
    """The common prefix of equal prompts would swallow the tokens that are to be steered."""
    model = make_model(seed=3)
    vectors = torch.nn.functional.normalize(
        torch.randn(4, 32, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    scans = Scans(vectors, vectors, 0.0, 40.0, instruction_tail(tiny_tokenizer))
    rows = pd.DataFrame({"id": ["a", "b"], "text": ["list the dog ."] * 2})
    both = generate(model, tiny_tokenizer, rows, max_new_tokens=LIMIT, steering=scans)["response"]
    alone = generate(model, tiny_tokenizer, rows[:1], max_new_tokens=LIMIT, steering=scans)[
        "response"
    ]
    assert both[0] == both[1] == alone[0]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("opt", "granite")])
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_ablation_leaves_its_share_of_what_is_written(family, strength, tiny_tokenizer, prompts):
    """The stream's component along d is (1 − s) times what embeddings, attention and MLP write; nothing at s = 1."""
    model, d = make_model(family, seed=2), unit()
    rows, written = token_rows(tiny_tokenizer, prompts[:1]), []
    blocks = decoder_layers(model)
    model_hooks = [
        blocks[0].register_forward_pre_hook(
            lambda _m, a, k: written.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
    ]
    model_hooks += [
        m.register_forward_hook(
            lambda _m, _a, out: written.append(out if torch.is_tensor(out) else out[0])
        )
        for block in blocks
        for m in writers(block)
    ]  # these see what is written before it is edited
    with ablated(model, d, strength):
        after = residuals(model, rows, tiny_tokenizer.pad_token_id, last=3)
    for hook in model_hooks:
        hook.remove()
    assert len(written) == 1 + 2 * len(blocks)
    whole = sum(w.detach()[0, -3:] for w in written) @ d
    assert whole.abs().max() > 1e-2
    torch.testing.assert_close(after[-1, 0] @ d, (1 - strength) * whole, rtol=1e-4, atol=1e-5)
    if strength == 1.0:
        assert (after @ d).abs().max() < 1e-5


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("opt", "granite")])
def test_surgical_generation_equals_the_slow_loop(family, tiny_tokenizer, table):
    """With the common prefix cached under ablation, tokens are those of full forward passes under ablation."""
    model = make_model(family, seed=3)
    surgical = Surgical(unit(), 1, -1)
    ours = generate(
        model, tiny_tokenizer, table, max_new_tokens=LIMIT, batch_size=4, steering=surgical
    )["response"].tolist()
    with ablated(model, surgical.direction):
        expected = [slow(model, tiny_tokenizer, t) for t in table["text"]]
    assert ours == texts_of(tiny_tokenizer, expected)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("opt", "granite")])
def test_the_model_is_untouched_afterwards(family, tiny_tokenizer, table, prompts):
    model = make_model(family, seed=3)
    inputs = left_padded(token_rows(tiny_tokenizer, prompts), tiny_tokenizer.pad_token_id, "cpu")
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    with torch.no_grad():
        before = model(**inputs).logits
    vectors = torch.eye(32)[:4]
    scans = Scans(vectors, vectors, 0.0, 5.0, instruction_tail(tiny_tokenizer))
    for steering in (scans, Surgical(unit(), 1, -1)):
        generate(model, tiny_tokenizer, table, max_new_tokens=2, steering=steering)
    fit_scans(model, tiny_tokenizer, prompts[:3], prompts[3:])
    with (
        pytest.raises(KeyboardInterrupt),
        ablated(model, unit()),
        shifted(model, vectors, [0, 1], torch.ones(6), 1),
    ):
        assert any(m._forward_hooks for m in model.modules())
        raise KeyboardInterrupt
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(before, model(**inputs).logits)
    assert all(torch.equal(weights[n], p) for n, p in model.state_dict().items())


# ---- fits recover what was planted ------------------------------------------------------------------------------


def sentences(verb: str) -> list[str]:
    things = "cat dog house bike bread file story plan".split()
    return [f"{verb} the {thing} in my {other} ." for thing in things for other in things[:2]]


def test_scans_recovers_a_planted_direction_and_classifies(tiny_tokenizer):
    model, d = make_model(seed=4), unit()
    hooks = plant(model, tiny_tokenizer, "steal", 1, d)
    try:
        scans = fit_scans(model, tiny_tokenizer, sentences("steal"), sentences("bake"), alpha=1.0)
        scores = scans.scores(model, tiny_tokenizer, [*sentences("steal"), *sentences("fix")])
    finally:
        for hook in hooks:
            hook.remove()
    assert float(scans.vectors[1] @ d) > 0.99
    facts = choose_threshold(scores, [True] * 16 + [False] * 16)
    assert facts["auroc"] > 0.9 and facts["n"] == 32


def test_surgical_recovers_a_planted_direction_orthogonal_to_refusal(tiny_tokenizer):
    """Harmful prompts carry r, pseudo-harmful ones r and w: what is cut is w."""
    model, w = make_model(seed=4), unit()
    r = orthogonal(unit(seed=6), w)
    hooks = plant(model, tiny_tokenizer, "steal kill", 1, r) + plant(
        model, tiny_tokenizer, "kill", 1, w
    )
    try:
        surgical, facts = fit_surgical(
            model,
            tiny_tokenizer,
            sentences("steal"),
            sentences("kill"),
            sentences("bake"),
            held_pseudo=sentences("kill")[:4],
            held_harmless=sentences("fix")[:4],
        )
        _, few = fit_surgical(
            model,
            tiny_tokenizer,
            sentences("steal"),
            sentences("kill"),
            sentences("bake"),
            max_candidates=2,
            held_pseudo=sentences("kill")[:4],
            held_harmless=sentences("fix")[:4],
        )
        tail = instruction_tail(tiny_tokenizer)
        means = [
            residuals(
                model, token_rows(tiny_tokenizer, sentences(v)), 1, last=tail, at="input"
            ).mean(1)
            for v in ("steal", "kill", "bake")
        ]
    finally:
        for hook in hooks:
            hook.remove()
    direction = orthogonal(means[1] - means[2], means[0] - means[2])
    assert float(direction[2, -1] @ w) > 0.99
    assert few["candidates"] == 2 and few["refusal_score"] >= facts["refusal_score"]
    assert facts["kl"] <= 0.2 and facts["candidates"] == 3 * tail and surgical.layer < 3


def test_refusal_score_is_the_log_odds_of_the_tokens():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    expected = torch.tensor([0.75, 0.3], dtype=torch.float64)
    torch.testing.assert_close(
        refusal_score(logits, [0, 1]), torch.log(expected / (1 - expected)), rtol=1e-5, atol=1e-6
    )


def test_orthogonal_takes_out_the_share_of_lambda():
    w, r = torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0])
    torch.testing.assert_close(orthogonal(w, r), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(orthogonal(w, r, 0.0), torch.tensor([0.6, 0.8]))


def test_threshold_is_the_best_cut():
    facts = choose_threshold([0.1, 0.2, 0.6, 0.7], [False, False, True, True])
    assert 0.2 < facts["threshold"] < 0.6 and facts["balanced_accuracy"] == facts["auroc"] == 1.0
    with pytest.raises(DCRError, match="both classes"):
        choose_threshold([0.1], [True])


def test_bad_input(tiny_llama, tiny_tokenizer):
    with pytest.raises(DCRError, match="0 harmful and 1 harmless"):
        fit_scans(tiny_llama, tiny_tokenizer, [], ["list the dog ."])
    with pytest.raises(DCRError, match="are needed"):
        fit_surgical(
            tiny_llama, tiny_tokenizer, ["a"], ["a"], ["a"], held_pseudo=[], held_harmless=["a"]
        )
    with pytest.raises(DCRError, match="no attention or MLP"):
        writers(torch.nn.ModuleDict({"mixer": torch.nn.Linear(1, 1)}))
