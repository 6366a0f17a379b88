"""Surgical (Wang et al., ICLR 2025): ablate the direction of false refusal, made orthogonal to that of true refusal.

Differences in means at every block input and post-instruction position: r = harmful − harmless, w = pseudo-harmful −
harmless; w' = unit(w − λ proj_r w). (Layer, position) = lowest refusal score on held-out pseudo-harmful prompts, among the
first 80 % of layers whose ablation moves harmless first-token distributions by at most 0.2 nats.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dcr.analysis.refusal import opening_tokens
from dcr.errors import DCRError
from dcr.lm.decode import Unsteered
from dcr.steering.hooks import ablated, instruction_tail, last_logits, residuals, token_rows

log = logging.getLogger("dcr")
MAX_KL, KEPT_DEPTH, LEAST = 0.2, 0.8, 4


@dataclass(frozen=True)
class Surgical:
    """One direction of the residual stream; `start` ablates it while `dcr.lm.generate.generate` runs."""

    direction: Tensor  # [hidden] unit
    layer: int  # block (from 0) whose input it was read at
    position: int  # −1 the last prompt token
    strength: float = 1.0
    layers_path: str = ""

    @property
    def settings(self) -> dict:
        """What an answer depends on beside the weights, for the resume check of `generate`."""
        return {
            "method": "Surgical",
            "layer": self.layer,
            "position": self.position,
            "strength": self.strength,
            "direction": float(self.direction.double().sum()),
        }

    def at(self, strength: float) -> Surgical:
        """The same with another share of the component removed (1: all)."""
        return replace(self, strength=strength)

    def start(self, model, tokenizer, prompts: Sequence[str]) -> SurgicalStarted:
        """Steering of any prompts (see `dcr.lm.decode.Steering`)."""
        return SurgicalStarted(self, model)


@dataclass(frozen=True)
class SurgicalStarted(Unsteered):
    """Ablation in every forward pass, that over the common prefix included."""

    surgical: Surgical
    model: object

    def during(self, rows: Sequence[int] | None, first: bool):
        """Ablate the direction."""
        s = self.surgical
        return ablated(self.model, s.direction, s.strength, s.layers_path)


def refusal_score(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """log p − log(1 − p), p the mass on refusal tokens at the first answer position; logits [n, vocabulary] → [n]."""
    logp = logits.double().log_softmax(-1)
    rest = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    rest[list(tokens)] = False
    return logp[:, ~rest].logsumexp(-1) - logp[:, rest].logsumexp(-1)


def orthogonal(w: Tensor, r: Tensor, strength: float = 1.0) -> Tensor:
    """unit(w − λ proj_r w) along the last dimension."""
    r = torch.nn.functional.normalize(r, dim=-1)
    return torch.nn.functional.normalize(w - strength * (w * r).sum(-1, keepdim=True) * r, dim=-1)


def fit_surgical(
    model,
    tokenizer,
    harmful: Sequence[str],
    pseudo: Sequence[str],
    harmless: Sequence[str],
    *,
    held_pseudo: Sequence[str],
    held_harmless: Sequence[str],
    strength: float = 1.0,
    max_candidates: int = 0,
    seed: int = 0,
    layers_path: str = "",
) -> tuple[Surgical, dict]:
    """The direction and what was measured to choose it: {layer, position, refusal_score, before, kl, kept, candidates}.

    max_candidates: how many (layer, position) are tried, drawn by the seed (0: all, as published; each costs a forward pass).
    Prompts whose refusal score contradicts their class are dropped before the means; where fewer than 4 would stay, those
    nearest to their class are kept and the count says so. Raises DCRError for empty sets or when every candidate disturbs harmless prompts.
    """
    if not all(map(len, (harmful, pseudo, harmless, held_pseudo, held_harmless))):
        raise DCRError(
            "Surgical: harmful, pseudo-harmful and harmless prompts are needed, and held-out ones of the last two."
        )
    pad, tail = tokenizer.pad_token_id, instruction_tail(tokenizer)
    tokens = sorted({row[0] for row in opening_tokens(tokenizer)})
    means, kept = [], {}
    for name, texts, sign in (
        ("harmful", harmful, 1),
        ("pseudo", pseudo, 1),
        ("harmless", harmless, -1),
    ):
        rows = token_rows(tokenizer, texts)
        score = sign * refusal_score(last_logits(model, rows, pad), tokens)
        order = score.argsort(descending=True)[
            : max(int((score > 0).sum()), min(LEAST, len(rows)))
        ].tolist()
        kept[name] = {"of": len(rows), "agree": int((score > 0).sum()), "used": len(order)}
        means.append(
            residuals(
                model, [rows[i] for i in order], pad, last=tail, at="input", layers_path=layers_path
            ).mean(1)
        )
    toxic, false, plain = means  # [layers, tail, hidden]
    candidates = orthogonal(false - plain, toxic - plain, strength)
    held = [token_rows(tokenizer, texts) for texts in (held_pseudo, held_harmless)]
    before = refusal_score(last_logits(model, held[0], pad), tokens).mean()
    reference = last_logits(model, held[1], pad).log_softmax(-1)
    tried, depth = [], max(1, int(KEPT_DEPTH * len(candidates)))
    grid = [(layer, position) for layer in range(depth) for position in range(tail)]
    if 0 < max_candidates < len(grid):
        grid = [
            grid[i]
            for i in sorted(
                np.random.default_rng([seed, 0x5A]).permutation(len(grid))[:max_candidates]
            )
        ]
    for layer, position in tqdm(grid, desc="surgical", unit="direction", leave=False):
        with ablated(model, candidates[layer, position], layers_path=layers_path):
            score = float(refusal_score(last_logits(model, held[0], pad), tokens).mean())
            other = last_logits(model, held[1], pad).log_softmax(-1)
        kl = float((reference.exp() * (reference - other)).sum(-1).mean())
        tried.append((score, layer, position - tail, kl))
    allowed = [t for t in tried if t[3] <= MAX_KL]
    if not allowed:
        raise DCRError(
            f"Surgical: every one of {len(tried)} directions moves harmless prompts by more than {MAX_KL} nats "
            f"(least {min(t[3] for t in tried):.2f}); the model has no direction that can be cut out."
        )
    score, layer, position, kl = min(allowed)
    log.info(
        "surgical: block %d, position %d, refusal score %.2f -> %.2f, harmless KL %.3f",
        layer,
        position,
        before,
        score,
        kl,
    )
    facts = {
        "layer": layer,
        "position": position,
        "refusal_score": score,
        "before": float(before),
        "kl": kl,
        "kept": kept,
        "candidates": len(tried),
        "allowed": len(allowed),
    }
    return Surgical(candidates[layer, position], layer, position, layers_path=layers_path), facts
