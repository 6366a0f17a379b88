"""Rows of token ids as batches: bounded, padded, behind the first tokens that they share.

Chat prompts all begin with the template's head. It runs once, as one row; every batch goes on from
its keys and values. A cached row stands right before its own tokens (padding is outermost on both
sides), so that a model reads the row without a gap: positions, causal masks and sliding windows are
those of the row alone.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import pandas as pd
import torch
from torch import Tensor

from dcr.errors import DCRError

log = logging.getLogger("dcr")
Result = TypeVar("Result")

MIN_SHARED = 8  # common first tokens from which running them once pays
PLAIN_ATTENTION = {"full_attention", "sliding_attention"}


def token_batches(
    lengths: Sequence[int], batch_size: int = 0, max_tokens: int = 0
) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first (one too large fails at once).

    A batch holds at most `batch_size` rows and, padded, at most `max_tokens` tokens (0: no bound),
    but at least one row.
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
    """(input_ids, attention_mask), both [batch, seq]. Padding is token 0 (masked: any id does)."""
    lengths = torch.tensor([len(r) for r in rows])
    columns = torch.arange(int(lengths.max()))
    if side == "left":
        columns = columns.flip(0)
    mask = columns < lengths[:, None]  # [batch, seq]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([i for row in rows for i in row])
    return ids.to(device), mask.long().to(device)


def position_ids(attention_mask: Tensor) -> Tensor:
    """[batch, seq] positions that count real tokens only: left padding does not shift them."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def common_prefix(
    rows: Sequence[Sequence[int]], *, keep: int = 1, at_least: int = MIN_SHARED
) -> int:
    """Number of first tokens that all rows share, each keeping its last `keep` to itself.

    0 where there are fewer than `at_least`: running them once does not pay.
    """
    if len(rows) < 2:
        return 0
    first, last = min(map(list, rows)), max(map(list, rows))
    pairs = enumerate(zip(first, last, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))
    shared = min(shared, min(map(len, rows)) - keep)
    return shared if shared >= at_least else 0


def can_share(stack) -> bool:
    """Whether `stack` can go on from another row's cache.

    It needs plain attention in every block, and no gradient checkpointing (which drops caches).
    """
    kinds = getattr(stack.config.get_text_config(), "layer_types", None) or ()
    checkpointed = stack.training and getattr(stack, "is_gradient_checkpointing", False)
    return set(kinds) <= PLAIN_ATTENTION and not checkpointed


def run_prefix(stack, ids: Tensor):
    """(keys and values, output) of the first tokens `ids` [1, shared], with gradients if enabled.

    stack: the decoder without head (`blocks.decoder_stack`) or the whole model. No layer drops what
    has left its window: a row that is shorter than others of its batch still needs it.
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
    """Arguments of a forward pass over what follows the cached tokens of padded rows [batch, seq].

    Every row begins, at its first real token, with the cached ones. The last seq − shared columns
    run; a short left-padded row runs its last shared tokens again in place of padding. `cache`
    (None: nothing is shared) stays as it is, and gradients flow through it.
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
    """[1, shared, ...] of the common first tokens → [batch, shared, ...], for padded rows.

    A row starts where `attention_mask` [batch, seq] has its first real token; the columns before it
    hold anything.
    """
    start, shared = attention_mask.long().argmax(1), first.shape[1]
    if not start.any():
        return first.expand(len(start), *first.shape[1:])  # a view; nothing writes into it
    columns = (torch.arange(shared, device=start.device) - start[:, None]).clamp(min=0)
    return first[0].index_select(0, columns.flatten()).unflatten(0, columns.shape)


def shared_inputs(stack, input_ids: Tensor, attention_mask: Tensor, shared: int) -> dict:
    """`behind` the rows' first `shared` tokens, which run once now: all rows' gradients reach them.

    For training: one call a batch. Without sharing (`shared` 0, a stack that cannot) the rows run
    whole; the width of `input_ids` in the result says which of the last columns have an output.
    """
    cache = None
    if shared and can_share(stack):
        begin = int(attention_mask[0].argmax())
        cache, _ = run_prefix(stack, input_ids[:1, begin : begin + shared])
    return behind(cache, input_ids, attention_mask)


def out_of_memory(error: Exception) -> bool:
    """Whether a device had no room, also where cuDNN or cuBLAS say so as an internal error."""
    from accelerate.utils.memory import should_reduce_batch_size

    hints = ("mha_graph.execute", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or should_reduce_batch_size(error)
        or any(hint in str(error) for hint in hints)
    )


def tokens_that_fit(model, *, training: bool = False, checkpointing: bool = False) -> int:
    """Tokens of a batch whose activations take a third of what the device holds beside the weights.

    By the device's size and not by what is free at the moment, so that two runs cut alike. In
    training a block keeps about 20 hidden and 6 feed-forward values a token (4 bytes each; after
    Korthikanti et al. 2022, section 4), with `checkpointing` its input and one block's at a time;
    without gradients one block's and the keys and values.
    """
    config = model.config.get_text_config()
    hidden, blocks = config.hidden_size, config.num_hidden_layers
    block = 20 * hidden + 6 * (getattr(config, "intermediate_size", None) or 4 * hidden)
    values = blocks * block if training and not checkpointing else block + 2 * blocks * hidden
    size, weights = sizes(model)
    return max(256, int((size - weights) / 3 / (4 * values)))


def sizes(model) -> tuple[int, int]:
    """(memory of the model's device, of its weights), bytes."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "mps":
        size = torch.mps.recommended_max_memory()
    else:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return size, sum(p.numel() * p.element_size() for p in model.parameters())


def in_memory(
    batches: Sequence[list[int]], run: Callable[[list[int]], Result]
) -> Iterator[tuple[list[int], Result]]:
    """(batch, run(batch)) of each; where memory runs out, that batch and all later ones in halves.

    That happens once, with a warning. Raises DCRError when half a batch does not fit either.
    """
    waiting, halved = deque(batches), False
    full: Exception | None
    while waiting:
        batch, full = waiting.popleft(), None
        try:
            result = run(batch)
        except Exception as error:
            if not out_of_memory(error):
                raise
            full = error.with_traceback(None)  # lets go of what the failed pass held
        if full is None:
            yield batch, result
            continue
        if halved or len(batch) == 1:
            raise DCRError(
                f"memory does not suffice for {len(batch)} rows at once ({str(full)[:120]}). Lower "
                "the batch size or max_tokens_per_batch, or free the device of other programs."
            ) from full
        halved = True
        log.warning("memory ran out at %d rows: going on with batches of half the size", len(batch))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        halves = [(b[: (len(b) + 1) // 2], b[(len(b) + 1) // 2 :]) for b in (batch, *waiting)]
        waiting = deque(half for pair in halves for half in pair if half)


def fitted(
    model,
    rows: Sequence[list[int]],
    prompts: pd.DataFrame,
    max_length: int | None = None,
    *,
    truncate: bool = False,
    room: int = 0,
) -> list[list[int]]:
    """Token rows of prompts (columns id, text), each within the model's context.

    max_length: a lower limit. room: new tokens that must fit behind a row. truncate: keep the last
    tokens of a row that is too long. Raises DCRError naming the first prompt that is too long, or
    holds a token for which the model has no embedding.
    """
    config, known = model.config.get_text_config(), model.get_input_embeddings().weight.shape[0]
    limit = max_length or getattr(config, "max_position_embeddings", None) or sys.maxsize
    limit -= room
    for i, row in enumerate(rows):
        if len(row) > limit and not truncate:
            mend = (
                f" beside {room} new ones. Shorten it." if room else "; or ask for truncate=True."
            )
            raise DCRError(f"{named(prompts, i)} has {len(row)} tokens, {limit} fit{mend}")
        if max(row) >= known:
            raise DCRError(
                f"{named(prompts, i)} holds token {max(row)}, the model has {known} embeddings: "
                "the tokenizer is another model's."
            )
    return [row[-limit:] for row in rows]


def named(prompts: pd.DataFrame, row: int) -> str:
    """How messages call a prompt: its number, its id and its first words."""
    return f"prompt {row} (id {prompts['id'].iloc[row]!r}: {prompts['text'].iloc[row][:60]!r})"
