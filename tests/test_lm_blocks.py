"""Decoder blocks, the truncated forward pass, pooling; rows as batches and behind the prefix that
they share."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from conftest import FAMILIES, make_model

from dcr.errors import DCRError
from dcr.lm.batches import (
    behind,
    common_prefix,
    padded,
    position_ids,
    run_prefix,
    shared_inputs,
    token_batches,
)
from dcr.lm.blocks import (
    decoder_layers,
    decoder_stack,
    fingerprint,
    is_linear,
    pool,
    resolve_layer,
    truncated_forward,
)

HEAD = [5, 9, 31, 17, 40, 22, 8, 60, 61, 62, 63, 64]
# Of very different lengths, the longest longer than every window below.
ROWS = [[*HEAD, *range(70, 70 + n)] for n in (1, 4, 15, 30)]


def block_output(model, layer, row):
    """[seq, hidden] of block `layer`, the library's forward pass of one row alone."""
    kept = []
    handle = decoder_layers(model)[layer - 1].register_forward_hook(
        lambda _m, _a, out: kept.append(out if torch.is_tensor(out) else out[0])
    )
    with torch.no_grad():
        model(torch.tensor([row]))
    handle.remove()
    return kept[0][0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [9, 64])
def test_a_row_in_a_batch_is_the_row_alone(family, side, window):
    """Every token of every row, with the shared prefix run once and without; windows shorter than
    the prefix too."""
    if window == 9 and family not in ("gemma3", "mistral", "phi3"):
        pytest.skip("no sliding window")
    model = make_model(family, window=window)
    ids, mask = padded(ROWS, side)
    for layer in (1, 3):
        with torch.no_grad():
            batched = {s: truncated_forward(model, ids, mask, layer, shared=s) for s in (0, 12)}
        for i, row in enumerate(ROWS):
            expected = block_output(model, layer, row)
            for hidden in batched.values():
                torch.testing.assert_close(
                    hidden[i][mask[i].bool()], expected, rtol=1e-4, atol=1e-5
                )
    assert len(decoder_layers(model)) == 4  # restored


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_behind_a_shared_prefix_are_those_without(family, side):
    model = make_model(family, window=9)
    ids, mask = padded(ROWS, side)

    def gradients(shared):
        model.zero_grad()
        hidden = truncated_forward(model, ids, mask, 3, shared=shared)
        (pool(hidden, mask).pow(2).sum() + (hidden * mask[..., None]).sin().sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole, behind_prefix = gradients(0), gradients(12)
    assert whole.keys() == behind_prefix.keys()
    largest = max(float(g.abs().max()) for g in whole.values())
    for name, gradient in whole.items():
        assert (gradient - behind_prefix[name]).abs().max() < 1e-5 * largest, name


def test_logits_behind_a_prefix_are_those_of_the_last_columns(tiny_llama):
    ids, mask = padded(ROWS, "right")
    inputs = shared_inputs(decoder_stack(tiny_llama), ids, mask, 12)
    logits = tiny_llama(**inputs).logits
    width = inputs["input_ids"].shape[1]
    assert width == ids.shape[1] - 12 == logits.shape[1]
    whole = tiny_llama(ids, attention_mask=mask, position_ids=position_ids(mask)).logits
    real = mask[:, -width:].bool()
    torch.testing.assert_close(logits[real], whole[:, -width:][real], rtol=1e-4, atol=1e-5)
    tiny_llama.gradient_checkpointing_enable()
    tiny_llama.train()  # the library drops the cache under checkpointing, so nothing is shared
    assert shared_inputs(decoder_stack(tiny_llama), ids, mask, 12)["input_ids"].shape == ids.shape


def test_a_model_without_a_cache_shares_no_prefix():
    """It would read the rest of each row as if nothing stood before it, and say nothing."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, n_embd=32, n_layer=4, n_head=4, n_positions=64)
    model = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes)).eval()
    ids, mask = padded(ROWS, "right")
    with torch.no_grad():
        whole, shared = (truncated_forward(model, ids, mask, 2, shared=s) for s in (0, 12))
    torch.testing.assert_close(shared, whole)


def test_a_prefix_serves_many_batches(tiny_llama):
    stack = decoder_stack(tiny_llama)
    with torch.no_grad():
        cache = run_prefix(stack, torch.tensor([HEAD]))
        kept = [layer.keys.clone() for layer in cache.layers]
        for rows in (ROWS[:2], ROWS[2:], ROWS):
            ids, mask = padded(rows)
            last = stack(**behind(cache, ids, mask)).last_hidden_state[:, -1]
            for i, row in enumerate(rows):
                alone = stack(torch.tensor([row])).last_hidden_state[0, -1]
                torch.testing.assert_close(last[i], alone, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b.keys) for a, b in zip(kept, cache.layers, strict=True))


def test_common_prefix_leaves_every_row_its_last_tokens():
    assert common_prefix(ROWS) == 12
    assert (
        common_prefix([HEAD, [*HEAD, 1]]) == 11
    )  # a row that is the prefix itself keeps one token
    assert common_prefix(ROWS, keep=3) == 10
    assert common_prefix(ROWS, at_least=13) == 0 == common_prefix(ROWS[:1])
    assert common_prefix([[1, 2, 3], [1, 2, 4]], at_least=1) == 2


def test_token_batches_cover_every_row_once_inside_their_bounds():
    assert token_batches([3, 9, 1, 9, 4], 2) == [[1, 3], [4, 0], [2]]
    assert token_batches([3, 9, 1, 9, 4], max_tokens=9) == [[1], [3], [4, 0], [2]]
    assert token_batches([3, 9, 1, 9, 4], 1, 100) == [[1], [3], [4], [0], [2]]
    assert token_batches([50, 1], max_tokens=10) == [[0], [1]]  # a row is never left out
    for bad in ({}, {"batch_size": -1}, {"batch_size": 2, "max_tokens": -1}):
        with pytest.raises(DCRError, match="at least 1"):
            token_batches([1], **bad)


def test_padding_counts_in_no_position():
    ids, mask = padded([[7], [7, 8, 9]])
    assert ids.tolist() == [[0, 0, 7], [7, 8, 9]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert position_ids(mask).tolist() == [[0, 0, 0], [0, 1, 2]]
    assert padded([[7], [7, 8]], "right")[1].tolist() == [[1, 0], [1, 1]]


def test_truncated_forward_does_not_run_the_tail(tiny_llama):
    ran = []
    for i, block in enumerate(decoder_layers(tiny_llama)):
        block.register_forward_hook(lambda *_a, i=i: ran.append(i))
    tiny_llama.lm_head.register_forward_hook(lambda *_a: ran.append("head"))
    truncated_forward(tiny_llama, *padded(ROWS), layer=2)
    assert ran == [0, 1]


def test_last_layer_is_before_the_final_norm(tiny_llama):
    ids, mask = padded(ROWS[:1])
    raw = truncated_forward(tiny_llama, ids, mask, layer=4)
    final = tiny_llama(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(tiny_llama.model.norm(raw), final)
    assert not torch.allclose(raw, final)


def test_layer_override_and_its_error(tiny_llama):
    assert decoder_layers(tiny_llama, "model.layers") is tiny_llama.model.layers
    with pytest.raises(DCRError, match="layer override.*model.layers"):
        decoder_layers(tiny_llama, "nowhere.blocks")


def test_linear_layers_of_every_family():
    for family in FAMILIES:
        assert sum(map(is_linear, decoder_layers(make_model(family))[0].modules())) >= 4, family


@pytest.mark.parametrize(
    "layer, expected",
    [
        (0.5, 15),
        (0.75, 22),
        (22, 22),
        (30, 30),
        (1, 1),
        (1.0, 30),
        (0.01, None),
        (0, None),
        (31, None),
    ]
    + [(1.5, None), (-0.2, None), ("mid", None), (True, None)],
)
def test_resolve_layer(layer, expected):
    if expected is None:
        with pytest.raises(DCRError, match="refine.layer"):
            resolve_layer(layer, 30)
    else:
        assert resolve_layer(layer, 30) == expected


def test_pooling_by_mask():
    hidden = torch.arange(2 * 3 * 1.0).reshape(2, 3, 1)
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert pool(hidden, mask).flatten().tolist() == [2.0, 4.0]
    assert pool(hidden, mask, "mean").flatten().tolist() == [1.5, 3.5]
    with pytest.raises(DCRError, match="pooling"):
        pool(hidden, mask, "first")


def test_a_fingerprint_is_the_same_wherever_the_folder_lies(folder, tmp_path):
    found = set()
    for place in (folder, shutil.copytree(folder, tmp_path / "elsewhere")):
        model = transformers.AutoModelForCausalLM.from_pretrained(place)
        found.add(fingerprint(model, transformers.AutoTokenizer.from_pretrained(place)))
    assert len(found) == 1


def test_a_fingerprint_holds_the_configuration(tiny_llama, tiny_tokenizer):
    before = fingerprint(tiny_llama, tiny_tokenizer)
    tiny_llama.config.use_cache = False  # as training leaves it
    assert fingerprint(tiny_llama, tiny_tokenizer) == before
    tiny_llama.config.rms_norm_eps = 0.5
    assert fingerprint(tiny_llama, tiny_tokenizer) != before
