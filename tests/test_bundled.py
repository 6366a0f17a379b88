"""Quality of the bundled data: schema, balance, splits, answers, refusals."""

from __future__ import annotations

import re

import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dcr.data import loaders
from dcr.data.pairs import as_pairs, leakage_report, normalised
from dcr.judges.phrases import score_text


@pytest.fixture(scope="module")
def pairs():
    return loaders.load_bundled("pairs")


@pytest.fixture(scope="module")
def general():
    return loaders.load_bundled("general")


def test_sizes_and_kinds(pairs, general):
    assert len(as_pairs(pairs)) >= 60 and len(general) >= 150 and (pairs["label"] == "toxic").sum() >= 60
    assert pairs["category"].nunique() >= 14
    assert pairs["text"].map(normalised).is_unique and general["text"].map(normalised).is_unique


def test_forms_are_equal_in_both_classes(pairs):
    counts = pairs.groupby(["label", "form"]).size()
    share = counts["toxic", "question"] / counts["toxic"].sum()
    assert abs(share - 0.5) < 0.06 and counts["toxic"].equals(counts["seemingly_toxic"])


def test_surface_tells_nothing(pairs):
    text = pairs["text"]
    features = list(zip(text.str.split().str.len(), text.str.len(), text.str.count(r"[?]"), text.str.count(","),
                        text.str.count(r"[.]"), strict=True))
    y = (pairs["label"] == "toxic").to_numpy()
    accuracy = cross_val_score(make_pipeline(StandardScaler(), LogisticRegression()), features, y,
                               groups=pairs["pair_id"], cv=GroupKFold(5)).mean()
    assert accuracy < 0.55
    mark = text.str.endswith("?").to_numpy()
    assert abs((mark == y).mean() - 0.5) < 0.05


def test_members_differ_in_few_words(pairs):
    distance = as_pairs(pairs)["distance"]
    assert distance.max() <= 12 and distance.median() <= 4
    assert pairs["text"].str.split().str.len().between(5, 40).all()


def test_splits_share_no_topic(pairs, general):
    for table in (pairs, general):
        assert (table.groupby("topic")["split"].nunique() == 1).all()
    assert {"train", "validation", "test", "style"} == set(pairs["split"])


def test_no_prompt_is_a_benchmarks(pairs, general):
    """Against every source at hand (CI has them all)."""
    import pandas as pd

    from dcr.data.fetch import list_sources

    ours = pd.concat([pairs, general])
    for name in list_sources().query("present and role != 'completions'")["name"]:
        report = leakage_report(ours, loaders.load(name, download=False))
        assert report.empty, f"{name}: {report.to_string()}"
    assert len(leakage_report(ours, ours.assign(id=ours["id"] + "'"))) >= len(ours)  # the check sees what is there


def test_answers_help_and_refusals_refuse(pairs, general):
    helpful = [*pairs.loc[pairs.label == "seemingly_toxic", "response"], *general["response"]]
    refused = [r for r in helpful if score_text(r)[0] == "refuse"]
    assert not refused, refused[:5]
    missed = [r for r in pairs.loc[pairs.label == "toxic", "response"] if score_text(r)[0] != "refuse"]
    assert not missed, missed[:5]


def test_refusals_vary(pairs):
    openings = pairs.loc[pairs.label == "toxic", "response"].map(lambda r: " ".join(re.findall(r"[\w']+", r)[:2]).lower())
    assert openings.value_counts(normalize=True).max() <= 0.15
