"""Self-contrastive decoding (Shi et al., "Navigating the OverKill", ACL 2024): subtract what a plea for safety adds.

y the logits behind a prompt that stresses safety, y' behind the plain one; the next token is argmax of y − α (y − y').
α = 0 decodes with the plea, 1 without it, above 1 against it; the authors' code takes 2.5. As there, the plea stands in
the user's turn, before the prompt, so every chat template can carry it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dcr.lm.chat import render
from dcr.lm.generate import State, _Decoder

# The system prompt that the authors' script uses (Llama 2's, shortened there).
PLEA = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. Your "
    "answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content."
)


@dataclass(frozen=True)
class SelfCD:
    """α and its multiple; `decoder` runs both branches of each prompt behind their own cached prefix."""

    alpha: float = 2.5
    strength: float = 1.0

    @property
    def settings(self) -> dict:
        """What an answer depends on beside the weights, for the resume check of `generate`."""
        return {"method": "SelfCD", "alpha": self.alpha, "strength": self.strength, "plea": PLEA}

    def at(self, strength: float) -> SelfCD:
        """The same with another multiple of α."""
        return replace(self, strength=strength)

    def decoder(self, *args) -> _Decoder:
        """A decoder of (model, tokenizer, prompts, ...), as `generate` builds it."""
        return SelfCDDecoder(self, *args)


@dataclass
class PairState(State):
    """A batch under way, with the same rows behind the plea."""

    pleading: State


class SelfCDDecoder(_Decoder):
    """Two decoders in step: one reads the plain prompts, one the same prompts behind the plea."""

    def __init__(self, steering: SelfCD, model, tokenizer, prompts: Sequence[str], *args) -> None:
        super().__init__(model, tokenizer, render(tokenizer, prompts), *args)
        self.alpha = steering.alpha * steering.strength
        self.other = _Decoder(
            model, tokenizer, render(tokenizer, [f"{PLEA} {p}" for p in prompts]), *args
        )

    def begin(self, batch: Sequence[int]) -> State:
        plain = super().begin(batch)
        return PairState(plain.rows, plain.ids, plain.mask, plain.cache, self.other.begin(batch))

    def logits(self, state: PairState) -> Tensor:
        plain, pleading = super().logits(state).float(), self.other.logits(state.pleading).float()
        return pleading - self.alpha * (pleading - plain)

    def advance(self, state: PairState, token: Tensor, alive: list[int]) -> None:
        super().advance(state, token, alive)
        self.other.advance(state.pleading, token, alive)
