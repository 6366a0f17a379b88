"""What trains: LoRA adapters or whole weights in a range of decoder blocks, and how they are kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dcr.errors import DCRError
from dcr.lm.blocks import decoder_layers, is_linear


def train_blocks(
    model: nn.Module,
    first: int,
    last: int,
    *,
    rank: int,
    alpha: int,
    targets: Sequence[str] = (),
    dropout: float = 0.0,
    layers_path: str = "",
) -> nn.Module:
    """Freeze `model` except for blocks first..last-1: LoRA of `rank` on their linear layers, or whole at rank 0.

    targets: last parts of the layers' names, e.g. ("q_proj", "v_proj"); () takes every linear layer of a block.
    Seed before the call: LoRA's initialisation is random. Raises DCRError when no layer matches.
    """
    model.requires_grad_(False)
    blocks = decoder_layers(model, layers_path)
    if rank == 0:
        blocks[first:last].requires_grad_(True)
        return model
    from peft import LoraConfig, get_peft_model

    path = next(n for n, m in model.named_modules() if m is blocks)
    linear = [
        f"{path}.{i}.{n}"
        for i in range(first, last)
        for n, m in blocks[i].named_modules()
        if is_linear(m)
    ]
    wanted = [n for n in linear if not targets or n.rsplit(".", 1)[-1] in targets]
    if not wanted:
        known = sorted({n.rsplit(".", 1)[-1] for n in linear})
        raise DCRError(
            f"lora_targets={list(targets)} match no linear layer in blocks {first}..{last - 1}; "
            f"known: {', '.join(known)}."
        )
    return get_peft_model(
        model,
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=wanted,
            task_type="CAUSAL_LM",
        ),
    )


def merged(model: nn.Module) -> nn.Module:
    """An ordinary transformers model in eval mode, trainable as a freshly loaded one, the adapter (if any) folded in.

    A frozen LM head would also be slow: torch then copies its weight for every row of a batch (twice the time of decoding).
    """
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    return model.eval().requires_grad_(True)


def save_trained(model: nn.Module, folder: Path) -> None:
    """Save a PEFT model's adapter, or a whole model, as safetensors."""
    model.save_pretrained(folder)


def reopen(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with what `save_trained` kept put on top, the adapter (if it is one) not folded in."""
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        return PeftModel.from_pretrained(model, folder)
    return (
        type(model)
        .from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
        .to(model.device)
    )


def apply_trained(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with what `save_trained` kept: adapter folded in, or whole weights loaded. Eval mode."""
    return merged(reopen(model, folder))
