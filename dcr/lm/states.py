"""Pooled hidden states of all layers in one pass per batch (PAPER "Motivation", item 4).

Pooling happens inside the hooks, so memory holds one batch's full states at a time.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dcr.data.files import content_key, write_atomic, writing
from dcr.data.read import prompts_of
from dcr.errors import DCRError
from dcr.lm.batches import Passes, common_prefix, fitted, named
from dcr.lm.blocks import decoder_layers, decoder_stack, edited, fingerprint, pool
from dcr.lm.chat import encode_prompts

Place = tuple[int, int | None]  # start and stop of a slice of a row's tokens
BATCH = 32


@torch.no_grad()
def hidden_states(  # noqa: PLR0913
    model,
    tokenizer,
    prompts,
    *,
    pooling: str = "last",
    batch_size: int = 32,
    max_tokens_per_batch: int = 0,
    out: str | Path | None = None,
    truncate: bool = False,
    layers_path: str = "",
) -> np.ndarray:
    """[layers + 1, n, hidden] fp32 states of prompts (texts, or a table), pooled over tokens.

    0 are the embeddings, ℓ the output of block ℓ, the last one's behind the final norm: the
    library's `output_hidden_states`, one prompt at a time. pooling: "last" (real token) or "mean".
    With `out` (a folder) states are written as they come and an interrupted call goes on
    from there. Raises DCRError for bad prompts, one over the context length (unless `truncate`: its
    last tokens are kept), or states that are not finite (finished batches are kept in `out`).
    """
    prompts = prompts_of(prompts)
    rows = encode_prompts(tokenizer, prompts["text"].tolist())
    rows = fitted(model, rows, prompts, truncate=truncate)
    stack, blocks = decoder_stack(model, layers_path), decoder_layers(model, layers_path)
    shape = (len(blocks) + 1, len(rows), model.config.get_text_config().hidden_size)
    made_from = [rows, pooling, str(model.dtype), layers_path]
    key = content_key([*made_from, fingerprint(model, tokenizer)]) if out else ""
    values, done = _buffers(out, shape, key)
    # Padded on the right, so that the shared tokens are the first columns of every row.
    passes = Passes(stack, rows, common_prefix(rows) if pooling == "last" else 0, "right")

    def read(batch: list[int]) -> np.ndarray:
        inputs = passes.inputs(batch)
        mask = inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :]
        kept = _read(stack, blocks, inputs, lambda hidden: pool(hidden, mask, pooling))
        return torch.stack([*kept[:-2], kept[-1]]).cpu().numpy()  # [layers + 1, batch, hidden]

    waiting = np.flatnonzero(~done).tolist()
    with tqdm(total=len(waiting), unit="prompt", leave=False, desc="hidden states") as bar:
        for batch, block in passes.run(read, waiting, batch_size, max_tokens_per_batch):
            bad = ~np.isfinite(block).all(axis=(0, 2))
            if bad.any():
                where = f"are kept in {out}" if out else "are lost without `out`"
                raise DCRError(
                    f"hidden states of {named(prompts, batch[int(bad.argmax())])} are not finite; "
                    "load the model in fp32 or look at that prompt "
                    f"({int(done.sum())} finished prompts {where})."
                )
            values[:, batch] = block
            done[batch] = True
            bar.update(len(batch))
    return values


@torch.no_grad()
def residuals(
    model,
    rows: Sequence[Sequence[int]],
    places: Sequence[Place],
    layers_path: str = "",
    layers: slice = slice(None),
) -> Tensor:
    """[layers + 1, n, places, hidden] fp32: 0 the embeddings, ℓ the output of block ℓ.

    The last one is before the final norm; `layers` keeps a part of them. places: slices of a row's
    tokens, each averaged; (-1, None) is the last token.
    """
    stack, blocks = decoder_stack(model, layers_path), decoder_layers(model, layers_path)
    starts = [start for start, _ in places]
    shared = common_prefix(rows, keep=max(1, -min(starts)))
    passes = Passes(stack, rows, min([shared, *(start for start in starts if start >= 0)]))

    def read(batch: list[int]) -> Tensor:
        inputs = passes.inputs(batch)
        lengths = inputs["position_ids"][:, -1] + 1
        kept = _read(stack, blocks, inputs, lambda hidden: _averaged(hidden, lengths, places))
        return torch.stack(kept[:-1][layers], 1).cpu()  # [batch, layers + 1, places, hidden]

    return passes.gather(read, BATCH).transpose(0, 1)


@torch.no_grad()
def last_logits(
    model, rows: Sequence[Sequence[int]], tokens: Sequence[int] | slice = slice(None)
) -> Tensor:
    """[n, vocabulary] fp32 logits of the first answer token; of some tokens if asked."""
    passes = Passes(model, rows, common_prefix(rows))

    def read(batch: list[int]) -> Tensor:
        return model(**passes.inputs(batch), logits_to_keep=1).logits[:, -1, tokens].float()

    return passes.gather(read, BATCH)


def _read(
    stack: nn.Module, blocks: nn.ModuleList, inputs: dict, pooled: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """`pooled` of what enters the first block, of what each puts out, and of the stack's output."""
    kept: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        kept.append(pooled(hidden).float())
        return hidden

    with edited([(block, keep) for block in blocks], [(blocks[0], keep)]):
        keep(stack(**inputs).last_hidden_state)
    return kept


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


def _buffers(
    out: str | Path | None, shape: tuple[int, int, int], key: str
) -> tuple[np.ndarray, np.ndarray]:
    """(values [layers + 1, n, hidden], done [n]): in memory, or in files for a later call."""
    if out is None:
        return np.empty(shape, dtype=np.float32), np.zeros(shape[1], dtype=bool)
    folder = Path(out)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    meta, paths = folder / "meta.json", (folder / "values.npy", folder / "done.npy")
    if meta.exists() and json.loads(meta.read_text())["key"] == key:
        return np.load(paths[0], mmap_mode="r+"), np.load(paths[1], mmap_mode="r+")
    meta.unlink(missing_ok=True)
    values = np.lib.format.open_memmap(paths[0], "w+", np.float32, shape)
    done = np.lib.format.open_memmap(paths[1], "w+", bool, shape[1:2])
    write_atomic(meta, json.dumps({"key": key}))
    return values, done
