"""The decision as one token (after Refusal Tokens, COLM 2025), alone and with a gate.

A model aligned with a decision word in front of every answer decides there; the log odds of
refusing against complying are its score, and any threshold can be set at inference. The word is
put behind the prompt, so that the shown answer begins after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dcr.lm.decode import Unsteered
from dcr.lm.states import last_logits
from dcr.steering.gate import Deciding, Gate, balanced_auroc, nominal
from dcr.steering.hooks import Fit, Material, rows_of
from dcr.train.examples import decision_tokens

WEIGHTS = tuple(round(0.1 * i, 1) for i in range(11))  # of the second score, tried on validation


@dataclass(frozen=True)
class DecisionToken(Deciding):
    """facts: threshold, the words, and what was measured."""

    @classmethod
    def fitted(cls, on: Material) -> Fit:
        """The one threshold from validation prompts."""
        facts = {"words": list(decision_tokens(on.tokenizer).words)}
        scores = cls(facts, {}).score(on.model, on.tokenizer, on.validation["text"].tolist())
        return facts | nominal(on.validation, scores, on.options), {}

    def score(self, model, tokenizer, prompts: Sequence[str]) -> np.ndarray:
        """[n] log odds of the word that refuses against the one that complies, as first token."""
        words, rows = decision_tokens(tokenizer), rows_of(model, tokenizer, prompts)
        logits = last_logits(model, rows, [words.refuse, words.comply])
        return (logits[:, 0] - logits[:, 1]).cpu().double().numpy()

    def start(self, model, tokenizer, prompts: list[str]) -> Unsteered:
        """The decided word behind each prompt."""
        words, refused = decision_tokens(tokenizer), self.refuses(model, tokenizer, prompts)
        return Unsteered(prefill=[[words.refuse if r else words.comply] for r in refused])


def fit_combination(prompts: pd.DataFrame, scores: pd.DataFrame) -> dict:
    """Means and deviations of two scores [n, 2] on validation prompts, and the second one's weight.

    The weight, of 0, .1 ... 1, is that of the best AUROC with forms and harmless sets equal; ties
    go to the most even one.
    """
    facts = {
        "mean": scores.mean().to_dict(),
        "deviation": scores.std(ddof=0).replace(0.0, 1.0).to_dict(),
    }
    aurocs = [
        balanced_auroc(prompts, combined(scores, facts | {"weight": w}).to_numpy()) for w in WEIGHTS
    ]
    best = max(zip(aurocs, WEIGHTS, strict=True), key=lambda a: (round(a[0], 4), -abs(a[1] - 0.5)))
    return facts | {"weight": best[1], "aurocs": aurocs}


def combined(scores: pd.DataFrame, facts: dict) -> pd.Series:
    """[n] the sum of two standardised scores, weighted 1 − w and w (see `fit_combination`)."""
    standard = (scores - pd.Series(facts["mean"])) / pd.Series(facts["deviation"])
    first, second = scores.columns
    return (1 - facts["weight"]) * standard[first] + facts["weight"] * standard[second]


@dataclass(frozen=True)
class TokenGate(DecisionToken):
    """The decision token and a gate on the same model, standardised and weighted on validation."""

    ANCHORS = Gate.ANCHORS

    @classmethod
    def fitted(cls, on: Material) -> Fit:
        """The gate, then weight and threshold of the sum on validation prompts."""
        gate, tensors = Gate.fitted(on)
        both = cls({"gate": gate}, tensors, layers_path=on.layers_path)
        scores = both.parts(on.model, on.tokenizer, on.validation["text"].tolist())
        facts = both.facts | fit_combination(on.validation, scores)
        total = combined(scores, facts).to_numpy()
        return facts | nominal(on.validation, total, on.options), tensors

    def parts(self, model, tokenizer, prompts: Sequence[str]) -> pd.DataFrame:
        """[n, (token, gate)] both scores."""
        gate = Gate(self.facts["gate"], self.tensors, layers_path=self.layers_path)
        scores = {"token": super().score, "gate": gate.score}
        return pd.DataFrame({k: score(model, tokenizer, prompts) for k, score in scores.items()})

    def score(self, model, tokenizer, prompts: Sequence[str]) -> np.ndarray:
        """[n] the sum of both standardised scores."""
        return combined(self.parts(model, tokenizer, prompts), self.facts).to_numpy()
