"""The figures of the data card, computed from the bundled files: counts, balance, surface baselines, second reading, audit."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dcr.data import loaders
from dcr.data.pairs import as_pairs

CARD = loaders.BUNDLED / "README.md"
BEGIN, END = "<!-- figures: python -m dcr.data.card -->", "<!-- end of figures -->"


def punctuation_features(texts: pd.Series) -> np.ndarray:
    """[n, 6] words, characters, question marks, commas, stops, apostrophes: length and punctuation, no words."""
    return np.column_stack(
        [
            texts.str.split().str.len(),
            texts.str.len(),
            *(texts.str.count(re.escape(c)) for c in "?,.'"),
        ]
    )


def surface_accuracy(pairs: pd.DataFrame, features: np.ndarray) -> float:
    """Cross-validated accuracy of a linear classifier, toxic against seemingly toxic, pairs never split between folds."""
    model = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(max_iter=1000))
    request = pairs["pair_id"].str.rsplit("-", n=1).str[0]
    return float(
        cross_val_score(
            model,
            features,
            (pairs["label"] == "toxic").astype(int),
            groups=request,
            cv=GroupKFold(5),
        ).mean()
    )


def card_tables() -> dict[str, pd.DataFrame]:
    """Tables `pairs` (per kind and split), `checks`, `audit` of the card."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    pairs, general = loaders.load_bundled("pairs"), loaders.load_bundled("general")
    wide = as_pairs(pairs)
    kinds = pairs[pairs["label"] == "toxic"].pivot_table(
        index="category", columns="split", values="id", aggfunc="count", fill_value=0
    )
    request = wide["pair_id"].str.rsplit("-", n=1).str[0]
    words = pairs["text"].str.split().str.len()
    read = pd.read_csv(loaders.BUNDLED / "second_reading.csv")
    audit = (
        pd.Series(loaders.audit()).value_counts().rename_axis("label").reset_index(name="prompts")
    )
    mark = (pairs["text"].str.endswith("?") == (pairs["label"] == "toxic")).mean()
    checks = [
        ("minimal pairs", len(wide)),
        ("requests", request.nunique()),
        ("requests in both forms", int(request.duplicated().sum())),
        ("question share, toxic", (pairs.query("label == 'toxic'")["form"] == "question").mean()),
        (
            "question share, seemingly toxic",
            (pairs.query("label != 'toxic'")["form"] == "question").mean(),
        ),
        ("words a prompt, least", int(words.min())),
        ("words a prompt, median", float(words.median())),
        ("words a prompt, most", int(words.max())),
        ("words that differ, median", float(wide["distance"].median())),
        ("words that differ, most", int(wide["distance"].max())),
        ("accuracy of the question mark", max(mark, 1 - mark)),
        (
            "accuracy of length and punctuation",
            surface_accuracy(pairs, punctuation_features(pairs["text"])),
        ),
        (
            "accuracy of TF-IDF, grouped folds",
            surface_accuracy(pairs, TfidfVectorizer(min_df=2).fit_transform(pairs["text"])),
        ),
        ("prompts read blind", len(read)),
        ("blind labels that disagreed", int((read["label"] != read["blind"]).sum())),
        ("prompts dropped after the reading", int(read["id"].str.startswith("dropped").sum())),
        ("Cohen's κ of the blind reading", cohen_kappa_score(read["label"], read["blind"])),
        ("general instructions", len(general)),
    ]
    return {
        "kinds": kinds.reset_index(),
        "checks": pd.DataFrame(checks, columns=["figure", "value"]),
        "audit": audit.assign(share=audit["prompts"] / audit["prompts"].sum()),
    }


def card_text() -> str:
    """The computed part of the card, Markdown."""
    tables = card_tables()
    parts = []
    for title, name in (
        ("Minimal pairs per kind and split", "kinds"),
        ("Checks", "checks"),
        ("Audit of the public toxic training file (ids and labels in audit.csv, no text)", "audit"),
    ):
        frame = tables[name]
        lines = ["| " + " | ".join(frame.columns) + " |", "|" + "---|" * frame.shape[1]]
        lines += [
            "| " + " | ".join(_shown(v) for v in row) + " |"
            for row in frame.to_numpy(dtype=object).tolist()
        ]
        parts.append(f"**{title}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return str(int(value)) if value == int(value) and abs(value) > 1 else f"{value:.3f}"
    return str(value)


def write_card(path: Path = CARD) -> None:
    """Put the computed part between the card's marks."""
    from dcr.data.files import write_atomic

    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    write_atomic(path, f"{before}{BEGIN}\n\n{card_text()}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    write_card()
