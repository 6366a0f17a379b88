"""Rows of token ids as batches: bounded, padded, behind the first tokens that they share.

Chat prompts all begin with the template's head. It runs once, as one row; every batch goes on from its keys and values.
A cached row stands right before its own tokens (padding is outermost on both sides), so that what a model reads is the
row without a gap: positions, causal masks and sliding windows are those of the row alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dcr.errors import DCRError

MIN_SHARED = 8  # common first tokens from which running them once pays
PLAIN_ATTENTION = {"full_attention", "sliding_attention"}


def token_batches(
    lengths: Sequence[int], batch_size: int = 0, max_tokens: int = 0
) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first (a batch too large for memory fails at once).

    A batch holds at most `batch_size` rows and, padded, at most `max_tokens` tokens (0: no bound), but at least one row.
    """
    if batch_size < 0 or max_tokens < 0 or not (batch_size or max_tokens):
        raise DCRError(f"batch_size={batch_size}, max_tokens={max_tokens}: give one of at least 1.")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    while order:
        fits = max_tokens // max(1, lengths[order[0]]) if max_tokens else len(order)
        size = max(1, min(fits, batch_size or fits))
        batches, order = [*batches, order[:size]], order[size:]
    return batches


def padded(
    rows: Sequence[Sequence[int]], side: str = "left", device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), each [batch, seq]. Padding is token 0: masked, so any id that has an embedding does."""
    width = max(map(len, rows))
    gaps = [[0] * (width - len(r)) for r in rows]
    pairs = list(zip(rows, gaps, strict=True))
    if side == "left":
        ids, mask = [[*g, *r] for r, g in pairs], [[*g, *[1] * len(r)] for r, g in pairs]
    else:
        ids, mask = [[*r, *g] for r, g in pairs], [[*[1] * len(r), *g] for r, g in pairs]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def position_ids(attention_mask: Tensor) -> Tensor:
    """[batch, seq] positions that count real tokens only, so that left padding does not shift them."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def common_prefix(
    rows: Sequence[Sequence[int]], *, keep: int = 1, at_least: int = MIN_SHARED
) -> int:
    """Number of first tokens that all rows share, leaving each its last `keep`; 0 where running them once does not pay."""
    if len(rows) < 2:
        return 0
    first, last = min(rows), max(rows)
    pairs = enumerate(zip(first, last, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))
    shared = min(shared, min(map(len, rows)) - keep)
    return shared if shared >= at_least else 0


def can_share(stack: nn.Module) -> bool:
    """Whether `stack` can go on from another row's cache: plain attention in every block, no gradient checkpointing."""
    kinds = getattr(stack.config.get_text_config(), "layer_types", None) or ()
    checkpointed = stack.training and getattr(stack, "is_gradient_checkpointing", False)
    return set(kinds) <= PLAIN_ATTENTION and not checkpointed


def run_prefix(stack: nn.Module, ids: Tensor):
    """(keys and values, output) of the first tokens `ids` [1, shared]; with gradients where they are on.

    stack: the decoder without head (`blocks.decoder_stack`) or the whole model. No layer's cache drops what has left its
    window: a row that is longer than the batch's shortest still needs it.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    return cache, stack(input_ids=ids, use_cache=True, **{cache_argument(): cache})


@functools.cache
def cache_argument() -> str:
    """What this transformers version calls the keys and values in a forward pass."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    known = CausalLMOutputWithPast.__dataclass_fields__
    return "cache" if "cache" in known else "past_key_values"


def behind(cache, input_ids: Tensor, attention_mask: Tensor) -> dict:
    """Arguments of a forward pass over what follows the cached first tokens of padded rows [batch, seq].

    Every row begins, at its first real token, with the cached ones. The last seq − shared columns run; a short
    left-padded row runs its last shared tokens again in place of padding. `cache` itself (None: nothing is shared) stays
    as it is, and gradients flow through it.
    """
    from transformers import DynamicCache

    inputs = {"attention_mask": attention_mask, "position_ids": position_ids(attention_mask)}
    if cache is None:
        return {"input_ids": input_ids, **inputs, "use_cache": False}
    shared, placed = cache.get_seq_length(), DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = (
            repeated(x.transpose(1, 2), attention_mask).transpose(1, 2)
            for x in (layer.keys, layer.values)
        )  # [batch, heads, shared, head size]
        placed.update(keys, values, index)
    return {
        "input_ids": input_ids[:, shared:],
        "attention_mask": attention_mask,
        "position_ids": inputs["position_ids"][:, shared:],
        cache_argument(): placed,
        "use_cache": True,
    }


def repeated(first: Tensor, attention_mask: Tensor) -> Tensor:
    """[1, shared, ...] of the common first tokens → [batch, shared, ...]: the first columns of the padded rows.

    Each row's start stands where `attention_mask` [batch, seq] has its first real token; columns before it hold anything.
    """
    start, shared = attention_mask.long().argmax(1), first.shape[1]
    if not start.any():
        return first.expand(len(start), *first.shape[1:])  # a view; nothing writes into it
    columns = (torch.arange(shared, device=start.device) - start[:, None]).clamp(min=0)
    return first[0].index_select(0, columns.flatten()).unflatten(0, columns.shape)


def shared_inputs(stack: nn.Module, input_ids: Tensor, attention_mask: Tensor, shared: int) -> dict:
    """`behind` the first `shared` tokens of the rows, which run once now: gradients reach them from every row.

    For training: one call a batch. Without sharing (`shared` 0, a stack that cannot) the rows run whole; the width of
    `input_ids` in the result says which of the last columns have an output.
    """
    cache = None
    if shared and can_share(stack):
        begin = int(attention_mask[0].argmax())
        cache, _ = run_prefix(stack, input_ids[:1, begin : begin + shared])
    return behind(cache, input_ids, attention_mask)
