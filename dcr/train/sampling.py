"""Batches for contrastive refinement: seeded, balanced over class and form, minimal pairs kept together.

Each epoch is drawn from (seed, epoch) alone and the whole schedule before training, so a resumed run sees the
batches the interrupted one would have seen, and no global random state is touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dcr.errors import DCRError

TOXIC, SEEMINGLY_TOXIC, GENERAL = 1, 0, 2


class _Deck:
    """Row numbers dealt in shuffled order, reshuffled when they run out."""

    def __init__(self, rows: Sequence[int], rng: np.random.Generator) -> None:
        self.rows, self.rng, self.queue = np.asarray(rows), rng, []

    def deal(self, n: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < n:
            if not self.queue:
                self.queue = self.rng.permutation(self.rows).tolist()
            taken.append(self.queue.pop())
        return taken


@dataclass(frozen=True)
class BatchPlan:
    """What every batch holds. `general` rows are part of the batch, `retention` rows come on top."""

    toxic: int
    harmless: int
    general: int
    retention: int
    pairing: str = "sources"
    balance_forms: bool = False

    def per_epoch(self, table: pd.DataFrame) -> int:
        """Batches that show every toxic and every seemingly toxic prompt at least once."""
        counts = table["label"].value_counts()
        return max(
            1,
            math.ceil(counts.get("toxic", 0) / self.toxic),
            math.ceil(counts.get("seemingly_toxic", 0) / self.harmless),
        )


def batch_plan(
    *,
    batch_size: int,
    pairing: str = "sources",
    toxic_share: float = 0.5,
    balance_forms: bool = False,
    general_share: float = 0.0,
    retention_rows: int = 0,
) -> BatchPlan:
    """Places of each kind in a batch. Raises DCRError for an unknown pairing or shares that leave a class under two.

    sources/sham: `toxic_share` of the places toxic. matched: as many pairs as fit, whatever `toxic_share`.
    `general_share` of the non-toxic places go to general prompts.
    """
    if pairing not in ("sources", "matched", "sham"):
        raise DCRError(f"refine.pairing={pairing!r} is unknown; use sources, matched or sham.")
    if not 0 < toxic_share < 1 or not 0 <= general_share < 1:
        raise DCRError(
            f"refine.toxic_share={toxic_share} and refine.general_share={general_share} must lie in (0, 1) "
            "and [0, 1)."
        )
    toxic = max(2, round(batch_size * toxic_share))
    harmless = batch_size - toxic
    general = round(general_share * harmless)
    harmless -= general
    if pairing == "matched":
        toxic = harmless = (batch_size - general) // 2
    if harmless < 2:
        raise DCRError(
            f"refine.batch_size={batch_size} leaves {harmless} seemingly toxic places; the loss needs two "
            "of each class. Enlarge the batch or lower toxic_share or general_share."
        )
    return BatchPlan(toxic, harmless, general, retention_rows, pairing, balance_forms)


def contrastive_batches(
    table: pd.DataFrame, plan: BatchPlan, *, n_batches: int, seed: int
) -> list[list[int]]:
    """`n_batches` lists of row positions of `table` (columns label, form, pair_id), drawn epoch by epoch.

    With `balance_forms` questions and imperatives come equally often in both classes; `matched` puts both members
    of a minimal pair in one batch. Raises DCRError when a class is missing or too small for a batch.
    """
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < n_batches:
        batches += epoch_batches(table, plan, seed=seed, epoch=epoch)
        epoch += 1
    return batches[:n_batches]


def epoch_batches(
    table: pd.DataFrame, plan: BatchPlan, *, seed: int, epoch: int
) -> list[list[int]]:
    """The batches of one epoch, a function of (seed, epoch): each prompt is dealt before any comes again."""
    rng = np.random.default_rng([seed, epoch, 0xDC4])
    general = _Deck(np.flatnonzero((table["label"] == "general").to_numpy()), rng)
    if plan.general + plan.retention and not len(general.rows):
        raise DCRError(
            "refine.general_share or refine.retention is set but no general prompts were given; pass "
            "general=[...]."
        )
    if plan.pairing == "matched":
        pairs = _pair_dealer(table, rng, plan.balance_forms)
    else:
        toxic = _class_dealer(table, "toxic", plan.toxic, rng, plan.balance_forms)
        harmless = _class_dealer(table, "seemingly_toxic", plan.harmless, rng, plan.balance_forms)
    batches = []
    for _ in range(plan.per_epoch(table)):
        contrast = (
            pairs(plan.toxic)
            if plan.pairing == "matched"
            else toxic(plan.toxic) + harmless(plan.harmless)
        )
        batches.append(
            rng.permutation(contrast + general.deal(plan.general + plan.retention)).tolist()
        )
    return batches


def _class_dealer(
    table: pd.DataFrame, label: str, need: int, rng: np.random.Generator, balance_forms: bool
):
    rows = np.flatnonzero((table["label"] == label).to_numpy())
    if len(rows) < max(2, need):
        raise DCRError(
            f"{len(rows)} {label} prompts, but a batch needs {max(2, need)}. Give more prompts or lower "
            "refine.batch_size."
        )
    forms = table["form"].to_numpy()[rows]
    if not balance_forms:
        return _Deck(rows, rng).deal
    decks = [
        _Deck(rows[forms == form], rng)
        for form in ("question", "imperative")
        if (forms == form).any()
    ]
    if len(decks) < 2:
        raise DCRError(
            f"refine.balance_forms is on, but the {label} prompts are all of one form. Add the other form "
            "(dcr.data.forms.swap_table) or turn it off."
        )

    def deal(n: int) -> list[int]:
        first = (n + int(rng.integers(2))) // 2
        return decks[0].deal(first) + decks[1].deal(n - first)

    return deal


def _pair_dealer(table: pd.DataFrame, rng: np.random.Generator, balance_forms: bool):
    members: dict[str, dict[str, int]] = {}
    for position, (pair, label) in enumerate(zip(table["pair_id"], table["label"], strict=True)):
        if pair and label != "general":
            members.setdefault(pair, {})[label] = position
    pairs = [p for p in members.values() if len(p) == 2]
    if len(pairs) < 2:
        raise DCRError(
            f"refine.pairing=matched needs minimal pairs (a toxic and a seemingly toxic prompt with one "
            f"pair_id); found {len(pairs)}. Use the bundled pairs or pairing=sources."
        )
    forms = np.array([table["form"].iloc[p["toxic"]] for p in pairs])
    groups = (
        [np.flatnonzero(forms == f) for f in ("question", "imperative")] if balance_forms else []
    )
    decks = [_Deck(g, rng) for g in groups if len(g)] or [_Deck(np.arange(len(pairs)), rng)]

    def deal(n: int) -> list[int]:
        shares = [n] if len(decks) == 1 else [n // 2, n - n // 2]
        chosen = [i for deck, share in zip(decks, shares, strict=True) for i in deck.deal(share)]
        return [pairs[i][label] for i in chosen for label in ("toxic", "seemingly_toxic")]

    return deal


class FixedBatches:
    """A batch sampler over a schedule drawn beforehand (what DataLoader and accelerate ask of one)."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self.batches = [list(b) for b in batches]
        self.batch_size = max(len(b) for b in self.batches)
        self.drop_last = False

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def shuffled_labels(labels: Sequence[str], seed: int) -> list[str]:
    """The sham control: the toxic and seemingly toxic labels permuted among their prompts, general ones untouched."""
    labels = np.asarray(labels, dtype=object)
    mixed = np.flatnonzero(labels != "general")
    labels[mixed] = np.random.default_rng([seed, 0x5A]).permutation(labels[mixed])
    return labels.tolist()
