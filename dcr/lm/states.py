"""Pooled hidden states of all layers in one pass per batch (PAPER "Motivation", item 4).

Pooling happens inside the hooks, so memory holds one batch's full states at a time, whatever the
number of prompts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

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
from dcr.lm.blocks import layers_holder, pool
from dcr.lm.chat import encode_prompts


@dataclass(frozen=True)
class HiddenStates:
    """values [layers + 1, n, hidden] fp32: 0 the embeddings, ℓ the output of block ℓ, the last
    after the final norm."""

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
    """Hidden states of every layer for prompts (texts, or a prompt table), pooled over tokens:
    "last" real token or "mean".

    As the library's `output_hidden_states`, one prompt at a time: the last layer has the final norm
    applied.
    With `out` (a folder) states are written as they come and an interrupted call goes on from
    there.
    Raises DCRError for bad prompts, one over the context length (unless `truncate`: its last tokens
    are kept), or states
    that are not finite (naming the prompt; finished batches are kept in `out`).
    """
    prompts = prompts_of(prompts)
    rows = encode_prompts(tokenizer, prompts["text"].tolist())
    rows = fitted(model, rows, prompts, max_length, truncate=truncate)
    stack, name = layers_holder(model, layers_path)
    size = model.config.get_text_config().hidden_size
    shape = (len(getattr(stack, name)) + 1, len(rows), size)
    values, done = _buffers(out, shape, _fingerprint(rows, pooling, model) if out else "")
    device = next(model.parameters()).device
    shared = common_prefix(rows) if can_share(stack) else 0
    lengths = [len(r) for r in rows]
    sorted_rows = token_batches(lengths, batch_size, max_tokens_per_batch or tokens_that_fit(model))
    waiting = [b for b in sorted_rows if not done[b].all()]
    with _watched(getattr(stack, name)) as seen:
        cache, head = None, np.zeros(())
        if shared and waiting:
            ids = torch.tensor([rows[0][:shared]], device=device)
            seen.begin(torch.ones_like(ids), "mean")
            cache, output = run_prefix(stack, ids)
            head = seen.end(output.last_hidden_state)  # [layers + 1, 1, hidden]

        def states_of(batch: Sequence[int]) -> np.ndarray:
            """[layers + 1, batch, hidden]. Right padding: the shared tokens are the first columns
            of every row."""
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
                kept = (
                    f"{int(done.sum())} finished prompts are kept in {out}"
                    if out
                    else "nothing is kept without `out`"
                )
                raise DCRError(
                    f"hidden states of {named(prompts, batch[int(bad.argmax())])} are not "
                    "finite; load the model in fp32 "
                    f"or look at that prompt ({kept})."
                )
            values[:, batch] = block
            done[batch] = True
            bar.update(len(batch))
        bar.close()
    return HiddenStates(values, pooling)


class _Seen:
    """Pooled states of one forward pass, a tensor [batch, hidden] a layer as the blocks hand them
    on."""

    def begin(self, mask: Tensor, pooling: str) -> None:
        self.mask, self.pooling, self.kept = mask, pooling, []  # type: ignore[var-annotated]

    def keep(self, hidden) -> None:
        hidden = hidden if torch.is_tensor(hidden) else hidden[0]
        self.kept.append(pool(hidden, self.mask, self.pooling).float())

    def end(self, final: Tensor) -> np.ndarray:
        self.keep(final)
        return torch.stack(self.kept).cpu().numpy()


@contextlib.contextmanager
def _watched(blocks: nn.ModuleList) -> Iterator[_Seen]:
    """Keep what goes into the first block and comes out of all but the last, whose output the final
    norm replaces."""
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


def _fingerprint(rows: Sequence[Sequence[int]], pooling: str, model: nn.Module) -> str:
    """What stored states depend on: tokens, pooling and every weight (two sums of each tensor, in
    float64 on a CPU)."""
    weights = []
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        value = value.cpu() if value.device.type == "mps" else value  # which has no float64
        weights.append((name, float(value.sum(dtype=torch.float64)), float(value.float().norm())))
    return hashlib.sha256(json.dumps([list(rows), pooling, weights]).encode()).hexdigest()


def _buffers(
    out: str | Path | None, shape: tuple[int, int, int], fingerprint: str
) -> tuple[np.ndarray, np.ndarray]:
    """(values [layers + 1, n, hidden], which prompts are done [n]): in memory, or in files that a
    later call goes on with."""
    if out is None:
        return np.empty(shape, dtype=np.float32), np.zeros(shape[1], dtype=bool)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    meta, paths = folder / "meta.json", (folder / "values.npy", folder / "done.npy")
    if meta.exists() and json.loads(meta.read_text())["fingerprint"] == fingerprint:
        return np.load(paths[0], mmap_mode="r+"), np.load(paths[1], mmap_mode="r+")
    meta.unlink(missing_ok=True)
    values = np.lib.format.open_memmap(paths[0], "w+", np.float32, shape)
    done = np.lib.format.open_memmap(paths[1], "w+", bool, shape[1:2])
    meta.write_text(json.dumps({"fingerprint": fingerprint}))
    return values, done


def check_lengths(
    model,
    lengths: Sequence[int],
    prompts: Sequence[str],
    max_length: int | None = None,
    truncate: bool = False,
) -> int:
    """LEGACY, goes when refusal and kernel use `batches.fitted`."""
    config = model.config.get_text_config()
    limit = max_length or getattr(config, "max_position_embeddings", None) or max(lengths)
    for i, n in enumerate(lengths):
        if n > limit and not truncate:
            raise DCRError(
                f"prompt {i} has {n} tokens, the context holds {limit}: {prompts[i][:60]!r}... "
                "Shorten it "
                "or ask for truncation (truncate=True)."
            )
    return limit
