"""What trains (LoRA or whole weights in a range of decoder blocks) and how it is kept on disk."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcr.errors import DCRError
from dcr.lm.blocks import decoder_layers, is_linear

# peft asks transformers by an old name, at every adapter: nothing that a user could mend.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter; rank 0 trains whole weights instead.

    targets: last parts of the layers' names, e.g. ("q_proj", "v_proj"); () takes every linear layer
    of a block.
    """

    rank: int
    alpha: int = 16
    targets: Sequence[str] = ()
    dropout: float = 0.0


def train_blocks(
    model: Any, first: int, last: int, lora: Lora, *, precision: str = "fp32", layers_path: str = ""
) -> Any:
    """Freeze `model` except for blocks first..last-1: an adapter on them, or their weights.

    precision: "fp32" lifts a half-precision model; with "bf16" its frozen weights stay as they
        are, while whatever trains (adapters, or the whole model at rank 0) is held in fp32.
    Seed before the call: LoRA's initialisation is random. Raises DCRError for an unknown target,
    and for a model that holds an adapter already.
    """
    if lora.rank == 0 or precision == "fp32":
        model.float()
    model.requires_grad_(False)
    blocks = decoder_layers(model, layers_path)
    if lora.rank == 0:
        blocks[first:last].requires_grad_(True)
        return model
    if hasattr(model, "peft_config"):
        raise DCRError(
            "the model holds an adapter that is not merged, and a second one cannot train on top "
            "of it. Give model.merge_and_unload(), or refine with merge=True."
        )
    from peft import LoraConfig, get_peft_model

    path = next(n for n, m in model.named_modules() if m is blocks)
    linear = [
        f"{path}.{i}.{n}"
        for i in range(first, last)
        for n, m in blocks[i].named_modules()
        if is_linear(m)
    ]
    known = sorted({n.rsplit(".", 1)[-1] for n in linear})
    if unknown := [t for t in lora.targets if t not in known]:
        raise DCRError(
            f"lora_targets: {', '.join(unknown)} match no linear layer in blocks {first}.."
            f"{last - 1}; known: {', '.join(known)}."
        )
    wanted = [n for n in linear if n.rsplit(".", 1)[-1] in (lora.targets or known)]
    options = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=wanted,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, options)


def merged(model: Any) -> Any:
    """An ordinary transformers model in eval mode, as trainable as a freshly loaded one.

    An adapter is folded in in fp32, and the result stays in fp32: most of what an adapter adds is
    smaller than the rounding of a bf16 weight, so in bf16 the sum would often be the old weight.
    """
    if hasattr(model, "merge_and_unload"):
        model = model.float().merge_and_unload()
    return model.eval().requires_grad_(True)  # a frozen LM head would also decode at half the speed


def reopen(model: Any, folder: Path) -> Any:
    """`model` with what `save_pretrained` kept put on top; an adapter is not folded in."""
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        return PeftModel.from_pretrained(model, folder)
    kept = type(model).from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return kept.to(model.device)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that train, by name, on the CPU."""
    return {
        n: p.detach().to("cpu", copy=True).contiguous()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `trained_state` took."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)
