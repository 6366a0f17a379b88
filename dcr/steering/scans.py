"""SCANS (Cao et al., AAAI 2025): judge a prompt by its hidden-state transition, then steer.

v_ℓ = unit(mean h_ℓ(harmful) − mean h_ℓ(harmless)) at the last prompt token, output of block ℓ. For
the decision " Sure" is appended; t_ℓ = h_ℓ(end of instruction) − h_ℓ(last token); the score is the
mean over layers of cos(t_ℓ, mean t_ℓ of harmful anchors). Score ≥ threshold: judged harmful, +α v;
else −α v; from the end-of-instruction token on.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from dcr.errors import DCRError
from dcr.lm.decode import Unsteered
from dcr.lm.states import residuals
from dcr.steering.hooks import Fit, Material, Steering, rows_of, shifted, template_ends

# Published for 32 blocks: steer at 10..19, judge by 10..31; other depths in proportion.
STEERED = (10 / 32, 20 / 32)
AGREEMENT = " Sure"


@dataclass(frozen=True)
class Scans(Steering):
    """facts: threshold, alpha, tail; tensors: vectors and transitions, both [layers, hidden]."""

    ANCHORS = ("harmful", "harmless")

    @classmethod
    def fitted(cls, on: Material) -> Fit:
        """Directions from anchors; the one threshold from validation prompts of both classes."""
        sides = [on.anchors[role]["text"].tolist() for role in cls.ANCHORS]
        if not all(sides):
            raise DCRError(f"SCANS: {len(sides[0])} harmful and {len(sides[1])} harmless anchors.")
        means = [on.residuals(on.rows(r), [(-1, None)])[1:, :, 0].mean(1) for r in cls.ANCHORS]
        facts = {"alpha": on.options.scans_alpha, "tail": template_ends(on.tokenizer)[1]}
        judge = cls(facts, {}, layers_path=on.layers_path)
        moved = judge.transitions(on.model, on.tokenizer, sides[0]).mean(1)
        tensors = {"vectors": normalize(means[0] - means[1], dim=-1), "transitions": moved}
        if on.options.scans_threshold:
            chosen = {"threshold": on.options.scans_threshold, "threshold_from": "configuration"}
            return facts | chosen, tensors
        judge.tensors.update(tensors)
        scores = judge.harmfulness(on.model, on.tokenizer, on.validation["text"].tolist())
        toxic = (on.validation["label"] == "toxic").to_numpy()
        return facts | choose_threshold(scores, toxic), tensors

    @property
    def steered(self) -> range:
        """Numbers of the blocks (from 0) whose output is shifted."""
        first, end = (round(f * len(self.tensors["vectors"])) for f in STEERED)
        return range(first, max(end, first + 1))

    def transitions(self, model, tokenizer, prompts: Sequence[str]) -> Tensor:
        """t_ℓ = h_ℓ(end-of-instruction token) − h_ℓ(last of " Sure"), [layers, n, hidden]."""
        sure = tokenizer(AGREEMENT, add_special_tokens=False)["input_ids"]
        rows = [row + sure for row in rows_of(model, tokenizer, prompts, len(sure))]
        end = self.facts["tail"] + len(sure)
        places = [(-end, 1 - end or None), (-1, None)]
        hidden = residuals(model, rows, places, self.layers_path)[1:]
        return hidden[:, :, 0] - hidden[:, :, 1]

    def harmfulness(self, model, tokenizer, prompts: Sequence[str]) -> np.ndarray:
        """[n] score in [−1, 1] of each prompt."""
        moved = self.transitions(model, tokenizer, prompts)
        cosine = cosine_similarity(moved, self.tensors["transitions"][:, None], dim=-1)
        return cosine[self.steered.start :].mean(0).double().numpy()  # [layers, n] -> [n]

    def start(self, model, tokenizer, prompts: list[str]) -> Unsteered:
        """Each prompt judged, and shifted by its own sign."""
        harmful = self.harmfulness(model, tokenizer, prompts) >= self.facts["threshold"]
        amounts = torch.tensor(np.where(harmful, 1.0, -1.0)) * self.facts["alpha"] * self.strength
        tail = self.facts["tail"]

        def during(rows: Sequence[int] | None, first: bool) -> contextlib.AbstractContextManager:
            if rows is None:  # the shared prefix is never steered
                return contextlib.nullcontext()
            own = amounts[list(rows), None]
            shifts = {i: own * self.tensors["vectors"][i] for i in self.steered}  # [batch, hidden]
            return shifted(model, shifts, tail if first else 0, self.layers_path)

        return Unsteered(tail=tail, during=during)


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
