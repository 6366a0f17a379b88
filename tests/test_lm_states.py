"""Hidden states against the library's own, one prompt at a time; resume, memory, bad input."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FAMILIES, make_model

from dcr.errors import DCRError
from dcr.lm import batches
from dcr.lm import states as module
from dcr.lm.blocks import in_precision
from dcr.lm.chat import encode_prompts
from dcr.lm.states import hidden_states

LONG = [
    f"tell me what the time is in my house and list the {x} ."
    for x in (
        "dog",
        "cat and the bike",
        "bread",
        "cat . write a story about the cat and the dog in it",
    )
]


def oracle(model, tokenizer, prompts, pooling="last"):
    """[layers + 1, n, hidden] of the library, one prompt at a time."""
    rows = []
    for row in encode_prompts(tokenizer, prompts):
        with torch.no_grad():
            states = model(torch.tensor([row]), output_hidden_states=True).hidden_states
        rows.append([(s[0, -1] if pooling == "last" else s[0].mean(0)).numpy() for s in states])
    return np.array(rows).transpose(1, 0, 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("texts", ["short", "long behind a prefix", "beyond the window"])
def test_equals_the_library_one_prompt_at_a_time(family, texts, tiny_tokenizer, prompts):
    model = make_model(family, window=9 if texts == "beyond the window" else 64)
    prompts = prompts if texts == "short" else LONG
    for pooling in ("last", "mean"):
        ours = hidden_states(model, tiny_tokenizer, prompts, pooling=pooling, batch_size=3)
        expected = oracle(model, tiny_tokenizer, prompts, pooling)
        assert np.abs(ours - expected).max() / np.abs(expected).max() < 1e-5


def test_a_long_common_beginning_runs_once(tiny_llama, tiny_tokenizer):
    widths = []
    tiny_llama.model.layers[0].register_forward_hook(
        lambda _m, args, _o: widths.append(args[0].shape[1])
    )
    hidden_states(tiny_llama, tiny_tokenizer, LONG[:3])
    assert len(widths) == 2 and widths[0] >= 12 and widths[1] < 12


def test_series_and_tables_are_prompts_too(tiny_llama, tiny_tokenizer, prompts):
    expected = hidden_states(tiny_llama, tiny_tokenizer, prompts)
    for given in (pd.Series(prompts, index=range(5, 11)), pd.DataFrame({"text": prompts})):
        np.testing.assert_array_equal(hidden_states(tiny_llama, tiny_tokenizer, given), expected)
    with pytest.raises(DCRError, match="one string"):
        hidden_states(tiny_llama, tiny_tokenizer, "how do i")


def test_killed_run_goes_on_where_it_was(
    tmp_path, tiny_llama, tiny_tokenizer, prompts, monkeypatch
):
    calls, pool = [], module.pool

    def dies(*args):
        calls.append(1)
        if len(calls) > 8:  # in the second of three batches
            raise KeyboardInterrupt
        return pool(*args)

    monkeypatch.setattr(module, "pool", dies)
    with pytest.raises(KeyboardInterrupt):
        hidden_states(tiny_llama, tiny_tokenizer, prompts, batch_size=2, out=tmp_path)
    done = np.load(tmp_path / "done.npy").copy()
    assert 0 < done.sum() < len(prompts)
    again = []
    monkeypatch.setattr(module, "pool", lambda *args: again.append(1) or pool(*args))
    result = hidden_states(tiny_llama, tiny_tokenizer, prompts, batch_size=2, out=tmp_path)
    assert len(again) == 2 * 6  # of the two batches that were missing
    expected = oracle(tiny_llama, tiny_tokenizer, prompts)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_other_prompts_do_not_reuse_stored_states(tmp_path, tiny_llama, tiny_tokenizer, prompts):
    first = np.array(hidden_states(tiny_llama, tiny_tokenizer, prompts[:2], out=tmp_path))
    second = np.array(hidden_states(tiny_llama, tiny_tokenizer, prompts[2:4], out=tmp_path))
    assert not np.allclose(first, second)


def test_bad_input(tiny_llama, tiny_tokenizer, prompts):
    with pytest.raises(DCRError, match="no rows"):
        hidden_states(tiny_llama, tiny_tokenizer, [])
    table = pd.DataFrame({"id": ["a", "b", "c"], "text": ["how ?", "list .", prompts[4]]})
    tiny_llama.config.max_position_embeddings = 12
    with pytest.raises(
        DCRError, match=r"prompt 2 \(id 'c': 'tell me.*12 fit; or ask for truncate=True"
    ):
        hidden_states(tiny_llama, tiny_tokenizer, table)
    cut = hidden_states(tiny_llama, tiny_tokenizer, prompts, truncate=True)
    assert cut.shape[1] == len(prompts)
    with torch.no_grad():
        tiny_llama.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(DCRError, match="not finite"):
        hidden_states(tiny_llama, tiny_tokenizer, prompts, truncate=True)


def test_states_that_are_not_finite_stop_and_keep_what_was_finished(
    tmp_path, tiny_llama, tiny_tokenizer
):
    """Only the prompt with the broken word is bad; batches before it stay and are not run again."""
    prompts = ["tell me what the time is in my house ?", "write a story about the cat .", "steal ."]
    broken = tiny_tokenizer.convert_tokens_to_ids("steal")
    with torch.no_grad():
        good = tiny_llama.model.embed_tokens.weight[broken].clone()
        tiny_llama.model.embed_tokens.weight[broken] = float("inf")
    for _ in range(2):  # the second call goes on where the first stopped
        with pytest.raises(
            DCRError, match="prompt 2 .*are not finite.*2 finished prompts are kept"
        ):
            hidden_states(tiny_llama, tiny_tokenizer, prompts, batch_size=1, out=tmp_path)
    assert np.load(tmp_path / "done.npy").tolist() == [True, True, False]
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[broken] = good
    mended = hidden_states(tiny_llama, tiny_tokenizer, prompts, batch_size=1, out=tmp_path)
    expected = oracle(tiny_llama, tiny_tokenizer, prompts)
    np.testing.assert_allclose(mended, expected, rtol=1e-4, atol=1e-5)


def test_any_changed_weight_makes_stored_states_stale(
    tmp_path, tiny_llama, tiny_tokenizer, prompts
):
    first = np.array(hidden_states(tiny_llama, tiny_tokenizer, prompts, out=tmp_path))
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[3, 3] += 0.5
    second = np.array(hidden_states(tiny_llama, tiny_tokenizer, prompts, out=tmp_path))
    assert not np.array_equal(first, second)
    expected = oracle(tiny_llama, tiny_tokenizer, prompts)
    np.testing.assert_allclose(second, expected, rtol=1e-4, atol=1e-5)


def test_states_of_another_precision_are_not_reused(tmp_path, tiny_llama, tiny_tokenizer, prompts):
    """Weights published in bf16 are the same numbers in fp32; the states are not."""
    for parameter in tiny_llama.parameters():
        parameter.data = parameter.data.bfloat16().float()
    first = np.array(hidden_states(tiny_llama, tiny_tokenizer, prompts, out=tmp_path))
    with in_precision(tiny_llama, "bf16"):
        second = np.array(hidden_states(tiny_llama, tiny_tokenizer, prompts, out=tmp_path))
        expected = hidden_states(tiny_llama, tiny_tokenizer, prompts)
    assert np.array_equal(second, expected) and not np.array_equal(first, second)


def test_memory_holds_one_batch_at_a_time(
    tmp_path, tiny_llama, tiny_tokenizer, prompts, monkeypatch
):
    """With `out` nothing of the size of all prompts is held: results go to a file mapped into
    memory."""
    sizes, pool = [], module.pool
    monkeypatch.setattr(module, "pool", lambda h, *a: sizes.append(h.shape[0]) or pool(h, *a))
    result = hidden_states(tiny_llama, tiny_tokenizer, prompts, batch_size=2, out=tmp_path)
    assert isinstance(result, np.memmap) and result.shape == (5, 6, 32)
    assert max(sizes) == 2
    sizes.clear()
    hidden_states(tiny_llama, tiny_tokenizer, prompts, max_tokens_per_batch=13)
    assert max(sizes) == 1
    stack = tiny_llama.model.forward

    def small(*args, input_ids, **kwargs):
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stack(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(tiny_llama.model, "forward", small)
    halved = hidden_states(tiny_llama, tiny_tokenizer, prompts, batch_size=6)
    np.testing.assert_allclose(halved, result, rtol=1e-4, atol=1e-5)


def test_an_unknown_architecture_is_helped_by_the_layer_override(
    tiny_llama, tiny_tokenizer, prompts
):
    expected = hidden_states(tiny_llama, tiny_tokenizer, prompts[:2])
    named = hidden_states(tiny_llama, tiny_tokenizer, prompts[:2], layers_path="model.layers")
    np.testing.assert_array_equal(named, expected)
    lists = r"no decoder blocks at model.blocks.*layers_path.*lists found: \['model.layers'\]"
    with pytest.raises(DCRError, match=lists):
        hidden_states(tiny_llama, tiny_tokenizer, prompts[:2], layers_path="model.blocks")


def test_linear_attention_shares_no_prefix(tiny_llama, tiny_tokenizer, monkeypatch):
    """Blocks that hold a state instead of keys cannot go on from another row's."""
    expected = oracle(tiny_llama, tiny_tokenizer, LONG)
    assert batches.can_share(tiny_llama.model)
    monkeypatch.setattr(tiny_llama.config, "layer_types", ["linear_attention"] * 4, raising=False)
    assert not batches.can_share(tiny_llama.model)
    ours = hidden_states(tiny_llama, tiny_tokenizer, LONG)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_file_for_states_is_told(tmp_path, tiny_llama, tiny_tokenizer):
    (tmp_path / "f").write_text("x")
    with pytest.raises(DCRError, match="could not be written"):
        hidden_states(tiny_llama, tiny_tokenizer, ["sing ."], out=tmp_path / "f")
