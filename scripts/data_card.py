"""Put the computed figures into the card of the bundled data: python scripts/data_card.py"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from rapidfuzz.distance import Levenshtein
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dcr.data.files import write_atomic
from dcr.data.pairs import normalised
from dcr.data.sources import BUNDLED, audit, load_bundled

CARD = BUNDLED / "README.md"
BEGIN, END = "<!-- figures: python scripts/data_card.py -->", "<!-- end of figures -->"


def as_pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """pair_id, form, category, seemingly_toxic, toxic (texts), distance (edited words) a pair."""
    wide = rows[rows["pair_id"] != ""].pivot(
        index=["pair_id", "form", "category"], columns="label", values="text"
    )
    assert set(wide.columns) == {"toxic", "seemingly_toxic"} and not wide.isna().any().any()
    wide = wide.reset_index().rename_axis(columns=None)
    sides = [wide[c].map(normalised).str.split() for c in ("seemingly_toxic", "toxic")]
    return wide.assign(distance=[Levenshtein.distance(a, b) for a, b in zip(*sides, strict=True)])


def punctuation_features(texts: pd.Series) -> np.ndarray:
    """[n, 6] words, characters, question marks, commas, stops, apostrophes: no words."""
    counts = [texts.str.count(re.escape(c)) for c in "?,.'"]
    return np.column_stack([texts.str.split().str.len(), texts.str.len(), *counts])


def surface_accuracy(pairs: pd.DataFrame, features: np.ndarray) -> float:
    """Accuracy of a linear classifier of the class; folds never split a request."""
    model = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(max_iter=1000))
    toxic = (pairs["label"] == "toxic").astype(int)
    groups = pairs["pair_id"].str.rsplit("-", n=1).str[0]
    return float(cross_val_score(model, features, toxic, groups=groups, cv=GroupKFold(5)).mean())


def card_tables() -> dict[str, pd.DataFrame]:
    """The tables of the card by title."""
    pairs, general = load_bundled("pairs"), load_bundled("general")
    wide, toxic = as_pairs(pairs), pairs["label"] == "toxic"
    kinds = pairs[toxic].pivot_table(
        index="category", columns="split", values="id", aggfunc="count", fill_value=0
    )
    request = wide["pair_id"].str.rsplit("-", n=1).str[0]
    words = pairs["text"].str.split().str.len()
    read = pd.read_csv(BUNDLED / "second_reading.csv")
    marks = pd.Series(audit()).value_counts().rename_axis("label").reset_index(name="prompts")
    question = pairs["form"] == "question"
    mark = (pairs["text"].str.endswith("?") == toxic).mean()
    punctuation = punctuation_features(pairs["text"])
    tfidf = TfidfVectorizer(min_df=2).fit_transform(pairs["text"])
    checks = {
        "minimal pairs": len(wide),
        "requests": request.nunique(),
        "requests in both forms": int(request.duplicated().sum()),
        "question share, toxic": question[toxic].mean(),
        "question share, seemingly toxic": question[~toxic].mean(),
        "words a prompt, least": int(words.min()),
        "words a prompt, median": float(words.median()),
        "words a prompt, most": int(words.max()),
        "words that differ, median": float(wide["distance"].median()),
        "words that differ, most": int(wide["distance"].max()),
        "accuracy of the question mark": max(mark, 1 - mark),
        "accuracy of length and punctuation": surface_accuracy(pairs, punctuation),
        "accuracy of TF-IDF, grouped folds": surface_accuracy(pairs, tfidf),
        "prompts read blind": len(read),
        "blind labels that disagreed": int((read["label"] != read["blind"]).sum()),
        "prompts dropped after the reading": int(read["id"].str.startswith("dropped").sum()),
        "Cohen's κ of the blind reading": cohen_kappa_score(read["label"], read["blind"]),
        "general instructions": len(general),
    }
    title = "Audit of the public toxic training file (ids and labels in audit.csv, no text)"
    return {
        "Minimal pairs per kind and split": kinds.reset_index(),
        "Checks": pd.DataFrame(checks.items(), columns=["figure", "value"]),
        title: marks.assign(share=marks["prompts"] / marks["prompts"].sum()),
    }


def card_text() -> str:
    """The computed part of the card, Markdown."""
    parts = []
    for title, frame in card_tables().items():
        shown = frame.astype(object).map(_shown)
        rows = [shown.columns, ["---"] * shown.shape[1], *shown.to_numpy().tolist()]
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        parts.append(
            f"**{title}**\n\n{table}".replace("| --- |", "|---|").replace(" --- |", "---|")
        )
    return "\n\n".join(parts)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return str(int(value)) if value == int(value) and abs(value) > 1 else f"{value:.3f}"
    return str(value)


if __name__ == "__main__":
    before, _, rest = CARD.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    write_atomic(CARD, f"{before}{BEGIN}\n\n{card_text()}\n\n{END}{after}")
