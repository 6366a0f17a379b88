"""What a rate is made of: sets weigh equally in a class, forms equally in a set."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dcr.errors import DCRError
from dcr.evaluate.intervals import effective_n, shares

COLUMNS = ("id", "label", "form", "benchmark", "version", "request")
BALANCED_FORMS = ("question", "imperative")
APART = ("xstest",)  # the paper trains and tests on it: shown, in no mean
ROLES = ("validation", "test")
Values = dict[str, tuple[list[int], np.ndarray]]  # method: (seeds, [prompts or draws, seeds])


@dataclass(frozen=True)
class Cell:
    """A weighted sum of shares: `parts` are (weight, row numbers of the prompts)."""

    benchmark: str
    label: str
    version: str
    form: str
    parts: tuple[tuple[float, np.ndarray], ...]
    sets: int = 1
    statements: int = 0  # prompts of these sets that have no form-balanced cell
    apart: bool = False

    @property
    def names(self) -> dict:
        """The columns that say which rate it is."""
        kept = ("benchmark", "label", "version", "form", "sets", "statements", "apart")
        return {k: getattr(self, k) for k in kept} | {"n": len(self.index)}

    @property
    def index(self) -> np.ndarray:
        """[m] row numbers of all parts."""
        return np.concatenate([i for _, i in self.parts])

    def weights(self, drawn: np.ndarray) -> np.ndarray:
        """[draws, m] weight of each of its prompts in the rate, from request weights [draws, n]."""
        return np.hstack([share * shares(drawn[:, i]) for share, i in self.parts])

    def single(self, prompts: pd.DataFrame) -> bool:
        """Whether it is one share of requests that each come once."""
        return len(self.parts) == 1 and prompts["request"].iloc[self.index].is_unique

    def effective(self, prompts: pd.DataFrame) -> float:
        """How many requests stand behind it (Kish)."""
        weights = self.weights(np.ones((1, len(prompts))))[0]
        return effective_n(weights, prompts["request"].iloc[self.index])


def is_apart(prompts: pd.DataFrame) -> np.ndarray:
    """[n] whether a prompt enters no mean: XSTest, and any role but validation and test."""
    apart = prompts["benchmark"].str.startswith(APART).to_numpy(dtype=bool)
    return apart | ~prompts["role"].isin(ROLES).to_numpy() if "role" in prompts else apart


def cells_of(prompts: pd.DataFrame) -> list[Cell]:
    """Every set and label by version and form, then the means over the sets of each label.

    Versions: published, swapped, both. Forms: all (statements included), question, imperative,
    statement, and balanced (questions and imperatives weigh equally; sets that have both).
    """
    rows, apart = prompts.reset_index(drop=True), is_apart(prompts)
    cells: list[Cell] = []
    for (benchmark, label), part in rows.groupby(["benchmark", "label"], sort=False):
        for version, chosen in [*part.groupby("version", sort=False), ("both", part)]:
            forms = {str(f): p.index.to_numpy() for f, p in chosen.groupby("form", sort=False)}
            named = str(benchmark), str(label), str(version)
            out = bool(apart[chosen.index].any())
            shown = forms if version == "both" else {"all": chosen.index.to_numpy()} | forms
            cells += [Cell(*named, form, ((1.0, i),), apart=out) for form, i in shown.items()]
            if set(BALANCED_FORMS) <= set(forms):
                halves = tuple((0.5, forms[f]) for f in BALANCED_FORMS)
                left = len(forms.get("statement", ()))
                cells.append(Cell(*named, "balanced", halves, statements=left, apart=out))
    return cells + means(cells)


def means(cells: Iterable[Cell]) -> list[Cell]:
    """Equal-weight means over the sets of a label, version and form; sets apart stay out."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        if not cell.apart and cell.form != "statement":
            groups.setdefault((cell.label, cell.version, cell.form), []).append(cell)
    return [
        Cell(
            "mean",
            *names,
            tuple((weight / len(sets), i) for c in sets for weight, i in c.parts),
            sets=len(sets),
            statements=sum(c.statements for c in sets),
        )
        for names, sets in groups.items()
    ]


def aligned(
    prompts: pd.DataFrame, table: pd.DataFrame, column: str, needed: Sequence[str] = COLUMNS
) -> Values:
    """{method: (seeds, values [prompts, seeds])} of a long table (prompt_id, method, seed, column).

    Raises DCRError for a missing column, and for a prompt without a value or with two.
    """
    for names, frame in ((needed, prompts), (("prompt_id", "method", "seed", column), table)):
        if missing := [c for c in names if c not in frame]:
            raise DCRError(f"column {missing[0]!r} is missing among {', '.join(map(str, frame))}.")
    if prompts.empty or prompts["id"].duplicated().any():
        twice = prompts.loc[prompts["id"].duplicated(), "id"]
        raise DCRError(f"prompt {twice.iloc[0]!r} occurs twice." if len(twice) else "no prompts.")
    known = table.set_index(["method", "seed", "prompt_id"])[column]
    if (repeats := known.index.duplicated()).any():
        *of, name = known.index[repeats][0]
        raise DCRError(f"{column}s of {of[0]}, seed {of[1]}: prompt {name!r} occurs twice.")
    found: Values = {}
    for method, mine in known.groupby("method", sort=False):
        wide = mine.droplevel("method").unstack("seed").reindex(prompts["id"])
        for seed in wide:
            if (gone := wide[seed].isna()).any():
                where, first = f"{column}s of {method!s}, seed {seed}", gone.idxmax()
                raise DCRError(f"{where}: none for {gone.sum()} prompts, {first!r} first.")
        columns = [wide[seed].to_numpy() for seed in wide]
        found[str(method)] = [int(str(seed)) for seed in wide], np.stack(columns, axis=1)
    return found


def pairs_of(methods: Iterable[str], against: Sequence[str]) -> list[tuple[str, str]]:
    """(method, baseline), each pair once. Raises DCRError for a baseline that is not there."""
    methods = list(methods)
    if unknown := [a for a in against if a not in methods]:
        raise DCRError(f"differences: {unknown[0]!r} was not run; methods: {', '.join(methods)}.")
    pairs = [(m, a) for a in against for m in methods if m != a]
    return [p for i, p in enumerate(pairs) if p[::-1] not in pairs[:i]]


def same_seeds(values: Values, a: str, b: str) -> tuple[np.ndarray, np.ndarray]:
    """Values [n, seeds, ...] of two methods for the seeds that both have.

    Where they share none, one that has a single seed stands for all of the other's. Raises DCRError
    when two methods of several seeds share none.
    """
    (mine, x), (others, y) = values[a], values[b]
    shared = [s for s in mine if s in others]
    if not shared and 1 in (len(mine), len(others)):
        n = max(len(mine), len(others))
        return np.repeat(x, n // len(mine), axis=1), np.repeat(y, n // len(others), axis=1)
    if not shared:
        raise DCRError(f"{a} ran seeds {mine}, {b} ran {others}: none in common; run both alike.")
    return x[:, [mine.index(s) for s in shared]], y[:, [others.index(s) for s in shared]]
