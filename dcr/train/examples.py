"""Stage 2's rows: prompts and answers as token ids, labels among them, the decision token."""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dcr.config import AlignConfig
from dcr.data.read import prompts_of
from dcr.errors import DCRError
from dcr.lm.batches import padded
from dcr.lm.chat import encode_examples

log = logging.getLogger("dcr")
WORDS = (("No", "Yes"), ("no", "yes"), ("Sorry", "Sure"), ("sorry", "sure"))  # refuse, comply


@dataclass(frozen=True)
class Decision:
    """The two tokens, one of which comes first in every answer, and the words that they are."""

    refuse: int
    comply: int
    words: tuple[str, str]


def decision_tokens(tokenizer) -> Decision:
    """Ordinary words for "refuse" and "comply" that are one token each (after Jain et al. 2024).

    Not two unused tokens: in a tied embedding their rows are alike, and adapters do not move them.
    Raises DCRError when the tokenizer has no such pair.
    """
    for words in WORDS:
        refuse, comply = tokenizer(list(words), add_special_tokens=False)["input_ids"]
        if len(refuse) == len(comply) == 1 and tokenizer.unk_token_id not in refuse + comply:
            return Decision(refuse[0], comply[0], words)
    pairs = ", ".join("/".join(w) for w in WORDS)
    raise DCRError(
        f'align.decision="words": {tokenizer.name_or_path} has none of {pairs} as single tokens. '
        'Use align.decision="" or another model.'
    )


class Examples:
    """Tokenised rows of an alignment mix; labels are an answer and its end token, or all tokens.

    mix: whatever holds prompts with responses. With `align.decision` rows labelled toxic begin
        their answer with the token that refuses, the others with the one that complies. A column
        `target` holds log odds of refusing for the routed loss (NaN: none for this row); without
        `align.routing` it is not read.
    Raises DCRError for a row without an answer, and when the length limit leaves no label at all.
    """

    def __init__(self, mix, tokenizer, config: AlignConfig) -> None:
        table = prompts_of(mix, what="mix", answers=True)
        ids, starts = encode_examples(tokenizer, table["text"].tolist(), table["response"].tolist())
        self.decision = decision_tokens(tokenizer) if config.decision else None
        if self.decision:
            toxic = table["label"] == "toxic"
            if toxic.nunique() < 2:
                raise DCRError(
                    'align.decision="words" needs rows labelled toxic (they refuse) and others in '
                    'the mix: give it a column "label".'
                )
            for row, start, refuse in zip(ids, starts, toxic, strict=True):
                row.insert(start, self.decision.refuse if refuse else self.decision.comply)
        targets = pd.Series(np.nan, table.index)
        if config.routing:
            with contextlib.suppress(ValueError, TypeError):  # no numbers are no targets
                targets = pd.to_numeric(table.get("target", targets))
            if not self.decision or targets.isna().all():
                raise DCRError(
                    'align.routing needs align.decision="words" and a column "target" of numbers '
                    "in the mix: the log odds of refusing that a probe gives each prompt."
                )
        limit = config.max_length
        taught = [i for i, start in enumerate(starts) if start < limit]  # with some of the answer
        self.dropped = len(ids) - len(taught)
        self.truncated = sum(len(ids[i]) > limit for i in taught)
        if not taught:
            raise DCRError(
                f"align.max_length={limit} cuts off every answer: the shortest prompt "
                f"has {min(starts)} tokens. Raise it."
            )
        self.ids = [ids[i][:limit] for i in taught]
        self.heads = [starts[i] for i in taught]  # tokens of the prompt
        self.starts = self.heads if config.labels == "completion" else [1] * len(self.ids)
        self.targets = torch.tensor(targets.iloc[taught].to_numpy(), dtype=torch.float32)
        self.lengths = [len(row) for row in self.ids]
        if self.truncated or self.dropped:
            log.warning(
                "align: of %d examples %d are longer than align.max_length=%d tokens and were cut "
                "(they do not teach the stop token), and %d were dropped: nothing of their answer "
                "is left",
                *(len(ids), self.truncated, limit, self.dropped),
            )

    def facts(self) -> list:
        """What training sees, as plain values."""
        return [self.ids, self.starts, [str(t) for t in self.targets.tolist()]]

    def labels(self, rows: Sequence[int]) -> int:
        """Labelled tokens of some rows."""
        return sum(self.lengths[r] - self.starts[r] for r in rows)

    def collate(self, rows: Sequence[int], device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Right-padded ids and mask [batch, seq]; where labels are predicted, and what they are.

        row, column, labels [labels]: `labels` follow the tokens at ids[row, column]. last [batch]:
        the prompt's last token, which predicts the decision. targets [batch].
        """
        ids, mask = padded([self.ids[r] for r in rows], "right")
        spans = [
            (i, t) for i, r in enumerate(rows) for t in range(self.starts[r], len(self.ids[r]))
        ]
        row, after = torch.tensor(spans).T
        batch = {
            "ids": ids,
            "mask": mask,
            "row": row,
            "column": after - 1,
            "labels": ids[row, after],
            "last": torch.tensor([self.heads[r] - 1 for r in rows]),
            "targets": self.targets[list(rows)],
        }
        return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
