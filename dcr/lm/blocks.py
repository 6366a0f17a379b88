"""Decoder blocks of any causal LM: where they stand, the forward pass up to layer ℓ, pooling."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dcr.errors import DCRError
from dcr.lm.batches import repeated, shared_inputs
from dcr.lm.device import DTYPES, resolve_precision

Edit = Callable[[Tensor], Tensor]

# Where the decoder blocks stand in the families we test; the resolver tries them in turn.
LAYER_PATHS = (
    "model.layers",
    "model.language_model.layers",
    "language_model.layers",
    "model.decoder.layers",
    "transformer.h",
    "gpt_neox.layers",
    "layers",
    "h",
)


def is_linear(module: nn.Module) -> bool:
    """Linear layers, and GPT-2's Conv1D (weight stored transposed)."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def decoder_layers(model: nn.Module, override: str = "") -> nn.ModuleList:
    """The decoder blocks in order. `override`: their dotted path, as "model.layers"."""
    holder, name = layers_holder(model, override)
    return getattr(holder, name)


def decoder_stack(model: nn.Module, override: str = "") -> nn.Module:
    """The module that runs embeddings, blocks and final norm: the model without its head."""
    return layers_holder(model, override)[0]


def layers_holder(model: nn.Module, override: str = "") -> tuple[nn.Module, str]:
    """(decoder stack, name of its block list). Raises DCRError naming what lists it found."""
    base = _unwrapped(model)
    for path in (override,) if override else LAYER_PATHS:
        *parents, name = path.split(".")
        holder = base
        for part in parents:
            holder = getattr(holder, part, None)
        if isinstance(getattr(holder, name, None), nn.ModuleList):
            return holder, name
    lists = [n for n, m in base.named_modules() if isinstance(m, nn.ModuleList)]
    raise DCRError(
        f"{type(base).__name__}: no decoder blocks at {override or ', '.join(LAYER_PATHS)}. Pass "
        "the dotted path of the block list as the layer override (model.layers_path); lists found: "
        f"{lists or 'none'}."
    )


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def resolve_layer(layer: int | float, n_layers: int) -> int:
    """Number of blocks ℓ that run: an index 1..n_layers, or a share of the depth in (0, 1].

    The number 1 is the first block, 1.0 the whole depth.

    Hidden state ℓ is the output of the ℓ-th block (`hidden_states[ℓ]`), before any final norm.
    """
    number = isinstance(layer, (int, float)) and not isinstance(layer, bool)
    share = isinstance(layer, float) and 0 < layer <= 1
    index = round(layer * n_layers) if share else layer
    if not number or index != int(index) or not 1 <= index <= n_layers:
        raise DCRError(
            f"refine.layer={layer!r} is out of range: this model has {n_layers} blocks; give a "
            f"whole number 1..{n_layers} or a share of the depth, above 0.0 and up to 1.0."
        )
    return int(index)


@contextlib.contextmanager
def edited(
    outputs: Sequence[tuple[nn.Module, Edit]] = (), inputs: Sequence[tuple[nn.Module, Edit]] = ()
) -> Iterator[None]:
    """Replace the (first) output or input of modules by `edit(tensor)`, [batch, seq, hidden].

    An edit that returns its tensor only reads. The hooks come off on exit.
    """

    def at_output(edit: Edit):
        return lambda _m, _a, out: edit(out) if torch.is_tensor(out) else (edit(out[0]), *out[1:])

    def at_input(edit: Edit):
        def change(_module, args, kwargs):
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

        return change

    with contextlib.ExitStack() as hooks:
        for module, edit in outputs:
            hooks.enter_context(module.register_forward_hook(at_output(edit)))
        for module, edit in inputs:
            hook = module.register_forward_pre_hook(at_input(edit), with_kwargs=True)
            hooks.enter_context(hook)
        yield


@contextlib.contextmanager
def replaced(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """The model with other values of some parameters, in their precision; its own after exit."""
    held = {name: model.get_parameter(name) for name in values}
    before = {name: parameter.data for name, parameter in held.items()}
    try:
        for name, value in values.items():
            held[name].data = value
        yield
    finally:
        for name, data in before.items():
            held[name].data = data


@contextlib.contextmanager
def in_precision(model: nn.Module, precision: str) -> Iterator[nn.Module]:
    """The model with its weights in `precision`, for inference; restored bit for bit.

    Buffers (rotary frequencies) keep theirs, as they do when a model is loaded in bf16.
    """
    dtype = DTYPES[resolve_precision(precision, next(model.parameters()).device)]
    floating = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    with replaced(model, {n: p.data.to(dtype) for n, p in floating.items() if p.dtype != dtype}):
        yield model


@contextlib.contextmanager
def truncated(model: nn.Module, layer: int, override: str = "") -> Iterator[nn.Module]:
    """The model's decoder stack with only the first `layer` blocks, restored on exit."""
    holder, name = layers_holder(model, override)
    blocks = getattr(holder, name)
    setattr(holder, name, blocks[:layer])
    try:
        yield holder
    finally:
        setattr(holder, name, blocks)


def truncated_forward(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    layer: int,
    override: str = "",
    shared: int = 0,
) -> Tensor:
    """Output of block ℓ, [batch, seq, hidden], before any final norm; nothing above ℓ runs.

    shared: first tokens that all rows have in common; they run once, as one row, and gradients
    reach them from every row.
    """
    kept: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        kept.append(hidden)
        return hidden

    with truncated(model, layer, override) as stack:
        with edited([(decoder_layers(model, override)[-1], keep)]):
            stack(**shared_inputs(stack, input_ids, attention_mask, shared))
    if kept[-1].shape[1] == input_ids.shape[1]:
        return kept[-1]
    return torch.cat([repeated(kept[0], attention_mask), kept[-1]], 1)


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str = "last") -> Tensor:
    """[batch, seq, hidden] → [batch, hidden]: the last real token, or the mean of all ("mean")."""
    if pooling == "last":
        columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        index = (attention_mask * columns).argmax(dim=1)  # [batch]
        return hidden[torch.arange(len(hidden), device=hidden.device), index]
    if pooling == "mean":
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)
    raise DCRError(f"pooling={pooling!r} is unknown; use last or mean.")


def head_logits(model: nn.Module, hidden: Tensor, override: str = "") -> Tensor:
    """[n, hidden] outputs of the stack → [n, vocabulary] logits, by the model's own forward.

    Only the stack is left out, so whatever a family does to its logits (scaling, caps) is done.
    """
    stack = decoder_stack(model, override)
    own = _unwrapped(model)
    ready = _StackOutput(last_hidden_state=hidden[None])  # [1, n, hidden]
    with mock.patch.object(stack, "forward", lambda *_, **__: ready):
        return own(inputs_embeds=hidden[None], use_cache=False).logits[0]


class _StackOutput(SimpleNamespace):
    """What a decoder stack returns, with nothing in it but its `last_hidden_state`."""

    def __getitem__(self, _index: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, _name: str) -> None:
        return None


def fingerprint(model: nn.Module, tokenizer) -> str:
    """64 hex digits of what a model is: tensors, configuration, tokenizer, chat template.

    Of each tensor the sum and norm of all values, and 4,096 of them in their order.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        tensor = tensor if tensor.device.type == "cuda" else tensor.cpu()  # mps has no float64
        flat = tensor.detach().flatten()
        sums = float(flat.sum(dtype=torch.float64)), float(flat.float().norm())
        part = flat[:: max(1, len(flat) // 4096)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {sums}".encode() + part.numpy().tobytes())
    said = str(tokenizer).replace(repr(tokenizer.name_or_path), "")  # wherever the folder lies
    words = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, said]
    config: Any = model.config
    known = config.to_diff_dict().items()
    words.append({k: str(v) for k, v in known if k not in ("_name_or_path", "use_cache")})
    digest.update(json.dumps(words, sort_keys=True).encode())
    return digest.hexdigest()
