"""SCANS (Cao et al., AAAI 2025): classify a prompt by its hidden-state transition, steer towards compliance or refusal.

v_ℓ = unit(mean h_ℓ(harmful) − mean h_ℓ(harmless)) at the last prompt token, output of block ℓ. For the decision " Sure"
is appended; t_ℓ = h_ℓ(end of instruction) − h_ℓ(last token); the score is the mean over layers of cos(t_ℓ, mean t_ℓ of
harmful anchors). Score ≥ threshold: judged harmful, +α v; else −α v; from the end-of-instruction token on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from dcr.errors import DCRError
from dcr.lm.decode import Unsteered
from dcr.steering.hooks import instruction_tail, residuals, shifted, token_rows

# Published for 32 blocks: steer at 10..19, classify at 10..31; other depths in proportion.
STEERED = (10 / 32, 20 / 32)
AGREEMENT = " Sure"


@dataclass(frozen=True)
class Scans:
    """Fitted directions; `start` steers `dcr.lm.generate.generate`."""

    vectors: Tensor  # [layers, hidden] unit
    transitions: Tensor  # [layers, hidden] mean t_ℓ of harmful anchors
    threshold: float
    alpha: float
    tail: int
    strength: float = 1.0
    layers_path: str = ""
    known: dict = field(
        default_factory=dict, compare=False
    )  # prompt → score: a prompt is classified once

    @property
    def settings(self) -> dict:
        """What an answer depends on beside the weights, for the resume check of `generate`."""
        return {
            "method": "SCANS",
            "threshold": self.threshold,
            "alpha": self.alpha,
            "strength": self.strength,
            "vectors": float(self.vectors.double().sum()),
        }

    @property
    def steered(self) -> range:
        """Numbers of the blocks (from 0) whose output is shifted."""
        first, last = (round(f * len(self.vectors)) for f in STEERED)
        return range(first, max(last, first + 1))

    def at(self, strength: float) -> Scans:
        """The same with another multiple of α; classifications are shared."""
        return replace(self, strength=strength)

    def scores(self, model, tokenizer, prompts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """[n] harmfulness score in [−1, 1] of each prompt."""
        new = [p for p in dict.fromkeys(prompts) if p not in self.known]
        if new:
            t = transitions(model, tokenizer, new, self.tail, batch_size, self.layers_path)
            cosine = torch.nn.functional.cosine_similarity(
                t, self.transitions.to(t)[:, None], dim=-1
            )
            for prompt, score in zip(
                new, cosine[self.steered.start :].mean(0).tolist(), strict=True
            ):
                self.known[prompt] = score
        return np.array([self.known[p] for p in prompts])

    def signs(self, model, tokenizer, prompts: Sequence[str]) -> list[float]:
        """+1 for a prompt judged harmful, −1 for the others."""
        return np.where(
            self.scores(model, tokenizer, prompts) >= self.threshold, 1.0, -1.0
        ).tolist()

    def start(self, model, tokenizer, prompts: Sequence[str]) -> ScansStarted:
        """Steering of these prompts, each by its own sign (see `dcr.lm.decode.Steering`)."""
        return ScansStarted(self, model, self.signs(model, tokenizer, prompts))


@dataclass(frozen=True)
class ScansStarted(Unsteered):
    """Each row shifted by its own sign, at its last tokens and at every token it generates."""

    scans: Scans
    model: object
    sign: list[float]

    @property
    def tail(self) -> int:
        """The tokens behind a prompt are steered, so they are in no shared prefix."""
        return self.scans.tail

    def during(self, rows: Sequence[int] | None, first: bool):
        """Shift the outputs of the steered blocks."""
        if rows is None:
            return contextlib.nullcontext()
        s = self.scans
        amounts = torch.tensor([s.alpha * s.strength * self.sign[i] for i in rows])
        return shifted(self.model, s.vectors, s.steered, amounts, s.tail, s.layers_path)


def transitions(
    model, tokenizer, prompts: Sequence[str], tail: int, batch_size: int = 32, layers_path: str = ""
) -> Tensor:
    """t_ℓ = h_ℓ(end-of-instruction token) − h_ℓ(last token of " Sure"), [layers, n, hidden]."""
    sure = tokenizer(AGREEMENT, add_special_tokens=False)["input_ids"]
    rows = [row + sure for row in token_rows(tokenizer, prompts)]
    hidden = residuals(
        model,
        rows,
        tokenizer.pad_token_id,
        last=tail + len(sure),
        batch_size=batch_size,
        layers_path=layers_path,
    )
    return hidden[:, :, 0] - hidden[:, :, -1]


def fit_scans(
    model,
    tokenizer,
    harmful: Sequence[str],
    harmless: Sequence[str],
    *,
    alpha: float = 3.5,
    threshold: float = 0.75,
    layers_path: str = "",
) -> Scans:
    """Directions from anchor prompts. Raises DCRError when a side is empty."""
    if not len(harmful) or not len(harmless):
        raise DCRError(
            f"SCANS: {len(harmful)} harmful and {len(harmless)} harmless anchors; needs both."
        )
    tail, pad = instruction_tail(tokenizer), tokenizer.pad_token_id
    means = [
        residuals(model, token_rows(tokenizer, side), pad, last=1, layers_path=layers_path)[
            :, :, 0
        ].mean(1)
        for side in (harmful, harmless)
    ]
    vectors = torch.nn.functional.normalize(means[0] - means[1], dim=-1)
    mean = transitions(model, tokenizer, harmful, tail, layers_path=layers_path).mean(1)
    return Scans(vectors, mean, threshold, alpha, tail, layers_path=layers_path)


def choose_threshold(scores: Sequence[float], harmful: Sequence[bool]) -> dict[str, float]:
    """The threshold of best balanced accuracy on held-out prompts, with that accuracy, the AUROC and n.

    Chosen once for all test sets (the authors tune it per set); ties go to the middle of the best interval.
    """
    scores, harmful = np.asarray(scores, dtype=float), np.asarray(harmful, dtype=bool)
    if harmful.all() or not harmful.any():
        raise DCRError("SCANS threshold: held-out prompts must be of both classes.")
    values = np.unique(scores)
    cuts = np.concatenate([[values[0] - 1e-6], (values[1:] + values[:-1]) / 2, [values[-1] + 1e-6]])
    accuracy = np.array(
        [((scores[harmful] >= c).mean() + (scores[~harmful] < c).mean()) / 2 for c in cuts]
    )
    best = np.flatnonzero(accuracy >= accuracy.max() - 1e-12)
    return {
        "threshold": float(cuts[best[len(best) // 2]]),
        "balanced_accuracy": float(accuracy.max()),
        "auroc": float(roc_auc_score(harmful, scores)),
        "n": len(scores),
    }
