"""Pooled hidden states of all layers in one pass per batch (PAPER "Motivation", item 4).

Pooling happens inside the hooks, so memory holds one batch's full states at a time, whatever the number of prompts. The
tokens with which all prompts begin (the chat template) run once; every batch goes on from their keys and values.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from dcr.errors import DCRError
from dcr.lm.batches import common_prefix, position_ids, token_batches
from dcr.lm.blocks import layers_holder, pool
from dcr.lm.chat import render

log = logging.getLogger("dcr")
MIN_SHARED = 8  # common first tokens from which running them once pays


@dataclass(frozen=True)
class HiddenStates:
    """values [layers + 1, n, hidden] fp32: 0 the embeddings, ℓ the output of block ℓ, the last after the final norm."""

    values: np.ndarray
    pooling: str

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return self.values.shape[0] - 1

    def layer(self, layer: int) -> np.ndarray:
        """[n, hidden] at one layer."""
        return np.asarray(self.values[layer])


def check_lengths(
    model,
    lengths: Sequence[int],
    prompts: Sequence[str],
    max_length: int | None = None,
    truncate: bool = False,
) -> int:
    """The token limit of a prompt: `max_length`, else the model's context. Raises DCRError naming the first prompt over
    it unless `truncate` is set."""
    config = model.config.get_text_config()
    limit = max_length or getattr(config, "max_position_embeddings", None) or max(lengths)
    for i, n in enumerate(lengths):
        if n > limit and not truncate:
            raise DCRError(
                f"prompt {i} has {n} tokens, the context holds {limit}: {prompts[i][:60]!r}... Shorten it "
                "or ask for truncation (truncate=True)."
            )
    return limit


@torch.no_grad()
def hidden_states(
    model,
    tokenizer,
    prompts: Sequence[str],
    *,
    pooling: str = "last",
    batch_size: int = 32,
    out: str | Path | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    padding_side: str = "left",
    layers_path: str = "",
) -> HiddenStates:
    """Hidden states of every layer, pooled over the prompt's tokens ("last" real token or "mean").

    As the library's `output_hidden_states`, one prompt at a time: the last layer has the final norm applied.
    With `out` (a folder) states are written as they come and an interrupted call goes on from there.
    Raises DCRError for no prompts, a prompt over the context length (unless `truncate`), or states that are not
    finite (naming the prompt; finished batches are kept in `out`).
    """
    if not len(prompts):
        raise DCRError("hidden_states: no prompts given.")
    texts = render(tokenizer, prompts)
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    limit = check_lengths(model, [len(r) for r in rows], prompts, max_length, truncate)
    rows = [r[-limit:] if padding_side == "left" else r[:limit] for r in rows]
    shared = common_prefix(rows, at_least=MIN_SHARED)
    holder, name = layers_holder(model, layers_path)
    blocks = getattr(holder, name)
    values, done = _buffers(
        out,
        len(blocks) + 1,
        len(texts),
        model.config.get_text_config().hidden_size,
        _fingerprint([*texts, str(limit)], pooling, model) if out else "",
    )
    device = next(model.parameters()).device
    state: dict = {}
    hooks = [
        blocks[0].register_forward_pre_hook(
            lambda _m, args, kwargs: _keep(state, 0, args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    ]
    hooks += [
        block.register_forward_hook(lambda _m, _a, result, i=i: _keep(state, i + 1, result))
        for i, block in enumerate(blocks)
    ]
    try:
        batches = [
            b for b in token_batches([len(r) for r in rows], batch_size) if not done[b].all()
        ]
        state["pooling"], cache, head = "mean", None, 0.0
        if shared and batches:
            ids = torch.tensor([rows[0][:shared]], device=device)
            state["mask"] = torch.ones_like(ids)
            result = holder(input_ids=ids, use_cache=True)
            _keep(state, len(blocks), result.last_hidden_state)
            cache, head = (
                result.past_key_values,
                np.stack([state[i] for i in range(len(blocks) + 1)]),
            )  # [layers + 1, 1, hidden]
        state["pooling"] = pooling
        for batch in tqdm(batches, desc="hidden states", unit="batch", leave=False):
            inputs = tokenizer.pad(
                {"input_ids": [rows[i][shared:] for i in batch]},
                padding=True,
                padding_side=padding_side,
                return_tensors="pt",
            ).to(device)
            mask = state["mask"] = inputs["attention_mask"]
            whole = torch.cat([mask.new_ones(len(batch), shared), mask], 1)
            final = holder(
                input_ids=inputs["input_ids"],
                attention_mask=whole,
                position_ids=position_ids(whole)[:, shared:],
                past_key_values=_repeated(cache, len(batch)),
                use_cache=cache is not None,
            )
            _keep(state, len(blocks), final.last_hidden_state)
            block = np.stack([state[i] for i in range(len(blocks) + 1)])
            if pooling == "mean" and shared:
                own = mask.sum(1).cpu().numpy()[:, None]
                block = (head * shared + block * own) / (shared + own)
            bad = ~np.isfinite(block).all(axis=(0, 2))
            if bad.any():
                kept = (
                    f"{int(done.sum())} finished prompts are kept in {out}"
                    if out is not None
                    else "nothing is kept without `out`"
                )
                raise DCRError(
                    f"hidden states of prompt {batch[int(bad.argmax())]} are not finite; load the model in "
                    f"float32 or look at that prompt ({kept})."
                )
            values[:, batch] = block
            done[batch] = True
    finally:
        for hook in hooks:
            hook.remove()
    return HiddenStates(values, pooling)


def _repeated(cache, n: int):
    """A copy of one row's keys and values for n rows."""
    if cache is None:
        return None
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(n)
    return cache


def _keep(state: dict, index: int, result) -> None:
    hidden = result if torch.is_tensor(result) else result[0]
    state[index] = pool(hidden, state["mask"], state["pooling"]).float().cpu().numpy()


def _fingerprint(texts: Sequence[str], pooling: str, model) -> str:
    """What stored states depend on: texts, pooling and every weight (two sums of each tensor)."""
    weights = [
        (n, float(p.detach().sum(dtype=torch.float64)), float(p.detach().float().norm()))
        for n, p in model.named_parameters()
    ]
    return hashlib.sha256(json.dumps([list(texts), pooling, weights]).encode()).hexdigest()


def _buffers(out: str | Path | None, layers: int, n: int, hidden: int, fingerprint: str):
    if out is None:
        return np.empty((layers, n, hidden), dtype=np.float32), np.zeros(n, dtype=bool)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    meta, paths = folder / "meta.json", (folder / "values.npy", folder / "done.npy")
    if meta.exists() and json.loads(meta.read_text())["fingerprint"] == fingerprint:
        return np.load(paths[0], mmap_mode="r+"), np.load(paths[1], mmap_mode="r+")
    values = np.lib.format.open_memmap(paths[0], "w+", np.float32, (layers, n, hidden))
    done = np.lib.format.open_memmap(paths[1], "w+", bool, (n,))
    meta.write_text(json.dumps({"fingerprint": fingerprint}))
    return values, done
