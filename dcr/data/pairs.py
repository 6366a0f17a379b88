"""Which prompts ask for one thing: twins in the other form, members of a pair, near-duplicates."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from math import ceil

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dcr.data.forms import core

SAME_REQUEST = 0.6  # Jaccard similarity of content words from which two prompts are one request
STOP_WORDS = frozenset(  # and what only carries a request ("Write a tutorial on ...")
    "a an the of to in on for and or is are was were be been being do does did i you we they he "
    "she it my your our their his her its me us this that these those what which who how why when "
    "where can could would will should may might with from by at as into about than then out up "
    "off please any some write give provide create develop outline teach explain describe tell "
    "show offer tutorial guide instructions detailed step".split()
)


def normalised(text: str) -> str:
    """Lower case, words (of any script) only: what an exact duplicate is compared by."""
    return " ".join(re.findall(r"[\w']+", text.lower()))


def similar(sets: Sequence[frozenset], threshold: float) -> list[tuple[int, int]]:
    """Pairs (i, j) of sets whose Jaccard similarity is at least `threshold`; exact.

    Prefix filtering: with items in order of rarity, two similar sets share one of their first
    n - ceil(threshold * n) + 1 items, so only those are looked up.
    """
    frequency = Counter(item for s in sets for item in s)
    rarity = {item: i for i, item in enumerate(sorted(frequency, key=lambda x: (frequency[x], x)))}
    holders: dict[int, list[int]] = defaultdict(list)
    found = []
    for i in sorted(range(len(sets)), key=lambda i: len(sets[i])):
        items, n = sorted(rarity[item] for item in sets[i]), len(sets[i])
        near: set[int] = set()
        for item in items[: n - ceil(threshold * n) + 1]:
            near.update(holders[item])
            holders[item].append(i)
        for j in near:
            shared = len(sets[i] & sets[j])
            if shared >= threshold * (n + len(sets[j]) - shared):
                found.append((min(i, j), max(i, j)))
    return found


def content_words(words: str) -> frozenset[str]:
    """The words of a core (see `forms.core`) without stop words; all where nothing else is left."""
    every = words.split()
    return frozenset(w for w in every if w not in STOP_WORDS) or frozenset(every)


def requests_of(prompts: pd.DataFrame) -> pd.Series:
    """The request of each prompt, 12 hex digits; prompts that ask for one thing share it.

    One request are: the same words whatever the form (`forms.core`), and ids that differ by the "~"
    of a swapped twin; minimal pairs that differ by form alone (pair_id "p12-q", "p12-i"), with both
    members of each; prompts whose content words overlap by SAME_REQUEST or more (Jaccard), from
    whatever source; and what is joined by others in between. The name hangs on the words alone.
    """
    cores = [core(t) or normalised(t) or t for t in prompts["text"]]
    links: list[tuple[int, int]] = []

    def join(keys: Iterable[str]) -> list[int]:
        """Link rows of one key; the first row of each key."""
        first: dict[str, int] = {}
        for i, key in enumerate(keys):
            if key and first.setdefault(key, i) != i:
                links.append((first[key], i))
        return list(first.values())

    distinct = join(cores)
    source = prompts["source"] if "source" in prompts else [""] * len(prompts)
    for column, tail in (("id", "~+$"), ("pair_id", "-[qi]$")):
        if column in prompts:
            names = [re.sub(tail, "", str(name)) for name in prompts[column].fillna("")]
            join(f"{s}/{name}" if name else "" for s, name in zip(source, names, strict=True))
    words = [content_words(cores[i]) for i in distinct]
    links += [(distinct[i], distinct[j]) for i, j in similar(words, SAME_REQUEST)]
    i, j = zip(*links, strict=True) if links else ((), ())
    graph = coo_array((np.ones(len(i)), (i, j)), shape=(len(cores),) * 2)
    member = connected_components(graph, directed=False)[1].tolist()
    first_words: dict[int, str] = {}
    for group, its in zip(member, cores, strict=True):
        first_words[group] = min(first_words.get(group, its), its)
    names = [hashlib.sha256(first_words[g].encode()).hexdigest()[:12] for g in member]
    return pd.Series(names, index=prompts.index, name="request", dtype="str")


def leakage_report(
    train: pd.DataFrame, test: pd.DataFrame, *, threshold: float = 0.8
) -> pd.DataFrame:
    """train_id, test_id, kind {exact, near}, similarity of every overlap between two tables.

    near: Jaccard similarity of word 3-shingles at or above `threshold`.
    """
    texts = [normalised(t) for t in (*train["text"], *test["text"])]
    ids, n = [*train["id"], *test["id"]], len(train)
    words = [t.split() for t in texts]
    sets = [frozenset(tuple(w[i : i + 3]) for i in range(max(1, len(w) - 2))) for w in words]
    rows = [
        (ids[i], ids[j], "exact" if texts[i] == texts[j] else "near", sets[i], sets[j])
        for i, j in sorted(similar(sets, threshold))
        if i < n <= j and not (train is test and j - n == i)
    ]
    report = pd.DataFrame(rows, columns=["train_id", "test_id", "kind", "a", "b"])
    share = [round(len(a & b) / len(a | b), 3) for *_, a, b in rows]
    return report.drop(columns=["a", "b"]).assign(similarity=share)
