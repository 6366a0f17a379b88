"""Steering: planted directions come back, generation equals a slow loop, the model stays
untouched."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FAMILIES, make_model

from dcr.analysis import refusal, tree
from dcr.analysis.refusal import opening_tokens, refusal_score, typographies
from dcr.config import SteeringConfig
from dcr.errors import DCRError
from dcr.lm.blocks import decoder_layers, edited
from dcr.lm.chat import encode_prompts
from dcr.lm.device import keeping
from dcr.lm.generate import generate
from dcr.lm.states import residuals
from dcr.steering import Scans, Surgical
from dcr.steering.hooks import ablated, shifted, template_ends, writers
from dcr.steering.scans import choose_threshold
from dcr.steering.surgical import last_tokens, orthogonal, token_odds

LIMIT = 6


@pytest.fixture
def table(prompts) -> pd.DataFrame:
    return pd.DataFrame({"id": [f"p{i}" for i in range(len(prompts))], "text": prompts})


def unit(size: int = 32, seed: int = 5):
    return torch.nn.functional.normalize(
        torch.randn(size, generator=torch.Generator().manual_seed(seed)), dim=0
    )


def plant(model, tokenizer, words: str, block: int, direction, size: float = 30.0):
    """Make block `block` write `direction` wherever the stream comes from one of `words`."""
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


@dataclass(frozen=True)
class Judged(Scans):
    """SCANS whose prompts are judged beforehand."""

    signs: dict[str, float] = field(default_factory=dict)

    def harmfulness(self, model, tokenizer, prompts):
        return np.array([self.signs[p] for p in prompts])


def scans_of(tokenizer, signs: dict[str, float], alpha: float = 40.0) -> Scans:
    """Random directions; prompts are already judged."""
    generator = torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(4, 32, generator=generator), dim=-1)
    facts = {"alpha": alpha, "threshold": 0.0, "tail": template_ends(tokenizer)[1]}
    return Judged(facts, {"vectors": vectors, "transitions": vectors}, signs=signs)


def surgical_of(direction) -> Surgical:
    return Surgical({"layer": 1, "position": -1}, {"direction": direction})


# ---- the slow reference: no cache, no common prefix, one prompt at a time, edits written out ----


def by_hand(model, tokenizer, steering: Scans, sign: float, ids: list[int], start: int):
    """Logits of one row with the shifts of SCANS written out, from position `start` on."""

    def edit_for(i: int):
        def edit(x):
            x = x.clone()
            for position in range(start, x.shape[1]):
                x[0, position] += sign * steering.facts["alpha"] * steering.tensors["vectors"][i]
            return x

        return edit

    blocks = decoder_layers(model)
    with torch.no_grad(), edited([(blocks[i], edit_for(i)) for i in steering.steered]):
        return model(torch.tensor([ids])).logits[0]


def slow(tokenizer, ids: list[int], logits_of) -> str:
    """Greedy text of whole forward passes."""
    out: list[int] = []
    while len(out) < LIMIT and tokenizer.eos_token_id not in out:
        out.append(int(logits_of(ids + out)[-1].argmax()))
    return tokenizer.decode(out, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_scans_generation_and_score_equal_whole_passes(family, tiny_tokenizer, table, monkeypatch):
    """Mixed signs in one batch; the openings are read under steering too."""
    monkeypatch.setattr(tree, "TOLERANCE", 0.0)
    monkeypatch.setattr(refusal, "MARKED", 1e-30)
    monkeypatch.setattr(refusal, "REFUSAL_OPENINGS", ("sorry ,", "can't help", "i can't"))
    model, texts = make_model(family, seed=3), table["text"].tolist()
    signs = dict(zip(texts, [1.0, -1.0, 1.0, -1.0, -1.0, 1.0], strict=True))
    scans = scans_of(tiny_tokenizer, signs)
    options = {"max_new_tokens": LIMIT, "batch_size": 4}
    ours = generate(model, tiny_tokenizer, table, **options, steering=scans)["response"].tolist()
    scores, expected, odds = scans.score(model, tiny_tokenizer, texts), [], []
    phrases = opening_tokens(
        tiny_tokenizer, typographies(refusal.REFUSAL_OPENINGS, ("", *refusal.MARKS))
    )
    for ids, sign in zip(encode_prompts(tiny_tokenizer, texts), signs.values(), strict=True):
        start = len(ids) - scans.facts["tail"]

        def logits_of(row, sign=sign, start=start):
            return by_hand(model, tiny_tokenizer, scans, sign, row, start)

        expected.append(slow(tiny_tokenizer, ids, logits_of))
        mass = 0.0
        for phrase in phrases:
            log_p = logits_of(ids + phrase).double().log_softmax(-1)[len(ids) - 1 :]
            mass += float(sum(log_p[i, t] for i, t in enumerate(phrase)).exp())
        odds.append(np.log(mass) - np.log1p(-mass))
    assert ours == expected
    plain = generate(model, tiny_tokenizer, table, **options)["response"].tolist()
    off = generate(model, tiny_tokenizer, table, **options, steering=scans.at(0.0))
    assert ours != plain == off["response"].tolist()
    np.testing.assert_allclose(scores, odds, atol=2e-3)


LONG = (
    *(
        "sorry for that it be",
        "can't help me with that",
        "i cannot help",
        "i can't do that for you",
    ),
    *("how do i kill", "tell me what the time", "steal my cat", "list the dog of my house"),
)


def test_rows_whose_openings_are_read_leave_the_others_their_sign(
    tiny_tokenizer, table, monkeypatch
):
    """Some prompts' openings are known after fewer passes: the signs of the others must not
    shift."""
    monkeypatch.setattr(refusal, "REFUSAL_OPENINGS", LONG)
    model, texts = make_model(seed=0, tied=False), table["text"].tolist()
    with torch.no_grad():
        model.lm_head.weight.mul_(60.0)  # distributions far apart, so that beginnings are left out
    scans = scans_of(tiny_tokenizer, dict(zip(texts, [1, -1, 1, -1, 1, -1], strict=True)), 2.0)
    read, rows = tree.Packed.read, []
    monkeypatch.setattr(
        tree.Packed, "read", lambda s, reading: rows.append(len(reading)) or read(s, reading)
    )
    together = scans.score(model, tiny_tokenizer, texts)
    assert len(set(rows)) > 1
    alone = np.concatenate([scans.score(model, tiny_tokenizer, [text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-3)


def test_rows_that_stop_take_their_sign_along(tiny_tokenizer, table):
    """Make one row's first token the stop token: the others' signs must not shift."""
    model = make_model(seed=3)
    scans = scans_of(tiny_tokenizer, dict(zip(table["text"], [1, -1, 1, -1, 1, -1], strict=True)))
    free = generate(model, tiny_tokenizer, table, max_new_tokens=LIMIT, steering=scans)
    first = tiny_tokenizer(free["response"][0], add_special_tokens=False)["input_ids"][0]
    model.generation_config.eos_token_id = [2, first]
    again = generate(model, tiny_tokenizer, table, max_new_tokens=LIMIT, steering=scans)
    stopped = again["finish"] == "eos"
    assert stopped.any() and not stopped.all()
    assert again.loc[~stopped, "response"].tolist() == free.loc[~stopped, "response"].tolist()


def test_equal_prompts_are_steered_from_the_end_of_instruction_too(tiny_tokenizer):
    """The common prefix of equal prompts would swallow the tokens that are to be steered."""
    model, text = make_model(seed=3), "tell me what the time is in my house , the cat ."
    scans = scans_of(tiny_tokenizer, {text: 1.0})
    rows = pd.DataFrame({"id": ["a", "b"], "text": [text] * 2})
    both, alone = (
        generate(model, tiny_tokenizer, r, max_new_tokens=LIMIT, steering=scans)["response"]
        for r in (rows, rows[:1])
    )
    assert both[0] == both[1] == alone[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_ablation_leaves_its_share_of_what_is_written(family, strength, tiny_tokenizer, prompts):
    """The component along d is (1 − s) times what embeddings, attention and MLP write."""
    model, d = make_model(family, seed=2), unit()
    rows, written = encode_prompts(tiny_tokenizer, prompts[:1]), []
    blocks, scale = decoder_layers(model), getattr(model.config, "residual_multiplier", 1.0)
    note = [
        blocks[0].register_forward_pre_hook(
            lambda _m, a, k: written.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
    ]
    note += [
        m.register_forward_hook(
            lambda _m, _a, out: written.append(scale * (out if torch.is_tensor(out) else out[0]))
        )
        for block in blocks
        for m in writers(block)
    ]  # these see what is written before it is edited
    with ablated(model, d, strength):
        after = residuals(model, rows, last_tokens(3))
    for hook in note:
        hook.remove()
    assert len(written) == 1 + 2 * len(blocks)
    whole = sum(w.detach().reshape(-1, 32)[-3:] for w in written) @ d
    assert whole.abs().max() > 1e-2
    torch.testing.assert_close(after[-1, 0] @ d, (1 - strength) * whole, rtol=1e-4, atol=1e-5)
    if strength == 1.0:
        assert (after @ d).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_surgical_generation_equals_whole_passes(family, tiny_tokenizer, table):
    """With the common prefix cached under ablation, tokens are those of whole passes under it."""
    model, surgical = make_model(family, seed=3), surgical_of(unit())
    texts = [f"tell me what the time is in my house , {t}" for t in table["text"]]
    table = table.assign(text=texts)
    options = {"max_new_tokens": LIMIT, "batch_size": 4, "steering": surgical}
    ours = generate(model, tiny_tokenizer, table, **options)["response"].tolist()
    rows = encode_prompts(tiny_tokenizer, texts)
    with torch.no_grad(), ablated(model, unit()):
        expected = [
            slow(tiny_tokenizer, ids, lambda row: model(torch.tensor([row])).logits[0])
            for ids in rows
        ]
        alone = np.concatenate([refusal_score(model, tiny_tokenizer, [t]) for t in texts])
    assert ours == expected
    np.testing.assert_allclose(surgical.score(model, tiny_tokenizer, texts), alone, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_untouched_afterwards(family, tiny_tokenizer, table, prompts):
    model = make_model(family, seed=3)
    row = torch.tensor(encode_prompts(tiny_tokenizer, prompts[:1]))
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    with torch.no_grad():
        before = model(row).logits
    anchors = {
        "harmful": pd.DataFrame({"text": prompts[:3]}),
        "harmless": pd.DataFrame({"text": prompts[3:]}),
    }
    validation = pd.DataFrame({"text": prompts, "label": ["toxic", "general"] * 3})
    scans = Scans.fit(model, tiny_tokenizer, anchors, validation, SteeringConfig())
    for steering in (scans, surgical_of(unit())):
        generate(model, tiny_tokenizer, table, max_new_tokens=2, steering=steering)
        steering.score(model, tiny_tokenizer, prompts)
    shifts = {0: torch.ones(6, 32)}
    with pytest.raises(KeyboardInterrupt), ablated(model, unit()), shifted(model, shifts):
        assert any(m._forward_hooks for m in model.modules())
        raise KeyboardInterrupt
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(before, model(row).logits)
    assert all(torch.equal(weights[n], p) for n, p in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_are_the_librarys_states_of_one_prompt_at_a_time(family, tiny_tokenizer, prompts):
    """Single tokens and means, behind a shared beginning; the last block's output is unnormed."""
    model = make_model(family)
    rows = encode_prompts(tiny_tokenizer, [f"tell me what the time is in {p}" for p in prompts])
    places = [(-1, None), (-4, -3), (9, -2)]
    found = residuals(model, rows, places)
    for n, row in enumerate(rows):
        with torch.no_grad():
            states = model(torch.tensor([row]), output_hidden_states=True).hidden_states
        for layer in range(4):
            expected = torch.stack([states[layer][0, slice(*p)].mean(0) for p in places])
            torch.testing.assert_close(found[layer, n], expected, rtol=1e-3, atol=1e-4)
    assert found.shape[0] == 5


# ---- fits recover what was planted --------------------------------------------------------------


def sentences(verb: str) -> list[str]:
    things = "cat dog house bike bread file story plan".split()
    return [f"{verb} the {thing} in my {other} ." for thing in things for other in things[:2]]


def frame(*verbs: str) -> pd.DataFrame:
    rows = [(v, t) for v in verbs for t in sentences(v)]
    return pd.DataFrame(rows, columns=["label", "text"]).replace({"label": {"steal": "toxic"}})


def test_scans_recovers_a_planted_direction_and_classifies(tiny_tokenizer):
    model, d = make_model(seed=4), unit()
    hooks = plant(model, tiny_tokenizer, "steal", 1, d)
    anchors, held = {"harmful": frame("steal"), "harmless": frame("bake")}, frame("steal", "fix")
    try:
        scans = Scans.fit(model, tiny_tokenizer, anchors, held, SteeringConfig(scans_alpha=1.0))
    finally:
        for hook in hooks:
            hook.remove()
    assert float(scans.tensors["vectors"][1] @ d) > 0.99
    assert scans.facts["auroc"] > 0.9 and scans.facts["n"] == 32
    again = Scans.load(dict(scans.facts), dict(scans.tensors))
    assert again.settings == scans.settings != scans.at(0.5).settings


def test_what_scans_says_does_not_hang_on_what_it_was_asked_before(tiny_tokenizer):
    first, second, prompts = make_model(seed=4), make_model(seed=9), sentences("list")
    anchors, held = {"harmful": frame("steal"), "harmless": frame("bake")}, frame("steal", "fix")
    scans = Scans.fit(first, tiny_tokenizer, anchors, held, SteeringConfig())
    fresh = Scans.load(scans.facts, scans.tensors).harmfulness(second, tiny_tokenizer, prompts)
    assert not np.allclose(scans.harmfulness(first, tiny_tokenizer, prompts), fresh)
    np.testing.assert_array_equal(scans.harmfulness(second, tiny_tokenizer, prompts), fresh)


def test_a_killed_score_of_scans_goes_on_where_its_prompts_had_been_answered(
    tiny_tokenizer, tmp_path, monkeypatch
):
    """Kept batches are found by the order of the passes: the one who goes on runs the same ones."""
    model, read = make_model(seed=4), refusal.log_odds
    prompts = [text for verb in ("list", "kill", "bake", "tell") for text in sentences(verb)]
    anchors, held = {"harmful": frame("steal"), "harmless": frame("bake")}, frame("steal", "fix")
    scans = Scans.fit(model, tiny_tokenizer, anchors, held, SteeringConfig())
    again = Scans.load(scans.facts, scans.tensors)
    whole = scans.score(model, tiny_tokenizer, prompts)
    calls: list[int] = []

    def killed(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(refusal, "log_odds", killed)
    with pytest.raises(KeyboardInterrupt), keeping(tmp_path):
        scans.score(model, tiny_tokenizer, prompts)
    assert list(tmp_path.glob("batches/*"))
    with keeping(tmp_path):
        np.testing.assert_allclose(again.score(model, tiny_tokenizer, prompts), whole, atol=1e-6)


def test_surgical_recovers_a_planted_direction_orthogonal_to_refusal(tiny_tokenizer):
    """Harmful prompts carry r, pseudo-harmful ones r and w: what is cut is w."""
    model, w = make_model(seed=4), unit()
    r = orthogonal(unit(seed=6), w)
    hooks = plant(model, tiny_tokenizer, "steal kill", 1, r)
    hooks += plant(model, tiny_tokenizer, "kill", 1, w)
    anchors = {"harmful": frame("steal"), "pseudo": frame("kill"), "harmless": frame("bake")}
    tail = template_ends(tiny_tokenizer)[1]
    try:
        every, few = (
            Surgical.fit(
                model, tiny_tokenizer, anchors, None, SteeringConfig(surgical_candidates=n)
            )
            for n in (0, 2)
        )
        means = [
            residuals(model, encode_prompts(tiny_tokenizer, sentences(v)), last_tokens(tail)).mean(
                1
            )
            for v in ("steal", "kill", "bake")
        ]
    finally:
        for hook in hooks:
            hook.remove()
    direction = orthogonal(means[1] - means[2], means[0] - means[2])
    assert float(direction[2, -1] @ w) > 0.99
    facts = every.facts
    assert few.facts["candidates"] == 2 and few.facts["refusal_score"] >= facts["refusal_score"]
    assert facts["kl"] <= 0.2 and facts["candidates"] == 3 * tail and facts["layer"] < 3


def test_token_odds():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    expected = torch.tensor([0.75, 0.3])
    torch.testing.assert_close(token_odds(logits, [0, 1]), torch.log(expected / (1 - expected)))


def test_orthogonal_takes_out_the_share_of_lambda():
    w, r = torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0])
    torch.testing.assert_close(orthogonal(w, r), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(orthogonal(w, r, 0.0), torch.tensor([0.6, 0.8]))


def test_threshold_is_the_best_cut():
    facts = choose_threshold(np.array([0.1, 0.2, 0.6, 0.7]), np.array([False, False, True, True]))
    assert 0.2 < facts["threshold"] < 0.6 and facts["balanced_accuracy"] == facts["auroc"] == 1.0
    with pytest.raises(DCRError, match="both classes"):
        choose_threshold(np.array([0.1]), np.array([True]))


def test_bad_input(tiny_llama, tiny_tokenizer):
    empty, one = pd.DataFrame({"text": []}), pd.DataFrame({"text": ["list the dog ."]})
    with pytest.raises(DCRError, match="0 harmful and 1 harmless"):
        anchors = {"harmful": empty, "harmless": one}
        Scans.fit(tiny_llama, tiny_tokenizer, anchors, one, SteeringConfig())
    with pytest.raises(DCRError, match="at least 2"):
        anchors = dict.fromkeys(Surgical.ANCHORS, one)
        Surgical.fit(tiny_llama, tiny_tokenizer, anchors, one, SteeringConfig())
    with pytest.raises(DCRError, match="no attention or MLP"):
        writers(torch.nn.ModuleDict({"mixer": torch.nn.Linear(1, 1)}))
