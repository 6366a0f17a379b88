"""Models: loading by hub id, folder or "embedded"; decoder blocks; the forward pass cut off at layer ℓ."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dcr.errors import DCRError
from dcr.lm import embedded
from dcr.lm.chat import ALPACA_TEMPLATE, encode, render, rendered_example, turn_end

__all__ = [
    "load",
    "decoder_layers",
    "resolve_layer",
    "truncated",
    "truncated_forward",
    "pool",
    "length_sorted_batches",
    "render",
    "encode",
    "rendered_example",
    "turn_end",
]

log = logging.getLogger("dcr")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Where the decoder blocks stand in the families we test; the resolver tries them in turn.
LAYER_PATHS = (
    "model.layers",
    "model.language_model.layers",
    "language_model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "layers",
    "h",
)


def load(
    name: str = "embedded",
    *,
    revision: str = "",
    dtype: str = "float32",
    device: str = "auto",
    chat_template: str = "auto",
):
    """(model, tokenizer) in eval mode.

    name: "embedded", a local folder or a hub id (`revision` pins its commit).
    dtype: float32, bfloat16 or float16. device: "auto" (cuda, then mps, then cpu) or a torch device.
    chat_template: "auto" (the tokenizer's own; the Alpaca prompt for a model without one) or "alpaca".
    Raises DCRError for a wrong option, no network, a gated model or an unknown architecture.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise DCRError(f"model.dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)}.")
    if chat_template not in ("auto", "alpaca"):
        raise DCRError(f"model.chat_template={chat_template!r} is unknown; use auto or alpaca.")
    source = str(embedded.ensure()) if name == "embedded" else name
    options = {"trust_remote_code": False}
    if not Path(source).is_dir():
        options["revision"] = revision or "main"
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise ValueError(f"unrecognized model type {config.model_type!r}")
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[dtype], use_safetensors=True, **options
        )
    except Exception as error:  # one clear message for whatever the hub client raises
        raise DCRError(explain_load_error(name, error)) from error
    if tokenizer.pad_token is None:
        # A pad that is no stop token, so the stop token stays in the labels; never grows the vocabulary.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if chat_template == "alpaca" or not tokenizer.chat_template:
        if chat_template == "auto":
            log.warning("%s has no chat template: using the Alpaca prompt", name)
        tokenizer.chat_template = ALPACA_TEMPLATE
    tokenizer.padding_side = "left"
    return model.to(pick_device(device)).eval(), tokenizer


def pick_device(device: str) -> str:
    """ "auto" → cuda, mps or cpu, whichever is there first; any other name as it is."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def explain_load_error(name: str, error: Exception) -> str:
    """What went wrong while loading `name`, and what to do, in one sentence or two."""
    text = f"{type(error).__name__}: {error}"
    low = text.lower()
    if "gated" in low or "401" in low or "403" in low:
        return (
            f"{name}: the model is gated or private. Accept its licence on its hub page and set HF_TOKEN, "
            "or give a local folder."
        )
    if "model type" in low or "unrecognized" in low or "unrecognised" in low:
        return f"{name}: this transformers version does not know the architecture; use a supported causal LM. ({error})"
    if "safetensors" in low:
        return f"{name}: no safetensors weights found. Convert the model to safetensors first; nothing else is loaded."
    if any(
        word in low
        for word in (
            "connect",
            "offline",
            "resolve",
            "network",
            "not a local folder",
            "max retries",
            "localentrynotfound",
            "timeout",
            "couldn't reach",
        )
    ):
        return (
            f"{name}: not a local folder, and the Hugging Face hub cannot be reached. Check the network, "
            "give a local folder, or use model.name=embedded."
        )
    return f"{name}: could not be loaded. {text.splitlines()[0][:300]}"


def _unwrap(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: nn.Module, override: str = "") -> nn.ModuleList:
    """The decoder blocks, first to last. `override` is a dotted path from the model, e.g. "model.layers"."""
    holder, name = _layers_holder(model, override)
    return getattr(holder, name)


def _layers_holder(model: nn.Module, override: str = "") -> tuple[nn.Module, str]:
    base = _unwrap(model)
    for path in (override,) if override else LAYER_PATHS:
        *parents, name = path.split(".")
        holder = base
        for part in parents:
            holder = getattr(holder, part, None)
        if isinstance(getattr(holder, name, None), nn.ModuleList):
            return holder, name
    lists = [n for n, m in base.named_modules() if isinstance(m, nn.ModuleList)]
    raise DCRError(
        f"{type(base).__name__}: no decoder blocks at {override or ', '.join(LAYER_PATHS)}. Pass the dotted "
        f"path of the block list as the layer override (model.layers_path); lists found: {lists or 'none'}."
    )


def resolve_layer(layer: int | float, n_layers: int) -> int:
    """Number of blocks ℓ that run: an index 1..n_layers, or a fraction of depth in (0, 1).

    Hidden state ℓ is the output of the ℓ-th block (`hidden_states[ℓ]`), before any final norm.
    """
    if isinstance(layer, bool) or not isinstance(layer, (int, float)):
        raise DCRError(
            f"refine.layer={layer!r}: give a whole number of blocks or a fraction of depth."
        )
    index = round(layer * n_layers) if isinstance(layer, float) and 0 < layer < 1 else int(layer)
    if isinstance(layer, float) and layer >= 1 and layer != index or not 1 <= index <= n_layers:
        raise DCRError(
            f"refine.layer={layer!r} is out of range: this model has {n_layers} blocks; give 1..{n_layers} "
            "or a fraction between 0 and 1."
        )
    return index


@contextlib.contextmanager
def truncated(model: nn.Module, layer: int, override: str = "") -> Iterator[nn.Module]:
    """The model's decoder stack with only the first `layer` blocks, restored on exit."""
    holder, name = _layers_holder(model, override)
    blocks = getattr(holder, name)
    setattr(holder, name, blocks[:layer])
    try:
        yield holder
    finally:
        setattr(holder, name, blocks)


def truncated_forward(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: int, override: str = ""
) -> Tensor:
    """Output of block ℓ, [batch, seq, hidden], before any final norm. Blocks from ℓ up and the LM head do not run."""
    kept: list[Tensor] = []
    with truncated(model, layer, override) as stack:
        last = decoder_layers(model, override)[-1]
        handle = last.register_forward_hook(
            lambda _m, _a, out: kept.append(out if torch.is_tensor(out) else out[0])
        )
        try:
            stack(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=False,
                position_ids=position_ids(attention_mask),
            )
        finally:
            handle.remove()
    return kept[0]


def position_ids(attention_mask: Tensor) -> Tensor:
    """[batch, seq] positions that count real tokens only, so that left padding does not shift them."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str = "last") -> Tensor:
    """[batch, seq, hidden] → [batch, hidden]: the last real token ("last", by the mask) or their mean ("mean")."""
    if pooling == "last":
        seq = attention_mask.shape[1]
        index = (attention_mask * torch.arange(seq, device=attention_mask.device)).argmax(dim=1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), index]
    if pooling == "mean":
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)
    raise DCRError(f"pooling={pooling!r} is unknown; use last or mean.")


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first (a batch too large for memory fails at once)."""
    if batch_size < 1:
        raise DCRError(f"batch_size={batch_size}: give at least 1.")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
