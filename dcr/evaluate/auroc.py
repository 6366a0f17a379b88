"""How well refusal scores (higher: inclined to refuse) order prompts: AUROC with weights.

By pair of forms and by harmless source, averaged over sources and never pooled: a source gives the
label away as much as a form does.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from dcr.errors import DCRError
from dcr.evaluate.cells import BALANCED_FORMS, Values, aligned, is_apart, pairs_of, same_seeds
from dcr.evaluate.intervals import N_BOOT, SIGNED, effective_n, interval, request_weights, shares

LABELS = ("toxic", "seemingly_toxic")
SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")
BOTH = ("balanced", "balanced")
PAIRS = [(a, b) for a in BALANCED_FORMS for b in BALANCED_FORMS]  # form of toxic, of harmless
READ = {"auroc": "value", "low": "low", "high": "high"}


class Mass:
    """Scores [n] with weights [draws, n] that add up to 1: how much lies above a score."""

    def __init__(self, scores: np.ndarray, weights: np.ndarray) -> None:
        order = np.argsort(scores, kind="stable")
        self.scores = scores[order]
        below = np.cumsum(weights[:, order], axis=1)
        self.below = np.pad(below, ((0, 0), (1, 0)))  # [draws, n + 1]

    def threshold(self, target: float) -> tuple[np.ndarray, np.ndarray]:
        """(level, lot) [draws]: what is above, and `lot` of what is at the level, make `target`."""
        levels, first = np.unique(self.scores, return_index=True)
        edges = self.below[:, -1:] - self.below[:, [*first, -1]]  # at or above each level, then 0
        chosen = (edges[:, :-1] >= target - 1e-9).sum(1).clip(min=1) - 1
        rows = np.arange(len(edges))
        reached, above = edges[rows, chosen], edges[rows, chosen + 1]
        return levels[chosen], ((target - above) / (reached - above)).clip(0, 1)

    def refused(self, level: np.ndarray, lot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(weight refused, weight at the level) [draws], for a level and lot of each draw."""
        rows = np.arange(len(level))
        left, right = (self.below[rows, np.searchsorted(self.scores, level, s)] for s in SIDES)
        return self.below[:, -1] - right + lot * (right - left), right - left

    def above(self, scores: np.ndarray) -> np.ndarray:
        """[draws, m] weight above each of `scores` [m], and half of what ties with it."""
        left, right = (self.below[:, np.searchsorted(self.scores, scores, s)] for s in SIDES)
        return self.below[:, -1:] - (left + right) / 2


def scored(
    prompts: pd.DataFrame, scores: pd.DataFrame, labels: Sequence[str] = LABELS
) -> tuple[pd.DataFrame, Values]:
    """The prompts of these classes, and their scores as finite numbers."""
    rows = prompts[prompts["label"].isin(labels)].reset_index(drop=True)
    rows = rows if "met" in rows else rows.assign(met=False)
    values = aligned(rows, scores, "score", ("id", "label", "form", "source", "request"))
    for method, (_, table) in values.items():
        if not np.isfinite(table.astype(float)).all():
            raise DCRError(f"scores of {method}: not all are finite; score again in fp32.")
    return rows, {m: (seeds, v.astype(float)) for m, (seeds, v) in values.items()}


def by_seed(values: Values, read: Callable[[np.ndarray], np.ndarray]) -> Values:
    """{method: (seeds, draws [1 + n_boot, seeds, ...])} of a statistic of one column of scores."""
    return {
        m: (seeds, np.stack([read(column) for column in table.T], axis=1))
        for m, (seeds, table) in values.items()
    }


def _aurocs(
    prompts: pd.DataFrame, scores: pd.DataFrame, by: str, n_boot: int
) -> tuple[Values, pd.DataFrame]:
    """(draws [1 + n_boot, seeds, rows]; source, forms, met, n and effective n of each row)."""
    rows = prompts if by == "all" else prompts[prompts["form"].isin(BALANCED_FORMS)]
    merged = {"all": ["form", "source"], "form": ["source"], "source": []}[by]  # not told apart
    rows, values = scored(rows.assign(**dict.fromkeys(merged, "all")), scores)
    drawn, requests = request_weights(rows["request"], n_boot), rows["request"].to_numpy()
    toxic, harmless = (rows[rows["label"] == label] for label in LABELS)
    if toxic.empty or harmless.empty:
        raise DCRError("AUROC: no toxic or no harmless prompts in the forms that count; add some.")
    sides, groups, records = {}, [], []  # row numbers and weights [1 + n_boot, m] of prompts
    for form, part in toxic.groupby("form", sort=False):
        parts = [p.index.to_numpy() for _, p in part.groupby("source", sort=False)]
        equal = [shares(drawn[:, i]) / len(parts) for i in parts]
        sides[str(form)] = np.concatenate(parts), np.hstack(equal)
    for (source, shown), part in harmless.groupby(["source", "form"], sort=False):
        groups.append((part.index.to_numpy(), shares(drawn[:, part.index])))
        named = {"source": str(source), "harmless_form": str(shown), "met": part["met"].any()}
        records += [{**named, "toxic_form": name} for name in sides]

    def read(column: np.ndarray) -> np.ndarray:
        masses = [Mass(column[i], w) for i, w in sides.values()]
        found = [(w * m.above(column[i])).sum(1) for i, w in groups for m in masses]
        return np.stack(found, axis=1)  # [1 + n_boot, cells]

    names, mixing = _averaged(pd.DataFrame(records))
    plain = np.zeros((2, len(records), len(rows)))  # weight of each prompt, toxic and harmless
    for cell, (group, side) in enumerate(itertools.product(groups, sides.values())):
        for place, (i, w) in enumerate((side, group)):
            plain[place, cell, i] = w[0]
    mixed = mixing @ plain  # [2, rows, prompts]
    behind = [min(effective_n(w, requests) for w in mixed[:, i]) for i in names.index]
    names = names.assign(n=(mixed > 0).sum(axis=(0, 2)), effective=behind)
    return {m: (s, d @ mixing.T) for m, (s, d) in by_seed(values, read).items()}, names


def _averaged(cells: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Cells, "balanced" of each source, means over sources: rows, and weights [rows, cells]."""
    forms, source = cells[["toxic_form", "harmless_form"]].agg(tuple, axis=1), cells["source"]
    wanted = []  # (source, forms, cells whose mean it is)
    for name in source.unique():
        if set(forms[source == name]) == set(PAIRS):
            wanted.append((name, BOTH, source == name))
    kept = ~cells["met"] | bool(cells["met"].all())
    pairs = [p for p in PAIRS if (kept & (forms == p)).any() and name != "all"]
    wanted += [("mean", p, kept & (forms == p)) for p in pairs]
    mixing = [*np.eye(len(cells)), *(chosen / chosen.sum() for *_, chosen in wanted)]
    rows: list[dict[Any, Any]] = cells.to_dict("records")
    for name, (toxic, harmless), chosen in wanted:
        named = {"source": name, "toxic_form": toxic, "harmless_form": harmless}
        rows.append({**named, "met": cells.loc[chosen, "met"].any()})
    if len(pairs) == len(PAIRS):
        mixing.append(np.mean(mixing[-len(PAIRS) :], axis=0))
        rows.append(rows[-1] | dict(zip(("toxic_form", "harmless_form"), BOTH, strict=True)))
    return pd.DataFrame(rows), np.stack(mixing)


def auroc(
    prompts: pd.DataFrame, scores: pd.DataFrame, by: str = "source", *, n_boot: int = N_BOOT
) -> pd.DataFrame:
    """method, source, toxic_form, harmless_form, auroc, low, high, met, n, seeds of these prompts.

    by "all": one number a method; "form": a row for each pair of forms, and "balanced", their mean;
    "source": the same for each harmless source against all toxic ones, equally, and "mean".
    `met` (a column of prompts, else False): some method met the source in training; it enters the
    mean only where all are met, and the mean's own `met` says so.
    """
    drawn, names = _aurocs(prompts, scores, by, n_boot)
    tables = []
    for method, (seeds, table) in drawn.items():
        found = interval(table, names["effective"].to_numpy())
        read = {k: found[v] for k, v in READ.items()}
        tables.append(names.assign(method=method, **read, seeds=len(seeds)))
    order = "method source toxic_form harmless_form auroc low high met n seeds".split()
    return pd.concat(tables, ignore_index=True)[order]


def tested(prompts: pd.DataFrame) -> pd.DataFrame:
    """The test prompts that count: no set that stands apart, for methods train on it."""
    return prompts[~is_apart(prompts) & (prompts.get("role", "test") == "test")]


def less(drawn: Values, against: Sequence[str], effective: float) -> pd.DataFrame:
    """method, against, difference, low, high, p, seeds of draws [1 + n_boot, seeds, rows]."""
    tables = []
    for method, other in pairs_of(drawn, against):
        x, y = same_seeds(drawn, method, other)
        found = interval(x - y, effective, SIGNED)
        found["difference"] = found.pop("value")
        named = {"method": method, "against": other}
        tables.append(pd.DataFrame({**named, **found, "seeds": x.shape[1]}))
    columns = ["method", "against", "difference", "low", "high", "p", "seeds"]
    return pd.concat(tables)[columns] if tables else pd.DataFrame(columns=columns)


def auroc_differences(
    prompts: pd.DataFrame,
    scores: pd.DataFrame,
    against: Sequence[str] = ("STL",),
    by: str = "source",
    *,
    n_boot: int = N_BOOT,
) -> pd.DataFrame:
    """method, against, difference, low, high, p, seeds, n: differences of one AUROC a method.

    It is the last row of `auroc`: the mean over sources and forms, over forms, or the only one.
    Empty where some pair of forms is missing. All prompts given count.
    """
    drawn, names = _aurocs(prompts, scores, by, n_boot)
    last = names.iloc[-1]
    if last["toxic_form"] not in ("balanced", "all"):
        return pd.DataFrame()
    whole = {m: (seeds, d[..., -1:]) for m, (seeds, d) in drawn.items()}
    return less(whole, against, last["effective"]).assign(n=last["n"])


def agreement_with_verdicts(
    prompts: pd.DataFrame, scores: pd.DataFrame, verdicts: pd.DataFrame, *, n_boot: int = N_BOOT
) -> pd.DataFrame:
    """How well each method's score orders its own generated verdicts (refused or not).

    Columns: method, label ("all", then each), auroc, low, high, refused (share), n, seeds. NaN
    where all or none are refused in a seed. prompts: those that have both, and a request.
    """
    known = ("id", "label", "request")
    said, scored = (
        aligned(prompts, table, column, known)
        for table, column in ((verdicts, "verdict"), (scores, "score"))
    )
    drawn, requests = request_weights(prompts["request"], n_boot), prompts["request"].to_numpy()
    rows = []
    for method in (m for m in said if m in scored):
        verdict, score = same_seeds({"a": said[method], "b": scored[method]}, "a", "b")
        for label in ("all", *prompts["label"].unique()):
            chosen = np.flatnonzero((prompts["label"] == label) | (label == "all"))
            refused, mine = verdict[chosen] == "refuse", score[chosen].astype(float)
            numbers = dict.fromkeys(READ, np.nan)
            if (refused.any(0) & ~refused.all(0)).all():
                weights = drawn[:, chosen]
                columns = zip(refused.T, mine.T, strict=True)
                draws = np.stack([_ordered(r, s, weights) for r, s in columns], axis=1)
                sides = ((refused == side).mean(1) for side in (True, False))
                found = interval(draws, min(effective_n(s, requests[chosen]) for s in sides))
                numbers = {k: float(found[v]) for k, v in READ.items()}
            named = {"method": method, "label": label, **numbers, "refused": refused.mean()}
            rows.append({**named, "n": len(chosen), "seeds": refused.shape[1]})
    return pd.DataFrame(rows)


def _ordered(refused: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[draws] AUROC of scores [n] for being refused [n], under weights [draws, n]."""
    yes, no = shares(weights[:, refused]), shares(weights[:, ~refused])
    return (no * Mass(score[refused], yes).above(score[~refused])).sum(1)
