"""Rows of token ids as batches: bounded, padded, behind the first tokens that they share.

Chat prompts all begin with the template's head. It runs once, as one row; every batch goes on from
its keys and values. A cached row stands right before its own tokens (padding is outermost on both
sides), so that a model reads the row without a gap: positions, causal masks and sliding windows are
those of the row alone.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from dcr.errors import DCRError
from dcr.lm.device import Result, in_memory, tokens_that_fit

MIN_SHARED = 8  # common first tokens from which running them once pays
PLAIN_ATTENTION = {"full_attention", "sliding_attention"}
# What this transformers version calls the keys and values in a forward pass.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


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
    ids = pad_sequence([torch.tensor(row) for row in rows], True, padding_side=side)
    mask = pad_sequence([torch.ones(len(r), dtype=torch.long) for r in rows], True, 0, side)
    return ids.to(device), mask.to(device)


def position_ids(attention_mask: Tensor) -> Tensor:
    """[batch, seq] positions that count real tokens only: left padding does not shift them."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def common_prefix(
    rows: Sequence[Sequence[int]], *, keep: int = 1, at_least: int = MIN_SHARED
) -> int:
    """Number of first tokens that all rows share, but for the last `keep`; 0 below `at_least`."""
    if len(rows) < 2:
        return 0
    shared = len(os.path.commonprefix([list(row) for row in rows]))
    shared = min(shared, min(map(len, rows)) - keep)
    return shared if shared >= at_least else 0


def can_share(stack) -> bool:
    """Whether `stack` goes on from another row's cache: plain attention, not checkpointed."""
    kinds = getattr(stack.config.get_text_config(), "layer_types", None) or ()
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in stack.modules())
    return set(kinds) <= PLAIN_ATTENTION and not (stack.training and checkpointed)


def run_prefix(stack, ids: Tensor) -> DynamicCache | None:
    """Keys and values of the first tokens `ids` [1, shared], with gradients if enabled.

    None for no tokens, a stack that cannot share, or one that fills no cache (GPT-1). stack: the
    decoder without head (`blocks.decoder_stack`) or the whole model. No layer drops what has left
    its window: a row that is shorter than others of its batch still needs it.
    """
    if not ids.shape[1] or not can_share(stack):
        return None
    cache = DynamicCache()
    stack(input_ids=ids, use_cache=True, **{CACHE: cache})
    return cache if cache.get_seq_length() == ids.shape[1] else None


def behind(cache, input_ids: Tensor, attention_mask: Tensor) -> dict:
    """Arguments of a forward pass over what follows the cached tokens of padded rows [batch, seq].

    Every row begins, at its first real token, with the cached ones. The last seq − shared columns
    run; a short left-padded row runs its last shared tokens again in place of padding. `cache`
    (None: nothing is shared) stays as it is, and gradients flow through it.
    """
    positions = position_ids(attention_mask)
    shared = 0 if cache is None else cache.get_seq_length()
    inputs = {
        "input_ids": input_ids[:, shared:],
        "attention_mask": attention_mask,
        "position_ids": positions[:, shared:],
        "use_cache": cache is not None,
    }
    if cache is not None:
        inputs[CACHE] = placed = DynamicCache()
        for index, layer in enumerate(cache.layers):
            keys, values = (
                repeated(x.transpose(1, 2), attention_mask).transpose(1, 2)
                for x in (layer.keys, layer.values)
            )  # [batch, heads, shared, head size]
            placed.update(keys, values, index)
    return inputs


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
    begin = int(attention_mask[0].argmax())
    cache = run_prefix(stack, input_ids[:1, begin : begin + shared])
    return behind(cache, input_ids, attention_mask)


class Passes:
    """Token rows on their way through `stack`, in batches behind the tokens that all begin with.

    stack: the decoder without head (`blocks.decoder_stack`). shared: number of the common first
    tokens; they run once, now, within the contexts that are open. side: of the padding.
    """

    def __init__(
        self, stack, rows: Sequence[Sequence[int]], shared: int, side: str = "left"
    ) -> None:
        self.stack, self.rows, self.side = stack, rows, side
        self.device = next(stack.parameters()).device
        with torch.no_grad():
            first = torch.tensor([rows[0][:shared]], dtype=torch.long, device=self.device)
            self.cache = run_prefix(stack, first)

    def inputs(self, batch: Sequence[int], empty=None) -> dict:
        """Arguments of the pass over rows with these numbers.

        empty: the cache that this pass fills where nothing is shared (None: it fills none).
        """
        ids, mask = padded([self.rows[i] for i in batch], self.side, self.device)
        inputs = behind(self.cache, ids, mask)
        if self.cache is None and empty is not None:
            inputs |= {CACHE: empty, "use_cache": True}
        return inputs

    def run(
        self,
        call: Callable[[list[int]], Result],
        which: Sequence[int],
        batch_size: int,
        max_tokens: int = 0,
        new_tokens: int = 0,
    ) -> Iterator[tuple[list[int], Result]]:
        """(batch, call(batch)) of the rows with the numbers `which`, longest first.

        max_tokens: of a padded batch, `new_tokens` behind each row counted (0: what fits).
        """
        lengths = [len(self.rows[i]) + new_tokens for i in which]
        bound = max_tokens or tokens_that_fit(self.stack)
        batches = token_batches(lengths, batch_size, bound)
        yield from in_memory([[which[i] for i in batch] for batch in batches], call)

    def gather(self, call: Callable[[list[int]], Tensor], batch_size: int) -> Tensor:
        """`call(batch)` [batch, ...] of all rows in their order, [rows, ...]."""
        numbers, parts = zip(*self.run(call, range(len(self.rows)), batch_size), strict=True)
        order = torch.tensor([i for batch in numbers for i in batch]).argsort()
        return torch.cat([torch.as_tensor(part) for part in parts])[order]


def fitted(
    model,
    rows: Sequence[list[int]],
    prompts: pd.DataFrame,
    *,
    truncate: bool = False,
    room: int = 0,
) -> list[list[int]]:
    """Token rows of prompts (columns id, text), each within the model's context.

    room: new tokens that must fit behind a row. truncate: keep the last tokens of a row that is too
    long. Raises DCRError naming the first prompt that is too long, or holds a token for which the
    model has no embedding; or for a model that drops activations, as Trainer leaves it.
    """
    if any(isinstance(m, nn.Dropout) and m.training and m.p for m in model.modules()):
        raise DCRError("the model is in training mode: its dropout is on. Call model.eval() first.")
    config, known = model.config.get_text_config(), model.get_input_embeddings().weight.shape[0]
    limit = (getattr(config, "max_position_embeddings", None) or sys.maxsize) - room
    if limit < 1:
        raise DCRError(
            f"{room} new tokens leave a context of {limit + room} no room for a prompt: lower "
            "max_new_tokens."
        )
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
