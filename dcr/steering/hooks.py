"""What steering methods share: how they are fitted and kept, and edits of the residual stream.

No weight is written. Blocks are those of `dcr.lm.blocks.decoder_layers`.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from dcr.analysis.refusal import refusal_score
from dcr.config import SteeringConfig
from dcr.data.files import content_key
from dcr.errors import DCRError
from dcr.lm.batches import common_prefix, fitted
from dcr.lm.blocks import decoder_layers, edited
from dcr.lm.chat import encode_prompts
from dcr.lm.decode import Unsteered
from dcr.lm.states import Place, residuals

Fit = tuple[dict, dict[str, Tensor]]  # facts, tensors
ATTENTION, FEED_FORWARD = ("self_attn", "attention", "attn"), ("mlp", "feed_forward", "ffn", "fc2")
SCRIPT = '''"""An answer under steering: python use.py "a prompt" (needs dcr-kit)."""
import json, pathlib, sys
from safetensors.torch import load_file
from dcr import generate, load_model
from dcr.data.sets import PLAIN_REFUSAL
from dcr.steering import KINDS
here, prompt = pathlib.Path(__file__).parent, sys.argv[1:]
facts, tensors = json.loads((here / "steering.json").read_text()), here / "steering.safetensors"
steering, answers = KINDS[facts.pop("kind")].load(facts, load_file(tensors)), here / "answers"
if answers.exists() and steering.refuses(*load_model(str(here)), prompt)[0]:
    answer = PLAIN_REFUSAL
elif answers.exists():  # the model there answers what this one lets through
    answer = generate(*load_model(str(answers)), prompt)["response"][0]
else:
    answer = generate(*load_model(str(here)), prompt, steering=steering)["response"][0]
print(answer)
'''


@dataclass(frozen=True)
class Material:
    """What a fit reads: a model, anchor prompts by role, validation prompts, options."""

    model: nn.Module
    tokenizer: object
    anchors: dict[str, pd.DataFrame]
    validation: pd.DataFrame
    options: SteeringConfig
    seed: int = 0
    layers_path: str = ""

    def rows(self, role: str) -> list[list[int]]:
        """Token ids of a role's anchors."""
        return rows_of(self.model, self.tokenizer, self.anchors[role]["text"].tolist())

    def residuals(self, rows: Sequence[Sequence[int]], places: Sequence[Place]) -> Tensor:
        """`lm.states.residuals` of the model."""
        return residuals(self.model, rows, places, self.layers_path)


@dataclass(frozen=True)
class Steering:
    """A fitted method. Subclasses give `fitted`, and `start`, which decoding and scoring run.

    facts: plain values, what was chosen and from what; tensors: the rest of the fit.
    """

    ANCHORS: ClassVar[tuple[str, ...]] = ()  # roles of `dcr.data.sets.anchors` that it reads
    SEEDED: ClassVar[bool] = False  # whether the fit depends on the seed
    LONG: ClassVar[bool] = False  # whether its passes are kept, so that it goes on after a kill
    script: ClassVar[str] = SCRIPT  # use.py of an exported folder

    facts: dict
    tensors: dict[str, Tensor]
    strength: float = 1.0
    layers_path: str = ""

    @classmethod
    def fit(cls, *material: Any, **options: Any) -> Self:
        """A fit from what `Material` holds, in its order. Raises DCRError for unfit prompts."""
        on = Material(*material, **options)
        return cls(*cls.fitted(on), layers_path=on.layers_path)

    @classmethod
    def fitted(cls, on: Material) -> Fit:
        """(facts, tensors) of a fit."""
        raise NotImplementedError

    @classmethod
    def load(cls, facts: dict, tensors: dict[str, Tensor], *, layers_path: str = "") -> Self:
        """The fit again from what was kept of it."""
        return cls(facts, tensors, layers_path=layers_path)

    @property
    def settings(self) -> dict:
        """What an answer depends on beside the weights."""
        sums = {n: t.cpu().double().sum().item() for n, t in self.tensors.items()}
        fit = content_key({"facts": self.facts, "sums": sums})
        return {"method": type(self).__name__, "strength": self.strength, "fit": fit}

    def at(self, strength: float) -> Self:
        """The same at another strength; at 0 nothing is moved and nothing refused."""
        return replace(self, strength=strength)

    def start(self, model, tokenizer, prompts: list[str]) -> Unsteered:
        """Steering of these prompts (see `dcr.lm.decode`)."""
        return Unsteered()

    def score(self, model, tokenizer, prompts: Sequence[str]) -> np.ndarray:
        """[n] how inclined the steered model is to refuse: log odds of its refusal openings."""
        return refusal_score(model, tokenizer, prompts, steering=self)


def rows_of(model, tokenizer, prompts: Sequence[str], room: int = 0) -> list[list[int]]:
    """Token ids of each prompt; of one that leaves the context no `room`, its last tokens."""
    table = pd.DataFrame({"id": range(len(prompts)), "text": prompts})
    rows = encode_prompts(tokenizer, table["text"].tolist())
    return fitted(model, rows, table, truncate=True, room=room)


def writers(block: nn.Module) -> list[nn.Module]:
    """The modules whose outputs a block adds to the stream: attention and MLP, or their norms.

    Raises DCRError for a block whose parts have unknown names.
    """
    if hasattr(block, "post_feedforward_layernorm"):  # Gemma normalises what they write
        return [block.get_submodule(f"post_{n}_layernorm") for n in ("attention", "feedforward")]
    return [part_of(block, ATTENTION), part_of(block, FEED_FORWARD)]


def part_of(block: nn.Module, names: Sequence[str]) -> nn.Module:
    """The first submodule of one of these names. Raises DCRError where there is none."""
    found = [getattr(block, n) for n in names if hasattr(block, n)]
    if not found:
        raise DCRError(
            f"{type(block).__name__}: no attention or MLP found among "
            f"{[n for n, _ in block.named_children()]}; known names: {', '.join(names)}."
        )
    return found[0]


def ablated(
    model: nn.Module, direction: Tensor, strength: float = 1.0, layers_path: str = ""
) -> contextlib.AbstractContextManager[None]:
    """Take `strength` times the component along unit `direction` [hidden] out of the stream.

    x ← x − s (x·d) d at the embeddings and at all that a block writes, everywhere; the stream's
    component is then (1 − s) times what is written. At strength 1 that is ablation at every block
    input, attention and MLP output, as published (Wang et al., ICLR 2025).
    """

    def edit(x: Tensor) -> Tensor:
        d = direction.to(x)
        return x - strength * (x @ d).unsqueeze(-1) * d

    blocks = decoder_layers(model, layers_path)
    return edited([(m, edit) for block in blocks for m in writers(block)], [(blocks[0], edit)])


def shifted(
    model: nn.Module, shifts: dict[int, Tensor], tail: int = 0, layers_path: str = ""
) -> contextlib.AbstractContextManager[None]:
    """Add shifts[i] [batch, hidden] to the output of block i at the last `tail` tokens (0: all)."""
    layers = decoder_layers(model, layers_path)

    def moved(x: Tensor, shift: Tensor) -> Tensor:  # of a tail of 0, x[:, :-0] is empty
        return torch.cat([x[:, :-tail], x[:, -tail:] + shift.to(x)[:, None]], 1)

    return edited([(layers[i], partial(moved, shift=shift)) for i, shift in shifts.items()])


def template_ends(tokenizer) -> tuple[int, int]:
    """(tokens before every prompt's text, tokens behind it) that the chat template puts there.

    Raises DCRError where there are none behind: no end-of-instruction token to steer or read from.
    """
    rows = encode_prompts(tokenizer, ["cat", "is it 7 ?"])
    turned = [row[::-1] for row in rows]
    head, tail = (common_prefix(r, keep=0, at_least=1) for r in (rows, turned))
    if not tail:
        raise DCRError("the chat template puts nothing behind a prompt: no token to steer from.")
    return head, tail
