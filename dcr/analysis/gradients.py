"""Activations and output gradients of every linear layer, block by block.

The gradient of a logit in a weight matrix W of a linear layer is Σ_s δ_s a_sᵀ (output gradient,
input activation). Keeping the factors instead of the product is what lets the kernel run without
one gradient vector in memory. Blocks are visited from the top; only block inputs and the gradients
at one block border are kept between visits. All run where gradients are enabled (`grads_on`).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dcr.lm.blocks import decoder_layers, edited, is_linear


@dataclass
class Factors:
    """One prompt's share of one weight matrix, Σ_s δ_s a_sᵀ, or of a table that is looked up."""

    delta: Tensor  # [k, seq, out]
    activation: Tensor  # [seq, in]; of a table, the rows looked up, [seq]


@dataclass
class Trace:
    """What one prompt's forward pass leaves behind."""

    first: Tensor  # [1, seq, hidden], what enters the first block, with its graph
    looked_up: list[tuple[str, Tensor, Tensor]]  # table, ids [seq], leaf [1, seq, hidden]
    inputs: list[Tensor]  # [1, seq, hidden] of each block
    arguments: list[tuple[tuple, dict]]  # of each block, beside its input
    head_input: Tensor  # [hidden], what the LM head reads at the last position
    head_delta: Tensor  # [k, m], gradient at the head's output, on the m tokens that are asked for
    border: Tensor  # [k, seq, hidden], gradient at the output of the block last visited
    small: dict[str, Tensor]  # [k, size] of parameters outside blocks and tables


class _LookUps(TorchFunctionMode):
    """Look-ups in wanted tables become leaves (see `Trace.looked_up`)."""

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
    small = outside(model, blocks, wanted)
    tables = {id(p): n for n, p in model.named_parameters() if n in wanted and n not in small}
    entering: list[Tensor] = []
    arguments: list[tuple[tuple, dict]] = []
    seen: dict = {}

    def enter(_module, args, kwargs):
        hidden, *rest = args or (kwargs["hidden_states"],)
        options = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        entering.append(hidden.detach() if entering else hidden)  # one graph is kept, not all
        arguments.append((tuple(rest), options))
        return (hidden.detach(), *rest), options

    def top(hidden: Tensor) -> Tensor:
        seen["top"] = hidden.detach().requires_grad_()
        return seen["top"]

    with contextlib.ExitStack() as stack, edited([(blocks[-1], top)]), _LookUps(tables) as looked:
        for block in blocks:
            stack.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
        hook = head.register_forward_hook(lambda _m, args, out: seen.update(head=(args[0], out)))
        stack.enter_context(hook)
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    sources = [seen["top"], seen["head"][1], *small.values()]
    border, delta, *grads = pulled_back(logits, sources, cotangents)
    return Trace(
        first=entering[0],
        looked_up=looked.seen,
        inputs=[hidden.detach() for hidden in entering],
        arguments=arguments,
        head_input=seen["head"][0][0, -1].detach(),
        head_delta=delta[:, 0, -1, cotangents.any(0)],
        border=border[:, 0],
        small={n: g.flatten(1) for n, g in zip(small, grads, strict=True)},
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
    start, (rest, options) = state.inputs[index].detach().requires_grad_(), state.arguments[index]
    with contextlib.ExitStack() as hooks:
        for name, module in linear.items():
            hooks.enter_context(
                module.register_forward_hook(
                    lambda _m, args, out, name=name: seen.update({name: (args[0], out)})
                )
            )
        result = block(start, *rest, **options)
    result = result if torch.is_tensor(result) else result[0]
    sources = [start, *(out for _, out in seen.values()), *small.values()]
    border, *found = pulled_back(result, sources, state.border[:, None])
    state.border = border[:, 0]
    out: dict[str, Factors | Tensor] = {
        f"{prefix}.{name}": Factors(delta.flatten(1, -2), seen[name][0].detach().flatten(0, -2))
        for name, delta in zip(seen, found, strict=False)
    }
    grads = zip(small, found[len(seen) :], strict=True)
    return out | {name: gradient.flatten(1) for name, gradient in grads}


def at_embeddings(state: Trace, small: dict[str, Tensor]) -> dict[str, Factors]:
    """Pull the border gradient from the first block's input to the tables that are looked up.

    The share of parameters `small` (see `outside`) below the first block is added to `state.small`.
    Returns Factors by parameter name.
    """
    sources = [*(leaf for _, _, leaf in state.looked_up), *small.values()]
    if not sources or not state.first.requires_grad:
        return {}
    found = pulled_back(state.first, sources, state.border[:, None])
    for name, gradient in zip(small, found[len(state.looked_up) :], strict=True):
        state.small[name] = state.small[name] + gradient.flatten(1)
    out: dict[str, Factors] = {}
    for (name, ids, _), delta in zip(state.looked_up, found, strict=False):
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


def outside(model, blocks: nn.ModuleList, wanted: set[str]) -> dict[str, Tensor]:
    """Wanted parameters outside the blocks that are neither looked up nor the head's matrix."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    known = tables | {id(model.get_output_embeddings().weight)}
    known |= {id(p) for p in blocks.parameters()}
    return {n: p for n, p in model.named_parameters() if n in wanted and id(p) not in known}


@contextlib.contextmanager
def grads_on(model: nn.Module, wanted: set[str]) -> Iterator[None]:
    """Gradients enabled, for a moment also of all parameters with these names."""
    before = {p: p.requires_grad for n, p in model.named_parameters() if n in wanted}
    try:
        with torch.enable_grad():
            for parameter in before:
                parameter.requires_grad_(True)
            yield
    finally:
        for parameter, was in before.items():
            parameter.requires_grad_(was)
