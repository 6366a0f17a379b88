"""Batches for contrastive refinement: seeded, balanced over class and form, minimal pairs kept together.

The whole schedule is drawn before training from the seed alone, so a resumed run sees the batches the
interrupted one would have seen, and no global random state is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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


def contrastive_batches(table: pd.DataFrame, *, batch_size: int, n_batches: int, seed: int, pairing: str = "sources",
                        toxic_share: float = 0.5, balance_forms: bool = False, general_share: float = 0.0,
                        retention_rows: int = 0) -> list[list[int]]:
    """`n_batches` lists of row positions of `table` (columns label, form, pair_id).

    sources/sham: `toxic_share` of each batch toxic, the rest seemingly toxic; with `balance_forms` questions and
    imperatives equally often in both. matched: batch_size / 2 minimal pairs, both members in the same batch.
    `general_share` of the non-toxic places go to general prompts; `retention_rows` further general rows are added.
    Raises DCRError when a class is missing or too small for a batch.
    """
    if pairing not in ("sources", "matched", "sham"):
        raise DCRError(f"refine.pairing={pairing!r} is unknown; use sources, matched or sham.")
    if not 0 < toxic_share < 1 or not 0 <= general_share < 1:
        raise DCRError(f"refine.toxic_share={toxic_share} and refine.general_share={general_share} must lie in (0, 1) "
                       "and [0, 1).")
    rng = np.random.default_rng([seed, 0xDC4])
    label = table["label"].to_numpy()
    general = _Deck(np.flatnonzero(label == "general"), rng)
    n_toxic = max(2, round(batch_size * toxic_share))
    n_harmless = batch_size - n_toxic
    n_general = round(general_share * n_harmless)
    n_harmless -= n_general
    if n_harmless < 2:
        raise DCRError(f"refine.batch_size={batch_size} leaves {n_harmless} seemingly toxic places; the loss needs two "
                       "of each class. Enlarge the batch or lower toxic_share or general_share.")
    if (n_general or retention_rows) and not len(general.rows):
        raise DCRError("refine.general_share or refine.retention is set but no general prompts were given; pass "
                       "general=[...].")
    if pairing == "matched":
        deal = _pair_dealer(table, rng, balance_forms)
        draw = lambda: deal((batch_size - n_general) // 2)  # noqa: E731
    else:
        toxic = _class_dealer(table, "toxic", n_toxic, rng, balance_forms)
        harmless = _class_dealer(table, "seemingly_toxic", n_harmless, rng, balance_forms)
        draw = lambda: toxic(n_toxic) + harmless(n_harmless)  # noqa: E731
    batches = []
    for _ in range(n_batches):
        batch = draw() + general.deal(n_general + retention_rows)
        batches.append(rng.permutation(batch).tolist())
    return batches


def _class_dealer(table: pd.DataFrame, label: str, need: int, rng: np.random.Generator, balance_forms: bool):
    rows = np.flatnonzero((table["label"] == label).to_numpy())
    if len(rows) < max(2, need):
        raise DCRError(f"{len(rows)} {label} prompts, but a batch needs {max(2, need)}. Give more prompts or lower "
                       "refine.batch_size.")
    forms = table["form"].to_numpy()[rows]
    if not balance_forms:
        return _Deck(rows, rng).deal
    decks = [_Deck(rows[forms == form], rng) for form in ("question", "imperative") if (forms == form).any()]
    if len(decks) < 2:
        raise DCRError(f"refine.balance_forms is on, but the {label} prompts are all of one form. Add the other form "
                       "(dcr.data.forms.swap_table) or turn it off.")

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
        raise DCRError(f"refine.pairing=matched needs minimal pairs (a toxic and a seemingly toxic prompt with one "
                       f"pair_id); found {len(pairs)}. Use the bundled pairs or pairing=sources.")
    forms = np.array([table["form"].iloc[p["toxic"]] for p in pairs])
    groups = [np.flatnonzero(forms == f) for f in ("question", "imperative")] if balance_forms else []
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
