"""What steering methods share: forward hooks as context managers, readings of the residual stream.

Hooks come off on exit; no weight is written. Blocks are those of `dcr.lm.blocks.decoder_layers`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from dcr.analysis.refusal import refusal_score
from dcr.config import SteeringConfig
from dcr.data.files import content_key
from dcr.errors import DCRError
from dcr.lm.batches import (
    behind,
    can_share,
    common_prefix,
    padded,
    run_prefix,
    token_batches,
    tokens_that_fit,
)
from dcr.lm.blocks import decoder_layers, decoder_stack
from dcr.lm.chat import encode_prompts
from dcr.lm.decode import Unsteered

Edit = Callable[[Tensor], Tensor]
Place = tuple[int, int | None]  # start and stop of a slice of a row's tokens
Fit = tuple[dict, dict[str, Tensor]]  # facts, tensors
ATTENTION, FEED_FORWARD = ("self_attn", "attention", "attn"), ("mlp", "feed_forward", "ffn", "fc2")
BATCH = 32
SCRIPT = '''"""An answer under steering: python use.py "a prompt" (needs dcr-kit)."""
import json, pathlib, sys
from safetensors.torch import load_file
from dcr import generate, load_model
from dcr.steering import KINDS
here = pathlib.Path(__file__).parent
facts, tensors = json.loads((here / "steering.json").read_text()), here / "steering.safetensors"
steering = KINDS[facts.pop("kind")].load(facts, load_file(tensors))
print(generate(*load_model(str(here)), [sys.argv[1]], steering=steering)["response"][0])
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
        return encode_prompts(self.tokenizer, self.anchors[role]["text"].tolist())

    def residuals(self, rows: Sequence[Sequence[int]], places: Sequence[Place], **options):
        """`residuals` of the model."""
        return residuals(self.model, rows, places, layers_path=self.layers_path, **options)


@dataclass(frozen=True)
class Steering:
    """A fitted method. Subclasses give `fitted`, and `start`, which decoding and scoring run.

    facts: plain values, what was chosen and from what; tensors: the rest of the fit.
    """

    ANCHORS: ClassVar[tuple[str, ...]] = ()  # roles of `dcr.data.sets.anchors` that it reads
    SEEDED: ClassVar[bool] = False  # whether the fit depends on the seed
    script: ClassVar[str] = SCRIPT  # use.py of an exported folder

    facts: dict
    tensors: dict[str, Tensor]
    strength: float = 1.0
    layers_path: str = ""

    @classmethod
    def fit(cls, *material: Any, base: object = None, **options: Any) -> Self:
        """A fit from what `Material` holds, in its order (none of these methods reads `base`).

        Raises DCRError for prompts that do not do.
        """
        on = Material(*material, **options)
        return cls.load(*cls.fitted(on), layers_path=on.layers_path)

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
        """The same at another strength; 0 leaves the model as it is."""
        return replace(self, strength=strength)

    def start(self, model, tokenizer, prompts: list[str]) -> Unsteered:
        """Steering of these prompts (see `dcr.lm.decode`)."""
        return Unsteered()

    def score(self, model, tokenizer, prompts: Sequence[str]) -> np.ndarray:
        """[n] how inclined the steered model is to refuse: log odds of its refusal openings."""
        return refusal_score(model, tokenizer, prompts, steering=self)


@contextlib.contextmanager
def edited(
    outputs: Sequence[tuple[nn.Module, Edit]] = (), inputs: Sequence[tuple[nn.Module, Edit]] = ()
) -> Iterator[None]:
    """Replace the (first) output or input of modules by `edit(tensor)`, [batch, seq, hidden]."""

    def at_output(edit: Edit):
        return lambda _m, _a, out: edit(out) if torch.is_tensor(out) else (edit(out[0]), *out[1:])

    def at_input(edit: Edit):
        def change(_module, args, kwargs):
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

        return change

    with contextlib.ExitStack() as handles:
        for module, edit in outputs:
            handles.callback(module.register_forward_hook(at_output(edit)).remove)
        for module, edit in inputs:
            hook = module.register_forward_pre_hook(at_input(edit), with_kwargs=True)
            handles.callback(hook.remove)
        yield


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


@contextlib.contextmanager
def ablated(
    model: nn.Module, direction: Tensor, strength: float = 1.0, layers_path: str = ""
) -> Iterator[None]:
    """Take `strength` times the component along unit `direction` [hidden] out of the stream.

    x ← x − s (x·d) d at the embeddings and at all that a block writes, everywhere; the stream's
    component is then (1 − s) times what is written. At strength 1 that is ablation at every block
    input, attention and MLP output, as published (Wang et al., ICLR 2025).
    """

    def edit(x: Tensor) -> Tensor:
        d = direction.to(x)
        return x - strength * (x @ d).unsqueeze(-1) * d

    blocks = decoder_layers(model, layers_path)
    written = [(module, edit) for block in blocks for module in writers(block)]
    with edited(written, [(blocks[0], edit)]):
        yield


@contextlib.contextmanager
def shifted(
    model: nn.Module, shifts: dict[int, Tensor], tail: int = 0, layers_path: str = ""
) -> Iterator[None]:
    """Add shifts[i] [batch, hidden] to the output of block i at the last `tail` tokens (0: all)."""
    layers = decoder_layers(model, layers_path)

    def edit_for(shift: Tensor) -> Edit:
        def edit(x: Tensor) -> Tensor:
            return torch.cat([x[:, :-tail], x[:, -tail:] + shift.to(x)[:, None]], 1)

        return edit if tail else lambda x: x + shift.to(x)[:, None]

    with edited([(layers[i], edit_for(shift)) for i, shift in shifts.items()]):
        yield


def template_ends(tokenizer) -> tuple[int, int]:
    """(tokens before every prompt's text, tokens behind it) that the chat template puts there.

    Raises DCRError where there are none behind: no end-of-instruction token to steer or read from.
    """
    a, b = encode_prompts(tokenizer, ["cat", "is it 7 ?"])
    head, tail = (
        next((i for i, (x, y) in enumerate(zip(p, q, strict=False)) if x != y), min(len(a), len(b)))
        for p, q in ((a, b), (a[::-1], b[::-1]))
    )
    if not tail:
        raise DCRError("the chat template puts nothing behind a prompt: no token to steer from.")
    return head, tail


@torch.no_grad()
def residuals(  # noqa: PLR0913
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    places: Sequence[Place],
    *,
    at: str = "output",
    layers: Sequence[int] = (),
    layers_path: str = "",
) -> Tensor:
    """[layers, n, places, hidden] fp32: the residual stream at blocks' outputs (or `at="input"`).

    places: slices of a row's tokens, each averaged; (-1, None) is the last token. layers: numbers
    of blocks from 0 (default: all). The last block's output is before the final norm; the LM head
    does not run.
    """
    blocks, kept, order = decoder_layers(model, layers_path), [], []
    numbers, seen = list(layers) or range(len(blocks)), dict[int, Tensor]()
    starts = [start for start, _ in places]
    shared = common_prefix(rows, keep=max(1, -min(starts)))
    shared = min([shared, *(start for start in starts if start >= 0)])

    def note(i: int) -> Edit:
        return lambda x: seen.update({i: _averaged(x, lengths, places).float()}) or x

    stack, hooks = decoder_stack(model, layers_path), [(blocks[i], note(i)) for i in numbers]
    for batch, inputs in _batches(stack, rows, shared):
        lengths = inputs["position_ids"][:, -1] + 1
        with edited(**{"outputs" if at == "output" else "inputs": hooks}):
            stack(**inputs)
        kept.append(torch.stack([seen[i] for i in numbers]).cpu())
        order += batch
    return torch.cat(kept, 1)[:, np.argsort(order)]


@torch.no_grad()
def last_logits(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """[n, vocabulary] fp32 logits of the first answer token."""
    parts, order = [], []
    for batch, inputs in _batches(model, rows, common_prefix(rows)):
        parts.append(model(**inputs, logits_to_keep=1).logits[:, -1].float())
        order += batch
    return torch.cat(parts)[np.argsort(order)]


def last_tokens(n: int) -> list[Place]:
    """The last n tokens, each a place of its own."""
    return [(-i, 1 - i or None) for i in range(n, 0, -1)]


def _batches(
    stack: nn.Module, rows: Sequence[Sequence[int]], shared: int
) -> Iterator[tuple[list[int], dict]]:
    """(numbers of rows, arguments of their forward pass), padded on the left."""
    device, cache = next(stack.parameters()).device, None
    if shared and can_share(stack):
        cache, _ = run_prefix(stack, torch.tensor([rows[0][:shared]], device=device))
    for batch in token_batches([len(r) for r in rows], BATCH, tokens_that_fit(stack)):
        yield batch, behind(cache, *padded([rows[i] for i in batch], device=device))


def _averaged(x: Tensor, lengths: Tensor, places: Sequence[Place]) -> Tensor:
    """[batch, seq, hidden], padded on the left → [batch, places, hidden]; lengths [batch]."""
    token = torch.arange(x.shape[1], device=x.device) - (x.shape[1] - lengths[:, None])
    means = []
    for start, stop in places:
        first = start if start >= 0 else lengths[:, None] + start
        end = lengths[:, None] + (stop or 0)
        own = ((token >= first) & (token < end)).unsqueeze(-1)  # [batch, seq, 1]
        means.append((x * own).sum(1) / own.sum(1).clamp(min=1))
    return torch.stack(means, 1)
