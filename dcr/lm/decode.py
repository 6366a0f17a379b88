"""Decoding of token rows behind their common prefix, under steering or not.

The tokens with which all rows begin run once and are shared by every batch; rows that have stopped
leave it. Both change speed only: in fp32 the tokens are those of the library, row by row.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dcr.lm.batches import Passes, cache_argument, common_prefix, position_ids
from dcr.lm.chat import stop_tokens
from dcr.lm.memory import sizes


@dataclass
class Unsteered:
    """Steering of some prompts under way; as it stands here, the model as it is.

    during(rows, first): in force around a forward pass over these prompts (None: the shared
    prefix); first: the pass reads the prompts, else a generated token of each.
    """

    tail: int = 0  # last tokens of every prompt that must not be in the shared prefix
    answers: Mapping[int, str] = field(default_factory=dict)  # of prompts that are not decoded
    prefill: Sequence[Sequence[int]] = ()  # or ids behind each prompt that are not in the answer
    during: Callable[[Sequence[int] | None, bool], contextlib.AbstractContextManager] = (
        lambda rows, first: contextlib.nullcontext()
    )


class Steering(Protocol):
    """What changes answers beside the weights (see `dcr.steering`)."""

    settings: dict  # plain values that tell one steering from another

    def start(self, model, tokenizer, prompts: list[str]) -> Unsteered:
        """Steering of these prompts, once before they are decoded."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: greedily, or sampled at `temperature`."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass
class State:
    """A batch under way: its rows' numbers, attention mask [rows, seq], cache, a source a row."""

    rows: list[int]
    mask: Tensor
    cache: Any
    chance: list[torch.Generator]


class Decoder:
    """Greedy or sampled decoding of token rows behind their common prefix."""

    def __init__(
        self,
        model,
        rows: Sequence[list[int]],
        stops: Sequence[int],
        options: Decoding,
        started: Unsteered | None = None,
    ) -> None:
        self.model, self.rows, self.stops, self.options = model, rows, set(stops), options
        self.steering = started or Unsteered()
        with self.steering.during(None, True):
            keep = max(1, self.steering.tail)
            self.passes = Passes(model, rows, common_prefix(rows, keep=keep))

    def batches(
        self, which: Sequence[int], batch_size: int, max_tokens: int = 0
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        """(numbers of rows, their new token ids) of one batch after the other, longest first."""
        new_tokens = self.options.max_new_tokens
        with packed(self.model):
            yield from self.passes.run(self.run, which, batch_size, max_tokens, new_tokens)

    @torch.no_grad()
    def run(self, batch: Sequence[int]) -> list[list[int]]:
        """New token ids of each row, the stop token included."""
        inputs = self.passes.inputs(batch, DynamicCache(config=self.model.config.get_text_config()))
        mask, cache = inputs["attention_mask"], inputs[cache_argument()]
        state = State(list(batch), mask, cache, [self._chance(i) for i in batch])
        out: dict[int, list[int]] = {i: [] for i in batch}
        for step in range(self.options.max_new_tokens):
            with self.steering.during(state.rows, step == 0):
                logits = self.model(**inputs, logits_to_keep=1).logits[:, -1]  # [rows, vocabulary]
            tokens = self._choose(logits, state)
            chosen = tokens.tolist()
            for row, token in zip(state.rows, chosen, strict=True):
                out[row].append(token)
            alive = [i for i, token in enumerate(chosen) if token not in self.stops]
            if not alive:
                break
            inputs = self._advance(state, tokens, alive)
        return list(out.values())

    def _advance(self, state: State, tokens: Tensor, alive: list[int]) -> dict:
        """Arguments of the pass over the chosen tokens; rows that have stopped leave the batch."""
        if len(alive) < len(tokens):
            keep = torch.tensor(alive, device=tokens.device)
            state.cache.batch_select_indices(keep)
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
        """A row's own source: its sample depends neither on its batch nor on earlier answers."""
        name = f"{self.options.seed} {self.rows[row]}".encode()
        return torch.Generator().manual_seed(int(hashlib.sha256(name).hexdigest()[:15], 16))

    def _choose(self, logits: Tensor, state: State) -> Tensor:
        if self.options.temperature == 0:
            return logits.argmax(-1)
        probability = (logits.float() / self.options.temperature).softmax(-1)
        noise = [torch.empty(logits.shape[-1]).exponential_(generator=g) for g in state.chance]
        return (probability / torch.stack(noise).to(probability)).argmax(-1)  # an exact sample


@contextlib.contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Linear layers of a model on an x86 CPU through oneDNN, their weights in its own layout.

    A fifth to a half faster at the few rows of a decoding step; not for gradients. Takes the memory
    of the weights once more, so a model of over a quarter of the machine's is left as it is.
    """
    size, weights = sizes(model)
    if next(model.parameters()).device.type != "cpu" or weights > size // 4:
        yield
        return
    plain = (m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m))
    changed: list[nn.Linear] = []
    try:
        with contextlib.suppress(AttributeError, RuntimeError):  # a torch without it, another CPU
            for layer in plain:
                weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
                vars(layer)["forward"] = functools.partial(_packed_linear, weight, layer.bias)
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            vars(layer).pop("forward", None)


def _packed_linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def decode(
    model, tokenizer, rows: Sequence[list[int]], *, max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Greedy new token ids behind each row of token ids, in the rows' order, stop included."""
    decoder = Decoder(model, rows, stop_tokens(model, tokenizer), Decoding(max_new_tokens))
    out: dict[int, list[int]] = {}
    for batch, outputs in decoder.batches(range(len(rows)), batch_size):
        out |= zip(batch, outputs, strict=True)
    return [out[i] for i in range(len(rows))]
