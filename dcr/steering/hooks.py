"""Forward hooks for steering: context managers only. Hooks come off on exit; no weight is ever written.

Blocks are those of `dcr.lm.blocks.decoder_layers`. Everything a decoder block reads and writes passes here, so SCANS and
Surgical are a few lines each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dcr.errors import DCRError
from dcr.lm.batches import position_ids, token_batches
from dcr.lm.blocks import decoder_layers, layers_holder
from dcr.lm.chat import render

Edit = Callable[[Tensor], Tensor]
ATTENTION, FEED_FORWARD = ("self_attn", "attention", "attn"), ("mlp", "feed_forward", "ffn")


@contextlib.contextmanager
def edited(
    outputs: Sequence[tuple[nn.Module, Edit]] = (), inputs: Sequence[tuple[nn.Module, Edit]] = ()
) -> Iterator[None]:
    """Replace the (first) output or input tensor of modules by `edit(tensor)`, both [batch, seq, hidden], until exit."""
    handles: list = []
    try:
        for module, edit in outputs:
            handles.append(
                module.register_forward_hook(lambda _m, _a, out, edit=edit: _first(out, edit))
            )
        for module, edit in inputs:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _m, a, k, edit=edit: _first_input(a, k, edit), with_kwargs=True
                )
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(out, edit: Edit):
    return edit(out) if torch.is_tensor(out) else (edit(out[0]), *out[1:])


def _first_input(args: tuple, kwargs: dict, edit: Edit) -> tuple[tuple, dict]:
    if args:
        return (edit(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}


def writers(block: nn.Module) -> list[nn.Module]:
    """The modules whose outputs a block adds to the residual stream: attention and MLP, or the norms behind them.

    Raises DCRError for a block whose parts have unknown names.
    """
    if hasattr(
        block, "post_feedforward_layernorm"
    ):  # Gemma 2 and 3 normalise what attention and MLP write
        return [block.post_attention_layernorm, block.post_feedforward_layernorm]
    found = [
        next((getattr(block, n) for n in names if hasattr(block, n)), None)
        for names in (ATTENTION, FEED_FORWARD)
    ]
    if None in found:
        raise DCRError(
            f"{type(block).__name__}: no attention or MLP found among {[n for n, _ in block.named_children()]}; "
            f"known names: {', '.join(ATTENTION + FEED_FORWARD)}."
        )
    return found


@contextlib.contextmanager
def ablated(
    model: nn.Module, direction: Tensor, strength: float = 1.0, layers_path: str = ""
) -> Iterator[None]:
    """Take `strength` times the component along unit `direction` [hidden] out of the residual stream, all positions.

    x ← x − s (x·d) d at the embeddings and at everything a block writes; the stream's component is then (1 − s) times
    what the blocks write. At strength 1 block inputs are ablated as well, as published (Wang et al., ICLR 2025).
    """
    cache: dict = {}

    def edit(x: Tensor) -> Tensor:
        d = cache.setdefault((x.dtype, x.device), direction.to(x))
        return x - strength * (x @ d).unsqueeze(-1) * d

    blocks = decoder_layers(model, layers_path)
    inputs = [(block, edit) for block in (blocks if strength == 1 else blocks[:1])]
    with edited([(module, edit) for block in blocks for module in writers(block)], inputs):
        yield


@contextlib.contextmanager
def shifted(
    model: nn.Module,
    vectors: Tensor,
    blocks: Sequence[int],
    amounts: Tensor,
    tail: int,
    layers_path: str = "",
) -> Iterator[None]:
    """Add amounts[row] · vectors[ℓ] to the output of each block ℓ at the last `tail` tokens of every forward pass.

    vectors [layers, hidden]; amounts [batch], signed. With left padding and a cache, those are the post-instruction
    tokens of the prompt and then each generated token.
    """
    layers = decoder_layers(model, layers_path)

    def edit_for(vector: Tensor) -> Edit:
        def edit(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, -tail:] += amounts.to(x)[:, None, None] * vector.to(x)
            return x

        return edit

    with edited([(layers[i], edit_for(vectors[i])) for i in blocks]):
        yield


def instruction_tail(tokenizer) -> int:
    """Number of tokens that the template puts behind every prompt (the end of the instruction and the assistant's mark)."""
    a, b = (
        tokenizer(t, add_special_tokens=False)["input_ids"][::-1]
        for t in render(tokenizer, ["cat", "is it 7 ?"])
    )
    tail = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    if not tail:
        raise DCRError(
            "the chat template puts nothing behind a prompt, so there is no end-of-instruction token to steer from."
        )
    return tail


def token_rows(tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered prompts."""
    return tokenizer(render(tokenizer, prompts), add_special_tokens=False)["input_ids"]


def left_padded(rows: Sequence[Sequence[int]], pad: int, device) -> dict[str, Tensor]:
    """input_ids, attention_mask, position_ids [batch, seq] of token rows, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}


@torch.no_grad()
def residuals(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    pad: int,
    *,
    last: int,
    at: str = "output",
    batch_size: int = 16,
    layers_path: str = "",
) -> Tensor:
    """[layers, n, last, hidden] fp32: the residual stream at the input or output of every block, last tokens of each row.

    The output of the last block is before the final norm. The LM head does not run.
    """
    holder, _ = layers_holder(model, layers_path)
    blocks, device = decoder_layers(model, layers_path), next(model.parameters()).device
    result, seen = None, {}

    def keep(i: int) -> Edit:
        return lambda x: seen.__setitem__(i, x[:, -last:].float()) or x

    hooks = [(block, keep(i)) for i, block in enumerate(blocks)]
    with edited(**{"outputs" if at == "output" else "inputs": hooks}):
        for batch in token_batches([len(r) for r in rows], batch_size):
            holder(**left_padded([rows[i] for i in batch], pad, device), use_cache=False)
            block = torch.stack([seen[i] for i in range(len(blocks))])
            if result is None:
                result = block.new_zeros(len(blocks), len(rows), *block.shape[2:])
            result[:, batch] = block
    return result


@torch.no_grad()
def last_logits(
    model: nn.Module, rows: Sequence[Sequence[int]], pad: int, batch_size: int = 16
) -> Tensor:
    """[n, vocabulary] fp32 logits of the first answer token."""
    device, parts = next(model.parameters()).device, [None] * len(rows)
    for batch in token_batches([len(r) for r in rows], batch_size):
        logits = model(
            **left_padded([rows[i] for i in batch], pad, device), use_cache=False, logits_to_keep=1
        ).logits[:, -1]
        for i, row in zip(batch, logits.float(), strict=True):
            parts[i] = row
    return torch.stack(parts)
