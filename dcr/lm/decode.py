"""Decoding of token rows behind their common prefix, under steering or not.

The tokens with which all rows begin run once and are shared by every batch; rows that have stopped
leave the batch.
Both change speed only: in fp32 the tokens are those of the library, one prompt at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from dcr.lm.batches import (
    behind,
    cache_argument,
    can_share,
    common_prefix,
    in_memory,
    padded,
    position_ids,
    run_prefix,
    token_batches,
    tokens_that_fit,
)
from dcr.lm.blocks import decoder_stack
from dcr.lm.chat import stop_tokens


class Started(Protocol):
    """Steering of some prompts under way."""

    tail: int  # last tokens of every prompt that must not be in the shared prefix
    answers: Mapping[int, str]  # prompts that get this answer and are not decoded
    prefill: Sequence[
        Sequence[int]
    ]  # () or, for each prompt, ids put behind it that are no part of the answer

    def during(self, rows: Sequence[int] | None, first: bool) -> contextlib.AbstractContextManager:
        """In force around a forward pass over `rows` (numbers of the prompts; None: the shared
        prefix); `first`: the pass
        reads the prompts, else a generated token."""


class Steering(Protocol):
    """What changes answers beside the weights (see `dcr.steering`)."""

    settings: dict  # plain values that tell one steering from another

    def start(self, model, tokenizer, prompts: list[str]) -> Started:
        """Steering of these prompts, once before they are decoded."""


class Unsteered:
    """The model as it is."""

    tail = 0
    answers: Mapping[int, str] = MappingProxyType({})
    prefill: Sequence[Sequence[int]] = ()

    def during(self, rows: Sequence[int] | None, first: bool) -> contextlib.AbstractContextManager:
        """Nothing."""
        return contextlib.nullcontext()


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: greedily, or sampled at `temperature`."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass
class State:
    """A batch under way: numbers of its rows, attention mask [rows, seq], keys and values, a source
    of chance a row."""

    rows: list[int]
    mask: Tensor
    cache: object
    chance: list[torch.Generator]


class Decoder:
    """Greedy or sampled decoding of token rows behind their common prefix."""

    def __init__(
        self,
        model,
        rows: Sequence[list[int]],
        stops: Sequence[int],
        options: Decoding,
        started: Started | None = None,
    ) -> None:
        self.model, self.rows, self.stops, self.options = model, rows, set(stops), options
        self.steering = started or Unsteered()
        self.device = next(model.parameters()).device
        self.stack = decoder_stack(model)
        self.prefix = None
        if (shared := common_prefix(rows, keep=max(1, self.steering.tail))) and can_share(
            self.stack
        ):
            with torch.no_grad(), self.steering.during(None, True):
                self.prefix, _ = run_prefix(
                    self.stack, torch.tensor([rows[0][:shared]], device=self.device)
                )

    def batches(
        self, which: Sequence[int], batch_size: int, max_tokens: int = 0
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        """(numbers of the rows, their new token ids) of one batch after the other, longest prompts
        first."""
        lengths = [len(self.rows[i]) + self.options.max_new_tokens for i in which]
        bound = max_tokens or tokens_that_fit(self.model)
        batches = [[which[i] for i in b] for b in token_batches(lengths, batch_size, bound)]
        return in_memory(batches, self.run)

    @torch.no_grad()
    def run(self, batch: Sequence[int]) -> list[list[int]]:
        """New token ids of each row, the stop token included."""
        ids, mask = padded([self.rows[i] for i in batch], "left", self.device)
        inputs = behind(self.prefix, ids, mask)
        if self.prefix is None:
            from transformers import DynamicCache

            config = self.model.config.get_text_config()
            inputs |= {cache_argument(): DynamicCache(config=config), "use_cache": True}
        state = State(list(batch), mask, inputs[cache_argument()], [self._chance(i) for i in batch])
        active, out = list(range(len(batch))), [[] for _ in batch]  # type: ignore[var-annotated]
        for step in range(self.options.max_new_tokens):
            with self.steering.during(state.rows, step == 0):
                logits = self.model(**inputs, logits_to_keep=1).logits[:, -1]  # [rows, vocabulary]
            tokens = self._choose(logits, state)
            chosen = tokens.tolist()
            for row, token in zip(active, chosen, strict=True):
                out[row].append(token)
            alive = [i for i, token in enumerate(chosen) if token not in self.stops]
            if not alive:
                break
            active = [active[i] for i in alive]
            inputs = self._advance(state, tokens, alive)
        return out

    def _advance(self, state: State, tokens: Tensor, alive: list[int]) -> dict:
        """Arguments of the pass over the chosen tokens; rows that have stopped leave the batch."""
        if len(alive) < len(tokens):
            keep = torch.tensor(alive, device=self.device)
            state.cache.batch_select_indices(keep)  # type: ignore[attr-defined]
            state.mask, tokens = state.mask[keep], tokens[keep]
            state.rows = [state.rows[i] for i in alive]
            state.chance = [state.chance[i] for i in alive]
        state.mask = torch.cat([state.mask, state.mask.new_ones(len(tokens), 1)], 1)
        return {
            "input_ids": tokens[:, None],
            "attention_mask": state.mask,
            "position_ids": position_ids(state.mask)[:, -1:],
            cache_argument(): state.cache,
            "use_cache": True,
        }

    def _chance(self, row: int) -> torch.Generator:
        """A row's own source, so that a sample depends neither on its batch nor on what was
        answered before."""
        name = f"{self.options.seed} {self.rows[row]}".encode()
        return torch.Generator().manual_seed(int(hashlib.sha256(name).hexdigest()[:15], 16))

    def _choose(self, logits: Tensor, state: State) -> Tensor:
        if self.options.temperature == 0:
            return logits.argmax(-1)
        probability = (logits.float() / self.options.temperature).softmax(-1)
        noise = [torch.empty(logits.shape[-1]).exponential_(generator=g) for g in state.chance]
        return (probability / torch.stack(noise).to(probability)).argmax(-1)  # a sample (Gumbel)


def decode(
    model, tokenizer, rows: Sequence[list[int]], *, max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Greedy new token ids after each row of token ids, in the rows' order (stop token
    included)."""
    decoder = Decoder(model, rows, stop_tokens(model, tokenizer), Decoding(max_new_tokens))
    out: list[list[int]] = [[] for _ in rows]
    for batch, outputs in decoder.batches(range(len(rows)), batch_size):
        for i, tokens in zip(batch, outputs, strict=True):
            out[i] = tokens
    return out
