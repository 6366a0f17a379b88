"""Pooled hidden states of all layers in one pass per batch (PAPER "Motivation", item 4).

Pooling happens inside the hooks, so memory holds one batch's full states at a time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dcr.data.files import content_key
from dcr.data.read import prompts_of
from dcr.errors import DCRError
from dcr.lm.batches import (
    behind,
    can_share,
    common_prefix,
    fitted,
    in_memory,
    named,
    padded,
    run_prefix,
    token_batches,
    tokens_that_fit,
)
from dcr.lm.blocks import fingerprint, layers_holder, pool
from dcr.lm.chat import encode_prompts


@dataclass(frozen=True)
class HiddenStates:
    """values [layers + 1, n, hidden] fp32: 0 the embeddings, ℓ the output of block ℓ.

    The last layer's have the final norm applied.
    """

    values: np.ndarray
    pooling: str

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return self.values.shape[0] - 1

    def layer(self, layer: int) -> np.ndarray:
        """[n, hidden] at one layer."""
        return np.asarray(self.values[layer])


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
    max_length: int | None = None,
    truncate: bool = False,
    layers_path: str = "",
) -> HiddenStates:
    """Hidden states of every layer for prompts (texts, or a prompt table), pooled over tokens.

    As the library's `output_hidden_states`, one prompt at a time. pooling: "last" (real token) or
    "mean". With `out` (a folder) states are written as they come and an interrupted call goes on
    from there. Raises DCRError for bad prompts, one over the context length (unless `truncate`: its
    last tokens are kept), or states that are not finite (finished batches are kept in `out`).
    """
    prompts = prompts_of(prompts)
    rows = encode_prompts(tokenizer, prompts["text"].tolist())
    rows = fitted(model, rows, prompts, max_length, truncate=truncate)
    stack, name = layers_holder(model, layers_path)
    size = model.config.get_text_config().hidden_size
    shape = (len(getattr(stack, name)) + 1, len(rows), size)
    key = content_key([rows, pooling, fingerprint(model, tokenizer)]) if out else ""
    values, done = _buffers(out, shape, key)
    device = next(model.parameters()).device
    shared = common_prefix(rows) if can_share(stack) else 0
    lengths = [len(r) for r in rows]
    sorted_rows = token_batches(lengths, batch_size, max_tokens_per_batch or tokens_that_fit(model))
    waiting = [b for b in sorted_rows if not done[b].all()]
    with _watched(getattr(stack, name)) as seen:
        cache, head = None, np.zeros(1)
        if shared and waiting:
            ids = torch.tensor([rows[0][:shared]], device=device)
            seen.begin(torch.ones_like(ids), "mean")
            cache, output = run_prefix(stack, ids)
            head = seen.end(output.last_hidden_state)  # [layers + 1, 1, hidden]

        def states_of(batch: Sequence[int]) -> np.ndarray:
            # Padded on the right, so that the shared tokens are the first columns of every row.
            ids, mask = padded([rows[i] for i in batch], "right", device)
            seen.begin(mask[:, shared:], pooling)
            block = seen.end(stack(**behind(cache, ids, mask)).last_hidden_state)
            if pooling == "mean" and shared:
                own = mask[:, shared:].sum(1).cpu().numpy()[:, None]  # [batch, 1]
                block = (head * shared + block * own) / (shared + own)
            return block

        bar = tqdm(
            total=len(rows),
            initial=int(done.sum()),
            unit="prompt",
            leave=False,
            desc="hidden states",
        )
        for batch, block in in_memory(waiting, states_of):
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
        bar.close()
    return HiddenStates(values, pooling)


class _Seen:
    """Pooled states of one forward pass, [batch, hidden] a layer, as the blocks hand them on."""

    def begin(self, mask: Tensor, pooling: str) -> None:
        self.mask, self.pooling = mask, pooling
        self.kept: list[Tensor] = []

    def keep(self, hidden) -> None:
        hidden = hidden if torch.is_tensor(hidden) else hidden[0]
        self.kept.append(pool(hidden, self.mask, self.pooling).float())

    def end(self, final: Tensor) -> np.ndarray:
        self.keep(final)
        return torch.stack(self.kept).cpu().numpy()


@contextlib.contextmanager
def _watched(blocks: nn.ModuleList) -> Iterator[_Seen]:
    """Keep what enters the first block and leaves each but the last (the final norm follows it)."""
    seen = _Seen()
    hooks = [
        blocks[0].register_forward_pre_hook(
            lambda _m, args, kwargs: seen.keep(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    ]
    hooks += [b.register_forward_hook(lambda _m, _a, out: seen.keep(out)) for b in blocks[:-1]]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _buffers(
    out: str | Path | None, shape: tuple[int, int, int], key: str
) -> tuple[np.ndarray, np.ndarray]:
    """(values [layers + 1, n, hidden], done [n]): in memory, or in files for a later call."""
    if out is None:
        return np.empty(shape, dtype=np.float32), np.zeros(shape[1], dtype=bool)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    meta, paths = folder / "meta.json", (folder / "values.npy", folder / "done.npy")
    if meta.exists() and json.loads(meta.read_text())["key"] == key:
        return np.load(paths[0], mmap_mode="r+"), np.load(paths[1], mmap_mode="r+")
    meta.unlink(missing_ok=True)
    values = np.lib.format.open_memmap(paths[0], "w+", np.float32, shape)
    done = np.lib.format.open_memmap(paths[1], "w+", bool, shape[1:2])
    meta.write_text(json.dumps({"key": key}))
    return values, done
