"""Batches of both stages, drawn from the seed before training.

Contrastive batches are balanced over class and form and keep minimal pairs together; each epoch is
drawn from (seed, epoch) alone. No global random state is touched.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dcr.config import AlignConfig, RefineConfig
from dcr.errors import DCRError


def training_steps(
    config: RefineConfig | AlignConfig, an_epoch: int, draw: Callable[[int], list]
) -> list[list[list[int]]]:
    """The batches of every optimiser step: `max_steps` of them, else what `epochs` take.

    an_epoch: batches that show every row. draw: n -> n batches.
    """
    k = config.accumulation
    n = config.max_steps or max(1, math.ceil(config.epochs * an_epoch / k))
    batches = draw(n * k)
    return [batches[i : i + k] for i in range(0, n * k, k)]


@dataclass(frozen=True)
class BatchPlan:
    """Rows of each kind in a batch: `general` is part of it, `retention` comes on top."""

    toxic: int
    harmless: int
    general: int
    retention: int
    matched: bool
    balance_forms: bool


def batch_plan(config: RefineConfig) -> BatchPlan:
    """Places of each kind. Raises DCRError for shares that leave a class too few.

    sources/sham: `toxic_share` of the places toxic. matched: as many pairs as fit, whatever
    `toxic_share`. `general_share` of the non-toxic places go to general prompts.
    """
    size, matched = config.batch_size, config.pairing == "matched"
    toxic = max(2, round(size * config.toxic_share))
    general = round(config.general_share * (size - toxic))
    harmless = size - toxic - general
    if matched:
        toxic = harmless = (size - general) // 2
    if harmless < 2:
        raise DCRError(
            f"refine.batch_size={size} leaves {harmless} seemingly toxic places, and the loss "
            "needs two of each class. Enlarge the batch or lower refine.toxic_share or "
            "refine.general_share."
        )
    if config.general_share > 0 and not general:
        raise DCRError(
            f"refine.general_share={config.general_share} of refine.batch_size={size} is not one "
            "general prompt. Enlarge either, or set the share to 0."
        )
    retention = size // 4 if config.retention and not config.general_share else 0
    return BatchPlan(toxic, harmless, general, retention, matched, config.balance_forms)


def batches_per_epoch(table: pd.DataFrame, plan: BatchPlan) -> int:
    """Batches that show every toxic and every seemingly toxic prompt at least once.

    Not so with `balance_forms`: of a class's commoner form only as many come as batches take.
    """
    counts = table["label"].value_counts()
    places = (("toxic", plan.toxic), ("seemingly_toxic", plan.harmless))
    return max(1, *(math.ceil(counts.get(label, 0) / n) for label, n in places))


def contrastive_batches(
    table: pd.DataFrame, plan: BatchPlan, n_batches: int, *, seed: int
) -> list[list[int]]:
    """`n_batches` lists of row numbers of `table` (columns label, form, pair_id), by epochs.

    With `balance_forms` questions and imperatives come equally often in both classes; matched puts
    both members of a pair in one batch. Raises DCRError for a class, a form or pairs that are
    missing or fewer than a batch takes.
    """
    epochs = (epoch_batches(table, plan, seed=seed, epoch=i) for i in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(epochs), n_batches))


def epoch_batches(
    table: pd.DataFrame, plan: BatchPlan, *, seed: int, epoch: int
) -> list[list[int]]:
    """The batches of one epoch: of what is dealt together, each comes before any comes again."""
    rng = np.random.default_rng([seed, epoch, 0xDC4])
    extra = plan.general + plan.retention
    deals = [(_dealer([[r] for r in _rows(table, "general", extra)], rng), extra)]
    if plan.matched:
        pairs = _pairs(table, plan.toxic)
        deals.append((_dealer(pairs, rng, table if plan.balance_forms else None), plan.toxic))
    else:
        for label, n in (("toxic", plan.toxic), ("seemingly_toxic", plan.harmless)):
            units = [[r] for r in _rows(table, label, max(2, n))]
            deals.append((_dealer(units, rng, table if plan.balance_forms else None), n))
    batches = [
        sum((deal(n) for deal, n in deals), []) for _ in range(batches_per_epoch(table, plan))
    ]
    return [rng.permutation(batch).tolist() for batch in batches]


def _rows(table: pd.DataFrame, label: str, need: int) -> list[int]:
    rows = np.flatnonzero((table["label"] == label).to_numpy()).tolist()
    if label == "general" and need and not rows:
        raise DCRError(
            "refine.general_share or refine.retention is set but no general prompts were given; "
            "pass general=[...]."
        )
    if label != "general" and len(rows) < need:
        raise DCRError(
            f"{len(rows)} {label} prompts, but a batch needs {need}. Give more prompts or lower "
            "refine.batch_size."
        )
    return rows


def _pairs(table: pd.DataFrame, need: int) -> list[list[int]]:
    """[toxic row, seemingly toxic row] of every minimal pair."""
    members: dict[str, dict[str, int]] = {}
    for row, (pair, label) in enumerate(zip(table["pair_id"], table["label"], strict=True)):
        if pair and label != "general":
            if members.setdefault(pair, {}).setdefault(label, row) != row:
                raise DCRError(f"pair_id {pair!r} stands at two {label} prompts; a pair has one.")
    pairs = [[p["toxic"], p["seemingly_toxic"]] for p in members.values() if len(p) == 2]
    if len(pairs) < need:
        raise DCRError(
            "refine.pairing=matched needs minimal pairs (a toxic and a seemingly toxic prompt with "
            f"one pair_id); found {len(pairs)}, a batch takes {need}. Use the bundled pairs or "
            "refine.pairing=sources, or lower refine.batch_size."
        )
    return pairs


def _dealer(
    units: list[list[int]], rng: np.random.Generator, balanced: pd.DataFrame | None = None
) -> Callable[[int], list[int]]:
    """Deals n units (rows that stay together), shuffled anew when they run out.

    balanced: the table whose forms are dealt in equal numbers (an odd unit goes to either).
    """
    decks = [units]
    if balanced is not None:
        forms = balanced["form"].to_numpy()
        decks = [[u for u in units if forms[u[0]] == f] for f in ("question", "imperative")]
    queues: list[list[int]] = [[] for _ in decks]

    def deal(n: int) -> list[int]:
        first = (n + int(rng.integers(2))) // 2 if len(decks) == 2 else n
        taken: list[int] = []
        for deck, queue, share in zip(decks, queues, (first, n - first), strict=False):
            if balanced is not None and share > len(deck):
                label = balanced["label"].iloc[units[0][0]]
                raise DCRError(
                    f"refine.balance_forms is on, but of the {label} prompts "
                    f"{' and '.join(str(len(d)) for d in decks)} are questions and imperatives: "
                    "too few of one form for a batch. Add that form (dcr.data.forms), lower "
                    "refine.batch_size or turn it off."
                )
            for _ in range(share):
                if not queue:
                    queue.extend(rng.permutation(len(deck)).tolist())
                taken += deck[queue.pop()]
        return taken

    return deal


def length_grouped_batches(
    lengths: Sequence[int], batch_size: int, n_batches: int, seed: int
) -> list[list[int]]:
    """Shuffled batches of similar length; every pass covers each row once.

    Rows are shuffled, sorted inside groups of 16 batches, and the batches shuffled.
    """
    rng = np.random.default_rng([seed, 0xA11])
    sizes = np.asarray(lengths)
    batches: list[list[int]] = []
    while len(batches) < n_batches:
        order = rng.permutation(len(sizes))
        groups = np.split(order, range(16 * batch_size, len(order), 16 * batch_size))
        order = np.concatenate([g[np.argsort(-sizes[g], kind="stable")] for g in groups])
        fresh = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
        batches += [fresh[i] for i in rng.permutation(len(fresh))]
    return batches[:n_batches]


def shuffled_labels(labels: Iterable[str], seed: int) -> list[str]:
    """The sham control: toxic and seemingly toxic labels permuted among their prompts."""
    mixed = np.array(list(labels), dtype=object)
    rows = np.flatnonzero(mixed != "general")
    mixed[rows] = np.random.default_rng([seed, 0x5A]).permutation(mixed[rows])
    return mixed.tolist()
