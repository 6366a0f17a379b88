"""Minimal pairs and leakage: which prompts belong together, and which must not meet."""

from __future__ import annotations

import re

import pandas as pd
from rapidfuzz.distance import Levenshtein

from dcr.errors import DCRError


def normalised(text: str) -> str:
    """Lower case, words only: what an exact duplicate is compared by."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def word_distance(a: str, b: str) -> int:
    """Word-level edit distance between two prompts."""
    return Levenshtein.distance(normalised(a).split(), normalised(b).split())


def as_pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a pair: pair_id, form, category, seemingly_toxic, toxic (texts), distance (words). For reading."""
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


def leakage_report(
    train: pd.DataFrame, test: pd.DataFrame, *, threshold: float = 0.8
) -> pd.DataFrame:
    """Rows train_id, test_id, kind {exact, near}, similarity for every overlap between two prompt tables.

    near: Jaccard similarity of word 3-shingles at or above `threshold`, candidates by MinHash (datasketch) and then
    computed exactly, so no false alarm comes from hashing.
    """
    from datasketch import MinHash, MinHashLSH

    def shingles(text: str) -> set[str]:
        words = normalised(text).split()
        return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    def sketch(parts: set[str]) -> MinHash:
        result = MinHash(num_perm=64, seed=1)
        result.update_batch([p.encode() for p in sorted(parts)])
        return result

    first = {i: (t, shingles(t)) for i, t in zip(train["id"], train["text"], strict=True)}
    index = MinHashLSH(threshold=max(0.1, threshold - 0.15), num_perm=64)
    for key, (_, parts) in first.items():
        index.insert(key, sketch(parts), check_duplication=False)
    rows = []
    for test_id, text in zip(test["id"], test["text"], strict=True):
        parts = shingles(text)
        for key in sorted(index.query(sketch(parts))):
            if key == test_id and first[key][0] == text and train is test:
                continue
            similarity = len(parts & first[key][1]) / len(parts | first[key][1])
            exact = normalised(text) == normalised(first[key][0])
            if exact or similarity >= threshold:
                rows.append(
                    {
                        "train_id": key,
                        "test_id": test_id,
                        "kind": "exact" if exact else "near",
                        "similarity": round(similarity, 3),
                    }
                )
    return pd.DataFrame(rows, columns=["train_id", "test_id", "kind", "similarity"])
