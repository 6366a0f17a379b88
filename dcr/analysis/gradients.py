"""Activations and output gradients of every linear layer, block by block.

The gradient of a logit in a weight matrix W of a linear layer is Σ_s δ_s a_sᵀ (output gradient,
input activation). Keeping the factors instead of the product is what lets the kernel run without
one gradient vector in memory. Blocks are visited from the top; only block inputs and the gradients
at one block border are kept between visits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dcr.lm.blocks import decoder_layers, is_linear


@dataclass
class Factors:
    """One prompt's share of one weight matrix, Σ_s δ_s a_sᵀ, or of a table that is looked up."""

    delta: Tensor  # [k, seq, out]
    activation: Tensor  # [seq, in]; of a table, the rows looked up, [seq]


@dataclass
class Trace:
    """What one prompt's forward pass leaves behind."""

    input_ids: Tensor  # [seq]
    inputs: list[Tensor]  # [1, seq, hidden] of each block
    arguments: list[tuple[tuple, dict]]  # of each block, beside its input
    head_input: Tensor  # [hidden], what the LM head reads at the last position
    head_delta: Tensor  # [k, m], gradient at the head's output, on the m tokens that are asked for
    border: Tensor  # [k, seq, hidden], gradient at the output of the block last visited
    small: dict[str, Tensor] = field(default_factory=dict)  # [k, size] outside blocks and tables


class _Reached(Exception):
    """Stops a forward pass."""


class _LookUps(TorchFunctionMode):
    """Look-ups in wanted tables become leaves: (name, ids [seq], leaf [1, seq, hidden])."""

    def __init__(self, tables: dict[int, str]) -> None:
        super().__init__()
        self.tables = tables
        self.seen: list[tuple[str, Tensor, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is not nn.functional.embedding or id(args[1]) not in self.tables:
            return result
        leaf = result.detach().requires_grad_()
        self.seen.append((self.tables[id(args[1])], args[0].flatten(), leaf))
        return leaf


def trace(
    model, input_ids: Tensor, cotangents: Tensor, wanted: set[str], layers_path: str = ""
) -> Trace:
    """Run one prompt [1, seq]; pull `cotangents` [k, vocab] on the last logits to the top block."""
    blocks, head = decoder_layers(model, layers_path), model.get_output_embeddings()
    inputs, arguments = [], []
    seen: dict = {}

    def before(_module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        inputs.append(hidden.detach())
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        arguments.append((args[1:], rest))

    def top(_module, _args, result):
        seen["top"] = _first(result).detach().requires_grad_()
        return seen["top"] if torch.is_tensor(result) else (seen["top"], *result[1:])

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(top))
    hooks.append(head.register_forward_hook(lambda _m, a, out: seen.update(head=(a[0], out))))
    small = _outside(model, blocks, wanted)
    with grads_on(small.values()), torch.enable_grad(), _removed(hooks):
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        sources = [seen["top"], seen["head"][1], *small.values()]
        border, delta, *grads = pulled_back(logits, sources, cotangents)
    asked = cotangents.any(0)
    return Trace(
        input_ids[0],
        inputs,
        arguments,
        seen["head"][0][0, -1].detach(),
        delta[:, 0, -1, asked],
        border[:, 0],
        {n: g.flatten(1) for n, g in zip(small, grads, strict=True)},
    )


def step_down(
    block: nn.Module, prefix: str, index: int, state: Trace, wanted: set[str]
) -> dict[str, Factors | Tensor]:
    """Re-run one block and pull the border gradient through it, which moves to its input.

    Returns Factors by module name for linear layers, [k, size] gradients by name for the rest.
    """
    linear = {
        n: m for n, m in block.named_modules() if is_linear(m) and f"{prefix}.{n}.weight" in wanted
    }
    weights = {id(m.weight) for m in linear.values()}
    named = {f"{prefix}.{n}": p for n, p in block.named_parameters()}
    small = {n: p for n, p in named.items() if n in wanted and id(p) not in weights}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        m.register_forward_hook(lambda _m, args, out, n=n: seen.update({n: (args[0], out)}))
        for n, m in linear.items()
    ]
    start, (rest, options) = state.inputs[index].detach().requires_grad_(), state.arguments[index]
    with grads_on(small.values()), torch.enable_grad(), _removed(hooks):
        result = _first(block(start, *rest, **options))
        sources = [start, *(out for _, out in seen.values()), *small.values()]
        border, *found = pulled_back(result, sources, state.border[:, None])
    state.border = border[:, 0]
    out: dict[str, Factors | Tensor] = {
        f"{prefix}.{name}": Factors(delta.flatten(1, -2), seen[name][0].detach().flatten(0, -2))
        for name, delta in zip(seen, found, strict=False)
    }
    grads = zip(small, found[len(seen) :], strict=True)
    return out | {name: gradient.flatten(1) for name, gradient in grads}


def at_embeddings(
    model, state: Trace, wanted: set[str], layers_path: str = ""
) -> dict[str, Factors]:
    """Pull the border gradient from the first block's input to the tables that are looked up.

    Other parameters below the first block add to `state.small`. Returns Factors by parameter name.
    """
    blocks = decoder_layers(model, layers_path)
    small, reached = _outside(model, blocks, wanted), {}

    def stop(_module, args, kwargs):
        reached["hidden"] = args[0] if args else kwargs["hidden_states"]
        raise _Reached

    tables = {id(p): n for n, p in model.named_parameters() if n in wanted and n not in small}
    hooks = [blocks[0].register_forward_pre_hook(stop, with_kwargs=True)]
    with (
        grads_on(small.values()),
        torch.enable_grad(),
        _removed(hooks),
        contextlib.suppress(_Reached),
        _LookUps(tables) as looked,
    ):
        model(input_ids=state.input_ids[None], use_cache=False)
    sources = [*(leaf for _, _, leaf in looked.seen), *small.values()]
    if not sources or not reached["hidden"].requires_grad:
        return {}
    found = pulled_back(reached["hidden"], sources, state.border[:, None])
    for name, gradient in zip(small, found[len(looked.seen) :], strict=True):
        state.small[name] = state.small[name] + gradient.flatten(1)
    out: dict[str, Factors] = {}
    for (name, ids, _), delta in zip(looked.seen, found, strict=False):
        delta = delta.flatten(1, -2)  # [k, seq, hidden]
        if name in out:  # a table that is looked up twice
            delta = torch.cat([out[name].delta, delta], 1)
            ids = torch.cat([out[name].activation, ids])
        out[name] = Factors(delta, ids)
    return out


def pulled_back(result: Tensor, sources: list[Tensor], cotangents: Tensor) -> list[Tensor]:
    """Gradients of ⟨c, result⟩ in each source for all cotangents c [k, *result.shape], [k, ...].

    One backward pass reads each weight matrix once, not k times. Without influence: zeros.
    """
    found = torch.autograd.grad(
        result, sources, cotangents.to(result.dtype), is_grads_batched=True, allow_unused=True
    )
    return [
        f.detach() if f is not None else s.new_zeros(len(cotangents), *s.shape)
        for f, s in zip(found, sources, strict=True)
    ]


@contextlib.contextmanager
def grads_on(parameters: Iterable[Tensor]) -> Iterator[None]:
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


def _outside(model, blocks: nn.ModuleList, wanted: set[str]) -> dict[str, Tensor]:
    """Wanted parameters outside the blocks that are neither looked up nor the head's matrix."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    known = tables | {id(model.get_output_embeddings().weight)}
    known |= {id(p) for p in blocks.parameters()}
    return {n: p for n, p in model.named_parameters() if n in wanted and id(p) not in known}


def _first(result) -> Tensor:
    return result if torch.is_tensor(result) else result[0]


@contextlib.contextmanager
def _removed(hooks: list) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
