"""Phrases as a tree of tokens, and the log odds that a model goes on with one of them.

The beginnings of phrases are read behind the cached prompt, packed into one row a prompt under a
mask that shows each its own ancestors: the likeliest first, and not those whose whole mass would
hardly count.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dcr.lm.batches import CACHE, position_ids

TOLERANCE = 0.05  # a beginning is not read below this share of what is known to go on, or not to
FLOOR = 0.01  # or, after two passes, of this, where less is known
WIDTH = 3  # beginnings of a prompt read in one pass


@dataclass
class Tree:
    """`after[node]`: token → next node; 0 is the prompt's end, a phrase's end has none after it."""

    after: list[dict[int, int]] = field(default_factory=lambda: [{}])
    least: list[float] = field(default_factory=lambda: [-math.inf])  # log mass to be read, by node
    depth: int = 0  # tokens of the longest phrase

    def grow(self, phrases: Sequence[Sequence[int]], least: float = -math.inf) -> None:
        """Add phrases, which are read where their first token has this log mass."""
        for phrase in phrases:
            node, self.depth = 0, max(self.depth, len(phrase))
            for token in phrase:
                if token not in self.after[node]:
                    self.after[node][token] = len(self.after)
                    self.after.append({})
                    self.least.append(-math.inf if node else least)
                node = self.after[node][token]


@dataclass(frozen=True)
class Begun:
    """A beginning of phrases: log probability, node, last token, and its ancestors' slots."""

    mass: float
    node: int = 0
    token: int = 0
    path: tuple[int, ...] = ()


def log_odds(logits: Tensor, packed: "Packed", tree: Tree) -> np.ndarray:
    """[n] log odds of the tree's phrases from logits [n, 1, vocabulary] behind the prompts."""
    n = len(logits)
    inside, outside = np.full((2, n), -np.inf)
    unread: list[list[Begun]] = [[] for _ in range(n)]
    reading = {row: [Begun(0.0)] for row in range(n)}
    while reading:
        found, other = _next(logits, list(reading.values()), tree)
        for (row, begun), masses, others in zip(reading.items(), found, other, strict=True):
            for slot, at in enumerate(begun):
                outside[row] = np.logaddexp(outside[row], at.mass + others[slot])
                path = (*at.path, packed.slots - logits.shape[1] + slot) if at.node else ()
                after = tree.after[at.node].items()
                for (token, node), mass in zip(after, at.mass + masses[slot], strict=False):
                    if tree.after[node]:
                        unread[row].append(Begun(mass, node, token, path))
                    else:
                        inside[row] = np.logaddexp(inside[row], mass)
        known = np.minimum(inside, outside)
        if packed.passes >= 2:  # the usual phrases have been read, however unlikely they are
            known = np.where(np.isfinite(known), np.maximum(known, math.log(FLOOR)), known)
        level = known + (math.log(TOLERANCE) if TOLERANCE else -math.inf)
        reading = {}
        for row, left in enumerate(unread):
            counts = [b for b in left if b.mass > max(level[row], tree.least[b.node])]
            if counts:
                reading[row] = sorted(counts, key=lambda b: -b.mass)[:WIDTH]
                unread[row] = [b for b in left if b not in reading[row]]
        if reading:
            logits = packed.read(reading)
    unknown = [np.logaddexp.reduce([b.mass for b in left] or [-np.inf]) for left in unread]
    return inside - np.logaddexp(outside, unknown)


def _next(logits: Tensor, level: list[list[Begun]], tree: Tree) -> tuple[np.ndarray, np.ndarray]:
    """log p of the tokens that go on, [n, slots, most], and of all others together, [n, slots]."""
    tokens = [[list(tree.after[b.node]) for b in begun] for begun in level]
    most = max(len(t) for row in tokens for t in row)
    index = torch.zeros(len(level), logits.shape[1], most, dtype=torch.long)
    for row, slots in enumerate(tokens):
        for slot, t in enumerate(slots):
            index[row, slot] = torch.tensor(t + t[:1] * (most - len(t)))
    index, logits = index.to(logits.device), logits.float()
    total = logits.logsumexp(-1)
    found = logits.gather(-1, index) - total[..., None]
    others = logits.scatter(-1, index, -torch.inf).logsumexp(-1) - total
    return found.cpu().double().numpy(), others.cpu().double().numpy()


class Packed:
    """What was read behind the prompts of a batch: keys and values, where each slot stands."""

    def __init__(
        self,
        model,
        inputs: dict,
        steered: Callable[[list[int]], contextlib.AbstractContextManager],
    ) -> None:
        """inputs: of the prompts' own pass. steered(rows): in force around a pass over them."""
        self.model, self.cache, self.steered = model, inputs[CACHE], steered
        self.slots = self.passes = 0
        mask = inputs["attention_mask"]
        self.rows = list(range(len(mask)))  # of the batch, as far as they are still read
        self.real = mask.bool().cpu().numpy()  # [n, seq]
        self.position = position_ids(mask).cpu().numpy()  # [n, seq + slots]

    def read(self, reading: dict[int, list[Begun]]) -> Tensor:
        """Logits [rows, slots, vocabulary] behind beginnings; slots left over read token 0.

        Rows of which nothing is read leave for good.
        """
        device = next(self.model.parameters()).device
        if len(reading) < len(self.rows):
            kept = [i for i, row in enumerate(self.rows) if row in reading]
            self.cache.batch_select_indices(torch.tensor(kept, device=device))
            self.rows, self.real = list(reading), self.real[kept]
            self.position = self.position[kept]
        (n, seq), width = self.real.shape, max(map(len, reading.values()))
        ids = np.zeros((n, width), dtype=np.int64)
        position = np.repeat(self.real.sum(1)[:, None], width, 1)
        seen = np.zeros((n, width, seq + self.slots + width), dtype=bool)
        seen[:, :, :seq] = self.real[:, None]
        seen[:, :, seq + self.slots :] = np.eye(width, dtype=bool)
        for i, begun in enumerate(reading.values()):
            for slot, at in enumerate(begun):
                ids[i, slot] = at.token
                position[i, slot] += len(at.path)
                seen[i, slot, [seq + s for s in at.path]] = True
        self.position = np.concatenate([self.position, position], 1)
        self.slots, self.passes = self.slots + width, self.passes + 1
        with self.steered(self.rows):
            return self.model(
                input_ids=torch.tensor(ids, device=device),
                position_ids=torch.tensor(position, device=device),
                attention_mask=self._mask(seen, position),
                use_cache=True,
                **{CACHE: self.cache},
            ).logits

    def _mask(self, seen: np.ndarray, position: np.ndarray):
        """As the model takes it, [n, 1, slots, seq + slots], once for each kind of its layers."""
        config, weight = self.model.config.get_text_config(), next(self.model.parameters())
        window = getattr(config, "sliding_window", None)
        near = position[:, :, None] - self.position[:, None] < (window or np.inf)
        masks = {}
        for kind, allowed in (("full_attention", seen), ("sliding_attention", seen & near)):
            masks[kind] = torch.tensor(allowed[:, None], device=weight.device)
            if config._attn_implementation == "eager":  # which adds the mask
                hidden = torch.zeros_like(masks[kind], dtype=weight.dtype)
                least = torch.finfo(weight.dtype).min
                masks[kind] = hidden.masked_fill(~masks[kind], least)
        if len(set(getattr(config, "layer_types", None) or ())) > 1:
            return masks
        return masks["sliding_attention" if window else "full_attention"]
