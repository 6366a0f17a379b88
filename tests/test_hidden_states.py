"""Hidden states against the library's own, one prompt at a time; padding, resume, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import FAMILIES, make_model

from dcr.errors import DCRError
from dcr.lm import states as module
from dcr.lm.chat import encode, render
from dcr.lm.states import hidden_states


def oracle(model, tokenizer, prompts, pooling):
    rows = []
    for text in render(tokenizer, prompts):
        with torch.no_grad():
            states = model(**encode(tokenizer, [text]), output_hidden_states=True).hidden_states
        rows.append([(s[0, -1] if pooling == "last" else s[0].mean(0)).numpy() for s in states])
    return np.array(rows).transpose(1, 0, 2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [1, 8])
def test_equals_the_library_one_prompt_at_a_time(
    family, side, shared, tiny_tokenizer, prompts, monkeypatch
):
    """With the common first tokens run once (these prompts share only the template's one) and with everything run."""
    monkeypatch.setattr(module, "MIN_SHARED", shared)
    model = make_model(family)
    for pooling in ("last", "mean"):
        ours = hidden_states(
            model, tiny_tokenizer, prompts, pooling=pooling, batch_size=4, padding_side=side
        ).values
        expected = oracle(model, tiny_tokenizer, prompts, pooling)
        assert np.abs(ours - expected).max() / np.abs(expected).max() < 1e-5


def test_killed_run_goes_on_where_it_was(
    tmp_path, tiny_llama, tiny_tokenizer, prompts, monkeypatch
):
    calls, keep = [], module._keep

    def dies(state, index, result):
        calls.append(index)
        if len(calls) > 8:
            raise KeyboardInterrupt
        keep(state, index, result)

    monkeypatch.setattr(module, "_keep", dies)
    with pytest.raises(KeyboardInterrupt):
        hidden_states(tiny_llama, tiny_tokenizer, prompts, batch_size=2, out=tmp_path)
    done = np.load(tmp_path / "done.npy").copy()
    assert 0 < done.sum() < len(prompts)
    again = []

    def counts(state, index, result):
        again.append(index)
        keep(state, index, result)

    monkeypatch.setattr(module, "_keep", counts)
    result = hidden_states(tiny_llama, tiny_tokenizer, prompts, batch_size=2, out=tmp_path)
    assert again.count(1) == 2  # two of three batches were missing
    np.testing.assert_allclose(
        result.values, oracle(tiny_llama, tiny_tokenizer, prompts, "last"), rtol=1e-4, atol=1e-5
    )


def test_other_prompts_do_not_reuse_stored_states(tmp_path, tiny_llama, tiny_tokenizer, prompts):
    first = np.array(hidden_states(tiny_llama, tiny_tokenizer, prompts[:2], out=tmp_path).values)
    second = np.array(hidden_states(tiny_llama, tiny_tokenizer, prompts[2:4], out=tmp_path).values)
    assert not np.allclose(first, second)


def test_bad_input(tiny_llama, tiny_tokenizer, prompts, tmp_path):
    with pytest.raises(DCRError, match="no prompts"):
        hidden_states(tiny_llama, tiny_tokenizer, [])
    with pytest.raises(DCRError, match="prompt 2 has .* tokens, the context holds 12"):
        hidden_states(tiny_llama, tiny_tokenizer, ["how ?", "list .", prompts[4]], max_length=12)
    cut = hidden_states(tiny_llama, tiny_tokenizer, prompts, max_length=6, truncate=True)
    assert cut.values.shape[1] == len(prompts)
    with torch.no_grad():
        tiny_llama.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(DCRError, match="not finite"):
        hidden_states(tiny_llama, tiny_tokenizer, prompts)


def test_states_that_are_not_finite_stop_and_keep_what_was_finished(
    tmp_path, tiny_llama, tiny_tokenizer
):
    """Only the prompt with the broken word is bad; batches before it stay and are not run again."""
    prompts = ["tell me what the time is in my house ?", "write a story about the cat .", "steal ."]
    broken = tiny_tokenizer.convert_tokens_to_ids("steal")
    with torch.no_grad():
        good = tiny_llama.model.embed_tokens.weight[broken].clone()
        tiny_llama.model.embed_tokens.weight[broken] = float("inf")
    with pytest.raises(DCRError, match="prompt 2 are not finite.*2 finished prompts are kept"):
        hidden_states(tiny_llama, tiny_tokenizer, prompts, batch_size=1, out=tmp_path)
    done, values = np.load(tmp_path / "done.npy"), np.load(tmp_path / "values.npy")
    assert done.tolist() == [True, True, False]
    np.testing.assert_allclose(
        values[:, :2], oracle(tiny_llama, tiny_tokenizer, prompts[:2], "last"), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(
        DCRError, match="2 finished prompts"
    ):  # the same again: goes on where it stopped
        hidden_states(tiny_llama, tiny_tokenizer, prompts, batch_size=1, out=tmp_path)
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[broken] = good
    mended = hidden_states(tiny_llama, tiny_tokenizer, prompts, batch_size=1, out=tmp_path).values
    np.testing.assert_allclose(
        mended, oracle(tiny_llama, tiny_tokenizer, prompts, "last"), rtol=1e-4, atol=1e-5
    )


def test_any_changed_weight_makes_stored_states_stale(
    tmp_path, tiny_llama, tiny_tokenizer, prompts
):
    first = np.array(hidden_states(tiny_llama, tiny_tokenizer, prompts, out=tmp_path).values)
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[3, 3] += 0.5
    second = np.array(hidden_states(tiny_llama, tiny_tokenizer, prompts, out=tmp_path).values)
    assert not np.array_equal(first, second)
    np.testing.assert_allclose(
        second, oracle(tiny_llama, tiny_tokenizer, prompts, "last"), rtol=1e-4, atol=1e-5
    )


def test_memory_holds_one_batch_at_a_time(
    tmp_path, tiny_llama, tiny_tokenizer, prompts, monkeypatch
):
    """With `out` nothing of the size of all prompts is held: results go to a file mapped into memory."""
    result = hidden_states(tiny_llama, tiny_tokenizer, prompts * 5, batch_size=4, out=tmp_path)
    assert isinstance(result.values, np.memmap) and result.values.shape == (5, 30, 32)
    sizes = []
    keep = module._keep

    def notes(state, index, result) -> None:
        keep(state, index, result)
        sizes.append(state[index].shape[0])

    monkeypatch.setattr(module, "_keep", notes)
    hidden_states(tiny_llama, tiny_tokenizer, prompts, batch_size=2, out=tmp_path / "b")
    assert max(sizes) == 2


def test_an_unknown_architecture_is_helped_by_the_layer_override(
    tiny_llama, tiny_tokenizer, prompts
):
    expected = hidden_states(tiny_llama, tiny_tokenizer, prompts[:2]).values
    named = hidden_states(
        tiny_llama, tiny_tokenizer, prompts[:2], layers_path="model.layers"
    ).values
    np.testing.assert_array_equal(named, expected)
    with pytest.raises(
        DCRError,
        match=r"no decoder blocks at model.blocks.*layers_path.*lists found: \['model.layers'\]",
    ):
        hidden_states(tiny_llama, tiny_tokenizer, prompts[:2], layers_path="model.blocks")


def test_a_long_common_beginning_runs_once(tiny_llama, tiny_tokenizer):
    prompts = [
        f"tell me what the time is in my house and list the {x} ."
        for x in ("dog", "cat and the bike", "bread")
    ]
    widths = []
    handle = tiny_llama.model.layers[0].register_forward_hook(
        lambda _m, args, _o: widths.append(args[0].shape[1])
    )
    for pooling in ("last", "mean"):
        ours = hidden_states(tiny_llama, tiny_tokenizer, prompts, pooling=pooling).values
        seen = list(widths)
        expected = oracle(tiny_llama, tiny_tokenizer, prompts, pooling)
        widths.clear()
        assert len(seen) == 2 and seen[0] >= 12 and seen[1] < 12
        assert np.abs(ours - expected).max() / np.abs(expected).max() < 1e-5
    handle.remove()
