"""Surgical (Wang et al., ICLR 2025): cut the false-refusal direction out of the residual stream.

Difference in means at every block input and post-instruction token: r = harmful − harmless, w =
pseudo-harmful − harmless; w' = unit(w − λ proj_r w). Taken: the (layer, position) with the lowest
refusal score on held-out pseudo-harmful prompts, among the first 80 % of layers whose ablation
moves harmless first-token distributions by at most 0.2 nats.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dcr.analysis.refusal import opening_tokens
from dcr.config import SteeringConfig
from dcr.errors import DCRError
from dcr.lm.chat import encode_prompts
from dcr.lm.decode import Unsteered
from dcr.steering.hooks import Steering, ablated, last_logits, last_tokens, residuals, template_ends

log = logging.getLogger("dcr")
MAX_KL, KEPT_DEPTH, LEAST = 0.2, 0.8, 4
HELD = 8  # prompts a class on which directions are compared: each costs a forward pass a candidate


@dataclass(frozen=True)
class Surgical(Steering):
    """facts: layer (block, from 0, whose input was read), position (−1 the last prompt token), and
    what was measured to choose them; tensors: direction [hidden], unit."""

    ANCHORS = ("harmful", "pseudo", "harmless")
    SEEDED = True

    @classmethod
    def fit(  # noqa: PLR0913
        cls,
        model,
        tokenizer,
        anchors: dict[str, pd.DataFrame],
        validation: pd.DataFrame,
        options: SteeringConfig,
        *,
        seed: int = 0,
        layers_path: str = "",
        **_others,
    ) -> Self:
        """The direction, chosen on the last HELD anchors of each role.

        Prompts whose refusal score contradicts their class are dropped before the means; where
        fewer than 4 would stay, those nearest to their class are kept and the count says so.
        Raises DCRError for too few anchors, or when every candidate disturbs harmless prompts.
        """
        rows = {r: encode_prompts(tokenizer, anchors[r]["text"].tolist()) for r in cls.ANCHORS}
        if min(map(len, rows.values())) < 2:
            raise DCRError("Surgical: at least 2 harmful, pseudo-harmful and harmless anchors.")
        cut = {r: max(1, len(x) - HELD) for r, x in rows.items()}
        held = [rows[r][cut[r] :] for r in ("pseudo", "harmless")]
        tail = template_ends(tokenizer)[1]
        tokens = sorted({row[0] for row in opening_tokens(tokenizer)})
        means, kept = {}, {}
        for role in cls.ANCHORS:
            used, kept[role] = _agreeing(
                model, rows[role][: cut[role]], tokens, -1 if role == "harmless" else 1
            )
            means[role] = residuals(
                model, used, last_tokens(tail), at="input", layers_path=layers_path
            ).mean(1)  # [layers, tail, hidden]
        candidates = orthogonal(
            means["pseudo"] - means["harmless"],
            means["harmful"] - means["harmless"],
            options.surgical_lambda,
        )
        before = token_odds(last_logits(model, held[0]), tokens).mean()
        reference = last_logits(model, held[1]).log_softmax(-1)
        depth = max(1, int(KEPT_DEPTH * len(candidates)))
        grid = [(layer, position) for layer in range(depth) for position in range(tail)]
        if 0 < options.surgical_candidates < len(grid):
            drawn = np.random.default_rng([seed, 0x5A]).permutation(len(grid))
            grid = [grid[i] for i in sorted(drawn[: options.surgical_candidates])]
        tried = []
        for layer, position in tqdm(grid, desc="surgical", unit="direction", leave=False):
            with ablated(model, candidates[layer, position], layers_path=layers_path):
                score = float(token_odds(last_logits(model, held[0]), tokens).mean())
                other = last_logits(model, held[1]).log_softmax(-1)
            kl = float((reference.exp() * (reference - other)).sum(-1).mean())
            tried.append((score, layer, position - tail, kl))
        allowed = [t for t in tried if t[3] <= MAX_KL]
        if not allowed:
            raise DCRError(
                f"Surgical: every one of {len(tried)} directions moves harmless prompts by more "
                f"than {MAX_KL} nats (least {min(t[3] for t in tried):.2f}); no direction "
                "can be cut out of this model."
            )
        score, layer, position, kl = min(allowed)
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
        log.info("surgical: %s", facts)
        return cls(facts, {"direction": candidates[layer, position]}, layers_path=layers_path)

    def start(self, model, tokenizer, prompts: list[str]) -> Unsteered:
        """Ablation everywhere, the shared prefix included."""
        return _Ablating(self, model)


class _Ablating(Unsteered):
    def __init__(self, steering: Surgical, model) -> None:
        self.steering, self.model = steering, model

    def during(
        self, rows: Sequence[int] | None, first: bool
    ) -> contextlib.AbstractContextManager[None]:
        s = self.steering
        return ablated(self.model, s.tensors["direction"], s.strength, s.layers_path)


def _agreeing(
    model, rows: list[list[int]], tokens: Sequence[int], sign: int
) -> tuple[list[list[int]], dict]:
    """Rows whose refusal score has the sign of their class (at least LEAST), and how many do."""
    score = sign * token_odds(last_logits(model, rows), tokens)
    agree = int((score > 0).sum())
    order = score.argsort(descending=True)[: max(agree, min(LEAST, len(rows)))].tolist()
    return [rows[i] for i in order], {"of": len(rows), "agree": agree, "used": len(order)}


def token_odds(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """[n] log p − log(1 − p), p the mass on `tokens`, from logits [n, vocabulary]."""
    rest = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    rest[list(tokens)] = False
    return logits[:, ~rest].logsumexp(-1) - logits[:, rest].logsumexp(-1)


def orthogonal(w: Tensor, r: Tensor, strength: float = 1.0) -> Tensor:
    """unit(w − λ proj_r w) along the last dimension."""
    r = torch.nn.functional.normalize(r, dim=-1)
    return torch.nn.functional.normalize(w - strength * (w * r).sum(-1, keepdim=True) * r, dim=-1)
