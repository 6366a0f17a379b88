"""Activations and output gradients of every linear layer, block by block: the parts of gradient inner products.

The gradient of a logit in a weight matrix W of a linear layer is Σ_s δ_s a_sᵀ (output gradient, input activation).
Keeping the factors instead of the product is what lets the kernel run without one gradient vector in memory.
Blocks are visited from the top; only block inputs and the gradients at one block border are kept between visits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dcr.lm.blocks import is_linear, layers_holder


@dataclass
class Factors:
    """One prompt's share of one module. `delta` [k, seq, out]; `activation` [seq, in] or token `ids` [seq]."""

    delta: Tensor
    activation: Tensor | None = None
    ids: Tensor | None = None


@dataclass
class Trace:
    """What one prompt's forward pass leaves behind: block inputs, their other arguments, and the border gradient."""

    input_ids: Tensor
    inputs: list[Tensor]
    arguments: list[dict]
    head_input: Tensor  # [hidden], what the LM head reads at the last position
    border: Tensor  # [k, seq, hidden], gradient at the top block's output
    small: dict[str, Tensor] = field(
        default_factory=dict
    )  # [k, size] gradients of small top parameters


def trace(
    model, input_ids: Tensor, cotangents: Tensor, wanted: set[str], layers_path: str = ""
) -> Trace:
    """Run one prompt [1, seq] and pull `cotangents` [k, vocab] on the last logits back to the top block's output."""
    holder, name = layers_holder(model, layers_path)
    blocks = getattr(holder, name)
    inputs, arguments, kept, leaf = [], [], {}, {}

    def before(_module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        inputs.append(hidden.detach())
        arguments.append({k: v for k, v in kwargs.items() if k != "hidden_states"})
        kept["extra"] = args[1:]

    def top(_module, _args, result):
        hidden = result if torch.is_tensor(result) else result[0]
        leaf["top"] = hidden.detach().requires_grad_()
        return leaf["top"] if torch.is_tensor(result) else (leaf["top"], *result[1:])

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(top))
    hooks.append(
        model.get_output_embeddings().register_forward_pre_hook(
            lambda _m, args: kept.__setitem__("head", args[0][0, -1].detach())
        )
    )
    inside = {id(p) for p in blocks.parameters()}
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    small = [
        (n, p) for n, p in model.named_parameters() if n in wanted and id(p) not in inside | tables
    ]
    with grads_on(p for _, p in small), torch.enable_grad(), _removed(hooks):
        logits = model(input_ids=input_ids, use_cache=False).logits[0, -1]
        found = pulled_back(logits, [leaf["top"], *(p for _, p in small)], cotangents)
    grads = {n: f.flatten(1) for (n, _), f in zip(small, found[1:], strict=True)}
    return Trace(input_ids[0], inputs, arguments, kept["head"], found[0][:, 0], grads)


def step_down(
    block: nn.Module, prefix: str, index: int, state: Trace, wanted: set[str]
) -> dict[str, Factors | Tensor]:
    """Re-run one block and pull the border gradient through it. Updates `state.border`; returns factors by module.

    Keys are module names for linear layers (Factors) and parameter names for the rest ([k, size] gradients).
    """
    linear = {
        n: m for n, m in block.named_modules() if is_linear(m) and f"{prefix}.{n}.weight" in wanted
    }
    weights = {id(m.weight) for m in linear.values()}
    small = [
        (f"{prefix}.{n}", p)
        for n, p in block.named_parameters()
        if f"{prefix}.{n}" in wanted and id(p) not in weights
    ]
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        m.register_forward_hook(
            lambda _m, args, out, n=n: seen.__setitem__(n, (args[0].detach(), out))
        )
        for n, m in linear.items()
    ]
    start = state.inputs[index].detach().requires_grad_()
    with grads_on(p for _, p in small), torch.enable_grad(), _removed(hooks):
        result = block(start, **state.arguments[index])
        result = result if torch.is_tensor(result) else result[0]
        names = list(seen)
        sources = [start, *(seen[n][1] for n in names), *(p for _, p in small)]
        found = pulled_back(result, sources, state.border[:, None])
    out: dict[str, Factors | Tensor] = {}
    for name, delta in zip(names, found[1:], strict=False):
        out[f"{prefix}.{name}"] = Factors(delta[:, 0], seen[name][0][0])
    for (name, _), gradient in zip(small, found[1 + len(names) :], strict=True):
        out[name] = gradient.flatten(1)
    state.border = found[0][:, 0]
    return out


def at_embeddings(
    model, state: Trace, wanted: set[str], layers_path: str = ""
) -> dict[str, Factors | Tensor]:
    """Pull the border gradient from the first block's input to the embedding tables (and what lies between)."""
    holder, name = layers_holder(model, layers_path)
    first = getattr(holder, name)[0]
    tables = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Embedding) and f"{n}.weight" in wanted
    }
    if not tables:
        return {}
    seen, reached = {}, {}

    def look_up(_module, args, out, n):
        seen[n] = (
            args[0].detach().expand(state.input_ids.shape[0])
            if args[0].dim() == 1
            else args[0][0].detach(),
            out.detach().requires_grad_(),
        )
        return seen[n][1]

    class _Reached(Exception):
        pass

    def stop(_module, args, kwargs):
        reached["hidden"] = args[0] if args else kwargs["hidden_states"]
        raise _Reached

    hooks = [
        m.register_forward_hook(lambda m, a, o, n=n: look_up(m, a, o, n)) for n, m in tables.items()
    ]
    hooks.append(first.register_forward_pre_hook(stop, with_kwargs=True))
    with torch.enable_grad(), _removed(hooks), contextlib.suppress(_Reached):
        model(input_ids=state.input_ids[None], use_cache=False)
    names = list(seen)
    found = pulled_back(reached["hidden"], [seen[n][1] for n in names], state.border[:, None])
    scale = {
        n: float(getattr(tables[n], "embed_scale", 1.0)) for n in names
    }  # Gemma multiplies what it looks up
    return {
        n: Factors(f[:, 0] * scale[n], ids=seen[n][0]) for n, f in zip(names, found, strict=True)
    }


def pulled_back(result: Tensor, sources: list[Tensor], cotangents: Tensor) -> list[Tensor]:
    """Gradients of ⟨c, result⟩ in each source for all cotangents c [k, *result.shape] in one backward pass, [k, ...].

    One pass over k cotangents reads each weight matrix once, not k times. A source without influence gets zeros.
    """
    found = torch.autograd.grad(
        result, sources, cotangents.to(result.dtype), is_grads_batched=True, allow_unused=True
    )
    return [
        f.detach() if f is not None else s.new_zeros(len(cotangents), *s.shape)
        for f, s in zip(found, sources, strict=True)
    ]


@contextlib.contextmanager
def grads_on(parameters: Iterator[Tensor] | Sequence[Tensor]) -> Iterator[None]:
    """Let these parameters require gradients for a moment."""
    parameters = list(parameters)
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, was in zip(parameters, before, strict=True):
            p.requires_grad_(was)


@contextlib.contextmanager
def _removed(hooks: list) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
