"""SCANS (Cao et al., AAAI 2025): judge a prompt by its hidden-state transition, then steer.

v_ℓ = unit(mean h_ℓ(harmful) − mean h_ℓ(harmless)) at the last prompt token, output of block ℓ. For
the decision " Sure" is appended; t_ℓ = h_ℓ(end of instruction) − h_ℓ(last token); the score is the
mean over layers of cos(t_ℓ, mean t_ℓ of harmful anchors). Score ≥ threshold: judged harmful, +α v;
else −α v; from the end-of-instruction token on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from dcr.config import SteeringConfig
from dcr.errors import DCRError
from dcr.lm.chat import encode_prompts
from dcr.lm.decode import Unsteered
from dcr.steering.hooks import Steering, residuals, shifted, template_ends

# Published for 32 blocks: steer at 10..19, judge by 10..31; other depths in proportion.
STEERED = (10 / 32, 20 / 32)
AGREEMENT = " Sure"


@dataclass(frozen=True)
class Scans(Steering):
    """facts: threshold, alpha, tail; tensors: vectors and transitions, both [layers, hidden]."""

    ANCHORS = ("harmful", "harmless")
    known: dict[str, float] = field(default_factory=dict, compare=False)  # a prompt is judged once

    @classmethod
    def fit(
        cls,
        model,
        tokenizer,
        anchors: dict[str, pd.DataFrame],
        validation: pd.DataFrame,
        options: SteeringConfig,
        **others,
    ) -> Self:
        """Directions from anchors (roles harmful, harmless); the one threshold from validation.

        Raises DCRError when a side is empty, or validation prompts are of one class.
        """
        sides = [anchors[role]["text"].tolist() for role in cls.ANCHORS]
        if not all(sides):
            raise DCRError(f"SCANS: {len(sides[0])} harmful and {len(sides[1])} harmless anchors.")
        path, tail = others.get("layers_path", ""), template_ends(tokenizer)[1]
        means = [
            residuals(model, encode_prompts(tokenizer, side), [(-1, None)], layers_path=path)[
                :, :, 0
            ]
            for side in sides
        ]
        vectors = torch.nn.functional.normalize(means[0].mean(1) - means[1].mean(1), dim=-1)
        moved = transitions(model, tokenizer, sides[0], tail, path).mean(1)
        tensors = {"vectors": vectors, "transitions": moved}
        facts = {"alpha": options.scans_alpha, "tail": tail}
        if options.scans_threshold:
            chosen: dict = {"threshold": options.scans_threshold, "threshold_from": "configuration"}
        else:
            judged = cls(facts, tensors, layers_path=path)
            scores = judged.harmfulness(model, tokenizer, validation["text"].tolist())
            chosen = choose_threshold(scores, (validation["label"] == "toxic").to_numpy())
        return cls(facts | chosen, tensors, layers_path=path)

    @property
    def steered(self) -> range:
        """Numbers of the blocks (from 0) whose output is shifted."""
        first, end = (round(f * len(self.tensors["vectors"])) for f in STEERED)
        return range(first, max(end, first + 1))

    def harmfulness(self, model, tokenizer, prompts: Sequence[str]) -> np.ndarray:
        """[n] score in [−1, 1] of each prompt."""
        new = [p for p in dict.fromkeys(prompts) if p not in self.known]
        if new:
            moved = transitions(model, tokenizer, new, self.facts["tail"], self.layers_path)
            like = self.tensors["transitions"].to(moved)[:, None]
            cosine = torch.nn.functional.cosine_similarity(moved, like, dim=-1)  # [layers, n]
            scores = cosine[self.steered.start :].mean(0).tolist()
            self.known.update(zip(new, scores, strict=True))
        return np.array([self.known[p] for p in prompts])

    def start(self, model, tokenizer, prompts: list[str]) -> Unsteered:
        """Each prompt judged, and shifted by its own sign."""
        harmful = self.harmfulness(model, tokenizer, prompts) >= self.facts["threshold"]
        amounts = torch.tensor(np.where(harmful, 1.0, -1.0)) * self.facts["alpha"] * self.strength
        return _Shifting(self, model, amounts)


class _Shifting(Unsteered):
    def __init__(self, steering: Scans, model, amounts: Tensor) -> None:
        self.steering, self.model, self.amounts = steering, model, amounts
        self.tail = steering.facts["tail"]  # the shared prefix is never steered

    def during(
        self, rows: Sequence[int] | None, first: bool
    ) -> contextlib.AbstractContextManager[None]:
        if rows is None:
            return contextlib.nullcontext()
        amounts, s = self.amounts[list(rows), None], self.steering
        shifts = {i: amounts * s.tensors["vectors"][i] for i in s.steered}  # [batch, hidden]
        return shifted(self.model, shifts, self.tail if first else 0, s.layers_path)


def transitions(
    model, tokenizer, prompts: Sequence[str], tail: int, layers_path: str = ""
) -> Tensor:
    """t_ℓ = h_ℓ(end-of-instruction token) − h_ℓ(last token of " Sure"), [layers, n, hidden]."""
    sure = tokenizer(AGREEMENT, add_special_tokens=False)["input_ids"]
    rows = [row + sure for row in encode_prompts(tokenizer, prompts)]
    ends = tail + len(sure)
    hidden = residuals(
        model, rows, [(-ends, 1 - ends or None), (-1, None)], layers_path=layers_path
    )
    return hidden[:, :, 0] - hidden[:, :, 1]


def choose_threshold(scores: np.ndarray, harmful: np.ndarray) -> dict:
    """The cut of best balanced accuracy on held-out prompts, with that accuracy, AUROC and n.

    Chosen once for all test sets (the authors tune it per set), midway to the next lower score.
    """
    if harmful.all() or not harmful.any():
        raise DCRError("SCANS threshold: held-out prompts must be of both classes.")
    wrong, right, cuts = roc_curve(harmful, scores, drop_intermediate=False)
    best = int(np.argmax(right - wrong))
    cut = min(cuts[best], scores.max())
    below = scores[scores < cut].max(initial=cut - 1.0)
    return {
        "threshold": float(cut + below) / 2,
        "threshold_from": "validation prompts",
        "balanced_accuracy": float(1 + right[best] - wrong[best]) / 2,
        "auroc": float(roc_auc_score(harmful, scores)),
        "n": len(scores),
    }
