"""Decoding of token rows behind their common prefix, under steering or not.

The tokens with which all rows begin run once and are shared by every batch; rows that have stopped
leave it. Both change speed only: in fp32 the tokens are those of the library's plain greedy search,
row by row.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dcr.errors import DCRError
from dcr.lm.batches import CACHE, Passes, common_prefix, position_ids
from dcr.lm.chat import stop_tokens
from dcr.lm.device import sizes


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

    def passes_over(self, model, rows: Sequence[Sequence[int]]) -> Passes:
        """Passes over the prompts' rows; what they share is read now, and under steering."""
        with self.during(None, True):
            return Passes(model, rows, common_prefix(rows, keep=max(1, self.tail)))


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
        self.passes = self.steering.passes_over(model, rows)

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
        rows, chance = list(batch), [self._chance(i) for i in batch]
        out: dict[int, list[int]] = {i: [] for i in batch}
        inputs = self.passes.inputs(batch, DynamicCache(config=self.model.config.get_text_config()))
        mask, cache = inputs["attention_mask"], inputs[CACHE]
        for step in range(self.options.max_new_tokens):
            with self.steering.during(rows, step == 0):
                logits = self.model(**inputs, logits_to_keep=1).logits[:, -1]  # [rows, vocabulary]
            if logits.isnan().any():  # whose largest is the vocabulary's first token
                raise DCRError("the model's logits are not numbers; load it in fp32.")
            tokens = self._choose(logits, chance)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                out[row].append(token)
            alive = [i for i, row in enumerate(rows) if out[row][-1] not in self.stops]
            if not alive:
                break
            if len(alive) < len(rows):  # rows that have stopped leave the batch
                keep = torch.tensor(alive, device=tokens.device)
                cache.batch_select_indices(keep)
                mask, tokens = mask[keep], tokens[keep]
                rows, chance = [rows[i] for i in alive], [chance[i] for i in alive]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            inputs |= {
                "input_ids": tokens[:, None],
                "attention_mask": mask,
                "position_ids": position_ids(mask)[:, -1:],
            }
        return list(out.values())

    def _chance(self, row: int) -> torch.Generator:
        """A row's own source: its sample depends neither on its batch nor on earlier answers."""
        name = f"{self.options.seed} {self.rows[row]}".encode()
        return torch.Generator().manual_seed(int(hashlib.sha256(name).hexdigest()[:15], 16))

    def _choose(self, logits: Tensor, chance: Sequence[torch.Generator]) -> Tensor:
        if self.options.temperature == 0:
            return logits.argmax(-1)
        probability = (logits.float() / self.options.temperature).softmax(-1)
        noise = [torch.empty(logits.shape[-1]).exponential_(generator=g) for g in chance]
        return (probability / torch.stack(noise).to(probability)).argmax(-1)  # an exact sample


@contextlib.contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Linear layers of a model on an x86 CPU through oneDNN, their weights in its own layout.

    A fifth to a half faster at the few rows of a decoding step; not for gradients. Takes the memory
    of the weights once more, so a model of over a quarter of the machine's is left as it is.
    """
    size, weights = sizes(model)
    fits = next(model.parameters()).device.type == "cpu" and weights <= size // 4
    plain = (m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m))
    with contextlib.ExitStack() as changed:
        with contextlib.suppress(AttributeError, RuntimeError):  # a torch without it, another CPU
            for layer in plain if fits else ():
                weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
                forward = functools.partial(_packed_linear, weight, layer.bias)
                changed.enter_context(mock.patch.object(layer, "forward", forward))
        yield


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
