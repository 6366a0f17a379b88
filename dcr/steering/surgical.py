"""Surgical (Wang et al., ICLR 2025): cut the false-refusal direction out of the residual stream.

Difference in means at every block input and post-instruction token: r = harmful − harmless, w =
pseudo-harmful − harmless; w' = unit(w − λ proj_r w). Taken: the (layer, position) with the lowest
refusal score on held-out pseudo-harmful prompts, among the first 80 % of layers whose ablation
moves harmless first-token distributions by at most 0.2 nats.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from dcr.analysis.refusal import opening_tokens
from dcr.errors import DCRError
from dcr.lm.decode import Unsteered
from dcr.lm.states import Place, last_logits
from dcr.steering.hooks import Fit, Material, Steering, ablated, template_ends

log = logging.getLogger("dcr")
MAX_KL, KEPT_DEPTH, LEAST = 0.2, 0.8, 4
HELD = 8  # prompts a class on which directions are compared: each costs a forward pass a candidate


@dataclass(frozen=True)
class Surgical(Steering):
    """facts: layer (block, from 0, whose input was read), position (−1 the last prompt token).

    Beside them what was measured to choose them; tensors: direction [hidden], unit.
    """

    ANCHORS = ("harmful", "pseudo", "harmless")
    SEEDED = True

    @classmethod
    def fitted(cls, on: Material) -> Fit:
        """The direction, chosen on the last HELD anchors of each role.

        Prompts whose refusal score contradicts their class are dropped before the means; where
        fewer than 4 would stay, those nearest to their class are kept and the count says so.
        Raises DCRError for too few anchors, or when every candidate disturbs harmless prompts.
        """
        rows = {role: on.rows(role) for role in cls.ANCHORS}
        if min(map(len, rows.values())) < 2:
            raise DCRError("Surgical: at least 2 harmful, pseudo-harmful and harmless anchors.")
        tail = template_ends(on.tokenizer)[1]
        tokens = sorted({row[0] for row in opening_tokens(on.tokenizer)})
        means, kept, held = {}, {}, {}
        for role, every in rows.items():
            cut, sign = max(1, len(every) - HELD), -1 if role == "harmless" else 1
            held[role] = every[cut:]
            odds = sign * token_odds(last_logits(on.model, every[:cut]), tokens)
            agree = int((odds > 0).sum())
            used = odds.argsort(descending=True)[: max(agree, min(LEAST, cut))].tolist()
            kept[role] = {"of": cut, "agree": agree, "used": len(used)}
            states = on.residuals([every[i] for i in used], last_tokens(tail))
            means[role] = states[:-1].mean(1)  # at the blocks' inputs, [layers, tail, hidden]
        toxic, pseudo = (means[role] - means["harmless"] for role in ("harmful", "pseudo"))
        candidates = orthogonal(pseudo, toxic, on.options.surgical_lambda)
        before = float(token_odds(last_logits(on.model, held["pseudo"]), tokens).mean())
        reference = last_logits(on.model, held["harmless"]).log_softmax(-1)
        depth = max(1, int(KEPT_DEPTH * len(candidates)))
        grid = [(layer, position) for layer in range(depth) for position in range(-tail, 0)]
        if 0 < on.options.surgical_candidates < len(grid):
            drawn = np.random.default_rng([on.seed, 0x5A]).permutation(len(grid))
            grid = [grid[i] for i in sorted(drawn[: on.options.surgical_candidates])]
        tried = []
        for layer, position in tqdm(grid, desc="surgical", unit="direction", leave=False):
            with ablated(on.model, candidates[layer, position], layers_path=on.layers_path):
                score = float(token_odds(last_logits(on.model, held["pseudo"]), tokens).mean())
                other = last_logits(on.model, held["harmless"]).log_softmax(-1)
            kl = float((reference.exp() * (reference - other)).sum(-1).mean())
            tried.append((score, layer, position, kl))
        allowed = [t for t in tried if t[3] <= MAX_KL]
        if not allowed:
            raise DCRError(
                f"Surgical: every one of {len(tried)} directions moves harmless prompts by more "
                f"than {MAX_KL} nats (least {min(t[3] for t in tried):.2f}); none can be cut out."
            )
        score, layer, position, kl = min(allowed)
        facts = {
            "layer": layer,
            "position": position,
            "refusal_score": score,
            "before": before,
            "kl": kl,
            "kept": kept,
            "candidates": len(tried),
            "allowed": len(allowed),
        }
        log.info("surgical: %s", facts)
        return facts, {"direction": candidates[layer, position]}

    def start(self, model, tokenizer, prompts: list[str]) -> Unsteered:
        """Ablation everywhere, the shared prefix included."""
        cut = self.tensors["direction"], self.strength, self.layers_path
        return Unsteered(during=lambda rows, first: ablated(model, *cut))


def last_tokens(n: int) -> list[Place]:
    """The last n tokens, each a place of its own."""
    return [(-i, 1 - i or None) for i in range(n, 0, -1)]


def token_odds(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """[n] log p − log(1 − p), p the mass on `tokens`, from logits [n, vocabulary]."""
    rest = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    rest[list(tokens)] = False
    return logits[:, ~rest].logsumexp(-1) - logits[:, rest].logsumexp(-1)


def orthogonal(w: Tensor, r: Tensor, strength: float = 1.0) -> Tensor:
    """unit(w − λ proj_r w) along the last dimension."""
    r = normalize(r, dim=-1)
    return normalize(w - strength * (w * r).sum(-1, keepdim=True) * r, dim=-1)
