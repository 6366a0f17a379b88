"""Which prompts ask for one thing: twins in the other form, members of a pair, near-duplicates."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from math import ceil

import pandas as pd
from rapidfuzz.distance import Levenshtein

from dcr.data.forms import core
from dcr.errors import DCRError

SAME_REQUEST = 0.6  # Jaccard similarity of content words from which two prompts are one request
STOP_WORDS = frozenset(  # and what only carries a request ("Write a tutorial on ...")
    "a an the of to in on for and or is are was were be been being do does did i you we they he she it my "
    "your our their his her its me us this that these those what which who how why when where can could "
    "would will should may might with from by at as into about than then out up off please any some "
    "write give provide create develop outline teach explain describe tell show offer tutorial guide instructions "
    "detailed step".split()
)


def normalised(text: str) -> str:
    """Lower case, words only: what an exact duplicate is compared by."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def word_distance(a: str, b: str) -> int:
    """Word-level edit distance between two prompts."""
    return Levenshtein.distance(normalised(a).split(), normalised(b).split())


def as_pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a pair: pair_id, form, category, seemingly_toxic, toxic (texts), distance (words)."""
    wide = rows[rows["pair_id"] != ""].pivot(
        index=["pair_id", "form", "category"], columns="label", values="text"
    )
    missing = {"toxic", "seemingly_toxic"} - set(wide.columns)
    if missing or wide.isna().any().any():
        raise DCRError(
            f"pairs without both members: {wide[wide.isna().any(axis=1)].index[:3].tolist() or missing}."
        )
    wide = wide.reset_index().rename_axis(columns=None)
    both = zip(wide["seemingly_toxic"], wide["toxic"], strict=True)
    return wide.assign(distance=[word_distance(a, b) for a, b in both])


def kind_of(category: str) -> str:
    """The kind of a prompt whichever side of a contrast it stands on.

    XSTest calls the sides "homonyms" and "contrast_homonyms", but also "nons_group_real_discr" and
    "contrast_discr", "privacy_public" and "contrast_privacy": all *discr are one kind, all privacy* one.
    Folds grouped by kind need this.
    """
    kind = category.removeprefix("contrast_")
    if kind.endswith("discr"):
        return "discr"
    return "privacy" if kind.startswith("privacy") else kind


def similar(sets: Sequence[frozenset], threshold: float) -> list[tuple[int, int]]:
    """Pairs (i, j) of sets whose Jaccard similarity is at least `threshold`; exact.

    Prefix filtering: with the items in order of rarity, two similar sets share one of their first
    n - ceil(threshold * n) + 1 items, so only those are looked up.
    """
    frequency = Counter(item for s in sets for item in s)
    rarity = {item: i for i, item in enumerate(sorted(frequency, key=lambda x: (frequency[x], x)))}
    holders: dict[int, list[int]] = defaultdict(list)
    found = []
    for i in sorted(range(len(sets)), key=lambda i: len(sets[i])):
        items, n = sorted(rarity[item] for item in sets[i]), len(sets[i])
        near = set()
        for item in items[: n - ceil(threshold * n) + 1]:
            near.update(holders[item])
            holders[item].append(i)
        for j in near:
            shared = len(sets[i] & sets[j])
            if shared >= threshold * (n + len(sets[j]) - shared):
                found.append((j, i))
    return found


def content_words(words: str) -> frozenset[str]:
    """The words of a core (see `forms.core`) without stop words; all of them where nothing else is left."""
    every = words.split()
    return frozenset(w for w in every if w not in STOP_WORDS) or frozenset(every)


def groups(n: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """The smallest member of each item's connected component. [n]"""
    root = list(range(n))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    for i, j in links:
        a, b = sorted((find(i), find(j)))
        root[b] = a
    return [find(i) for i in range(n)]


def requests_of(prompts: pd.DataFrame) -> pd.Series:
    """The request of each prompt, 12 hex digits; prompts that ask for one thing share it.

    One request are: the same words whatever the form (`forms.core`) and ids that differ by the "~" of a
    swapped twin; minimal pairs that differ by form alone (pair_id "p12-q", "p12-i"), with both
    members of each; prompts whose content words overlap by SAME_REQUEST or more (Jaccard), from
    whatever source; and what is so joined by others in between. The name hangs on the words alone.
    """
    cores = [core(t) or normalised(t) or t for t in prompts["text"]]
    links: list[tuple[int, int]] = []

    def join(keys: Iterable[Hashable]) -> list[int]:
        first: dict[Hashable, int] = {}
        for i, key in enumerate(keys):
            if key and first.setdefault(key, i) != i:
                links.append((first[key], i))
        return list(first.values())

    distinct = join(cores)
    source = prompts["source"] if "source" in prompts else [""] * len(prompts)
    for column, tail in (("id", "~+$"), ("pair_id", "-[qi]$")):
        if column in prompts:
            names = [re.sub(tail, "", str(name)) for name in prompts[column].fillna("")]
            join((s, name) if name else "" for s, name in zip(source, names, strict=True))
    words = [content_words(cores[i]) for i in distinct]
    links += [(distinct[i], distinct[j]) for i, j in similar(words, SAME_REQUEST)]
    member = groups(len(cores), links)
    name: dict[int, str] = {}
    for group, words_of in zip(member, cores, strict=True):
        name[group] = min(name.get(group, words_of), words_of)
    named = {g: hashlib.sha256(c.encode()).hexdigest()[:12] for g, c in name.items()}
    return pd.Series([named[g] for g in member], index=prompts.index, name="request", dtype=object)


def leakage_report(
    train: pd.DataFrame, test: pd.DataFrame, *, threshold: float = 0.8
) -> pd.DataFrame:
    """Rows train_id, test_id, kind {exact, near}, similarity for every overlap between two prompt tables.

    near: Jaccard similarity of word 3-shingles at or above `threshold`.
    """

    def shingles(text: str) -> frozenset[str]:
        words = normalised(text).split()
        return frozenset(" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2)))

    ids = [*train["id"], *test["id"]]
    texts = [*train["text"], *test["text"]]
    sets, n = [shingles(t) for t in texts], len(train)
    rows = [
        {
            "train_id": ids[i],
            "test_id": ids[j],
            "kind": "exact" if normalised(texts[i]) == normalised(texts[j]) else "near",
            "similarity": round(len(sets[i] & sets[j]) / len(sets[i] | sets[j]), 3),
        }
        for i, j in sorted((min(p), max(p)) for p in similar(sets, threshold))
        if i < n <= j and not (train is test and j - n == i)
    ]
    return pd.DataFrame(rows, columns=["train_id", "test_id", "kind", "similarity"])
