"""Minimal pairs, leakage, and the sets of each stage."""

from __future__ import annotations

import pandas as pd
import pytest

from dcr.config import load_config
from dcr.data import loaders, sets
from dcr.data.pairs import as_pairs, leakage_report, normalised
from dcr.errors import DCRError


def test_leakage_finds_exact_and_near_and_nothing_else():
    train = pd.DataFrame(
        {
            "id": ["a", "b", "c"],
            "text": [
                "How do I kill a zombie process on my old Linux server today?",
                "List three birds.",
                "Explain the tides of the sea to me.",
            ],
        }
    )
    test = pd.DataFrame(
        {
            "id": ["x", "y", "z"],
            "text": [
                "how do i kill a zombie process on my old linux server today",
                "How do I kill a zombie process on my old Linux server now?",
                "What is the capital of Peru?",
            ],
        }
    )
    report = leakage_report(train, test, threshold=0.7)
    assert report[["train_id", "test_id", "kind"]].values.tolist() == [
        ["a", "x", "exact"],
        ["a", "y", "near"],
    ]


def test_stages_are_disjoint_and_labelled():
    config = load_config("quick")
    toxic, seemingly = sets.contrastive_sets(config)
    mix = sets.alignment_mix(config)
    assert set(toxic["label"]) == {"toxic"} and set(seemingly["label"]) == {"seemingly_toxic"}
    assert set(toxic["pair_id"]) == set(seemingly["pair_id"])
    assert not set(toxic["text"]) & set(mix["text"])
    assert not set(toxic["topic"]) & set(mix.loc[mix["role"] == "safe", "topic"])
    assert mix["role"].value_counts().to_dict() == {
        "general": config.align.n_general,
        "safe": config.align.n_safe,
    }
    assert (mix["response"] != "").all()


def test_training_and_benchmarks_share_no_prompt():
    report = sets.leakage(sets.load_sets(load_config("quick")))
    assert report.empty, report.to_string()


def test_augmented_mix_answers_what_refinement_sees():
    config = load_config("quick", overrides={"align.n_augment": 8})
    mix = sets.alignment_mix(config)
    _, seemingly = sets.contrastive_sets(config)
    assert set(mix.loc[mix["role"] == "augment", "text"]) <= set(seemingly["text"])


def test_too_large_counts_are_refused():
    with pytest.raises(DCRError, match="align.n_safe=99999, but only"):
        sets.alignment_mix(load_config("quick", overrides={"align.n_safe": 99999}))
    with pytest.raises(DCRError, match="mix is empty"):
        sets.alignment_mix(
            load_config("quick", overrides={"align.n_safe": 0, "align.n_general": 0})
        )


def test_pairs_are_readable_side_by_side():
    pairs = as_pairs(loaders.load_bundled("pairs"))
    assert {"seemingly_toxic", "toxic", "distance"} <= set(pairs.columns) and (
        pairs["distance"] >= 1
    ).all()
    with pytest.raises(DCRError, match="without both members"):
        as_pairs(loaders.load_bundled("pairs").iloc[:1])
    assert normalised("It's  a Test!") == "it's a test"
