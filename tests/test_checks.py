"""Checks, counted by hand: wrapped, answered longer, mended and spoiled; no toxic text shown."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score
from test_rates import verdicts, world

from dcr.errors import DCRError
from dcr.evaluate.checks import WRAPPERS, changes, length_agreement, robustness, wrap

PROMPTS = world({"t": ("toxic", "imperative", 5), "s": ("seemingly_toxic", "question", 5)})
PROMPTS = PROMPTS.assign(category="c", text=[f"Bake a cake {i}." for i in range(len(PROMPTS))])


def wrapped() -> pd.DataFrame:
    return pd.concat([wrap(PROMPTS, w) for w in WRAPPERS], ignore_index=True)


def test_wrappers_keep_the_request_its_form_and_its_words():
    table = wrapped()
    assert table["id"].is_unique and len(table) == len(WRAPPERS) * len(PROMPTS)
    plain = table[table["wrapper"] == "plain"]
    assert plain["text"].tolist() == PROMPTS["text"].tolist()
    texts = PROMPTS.set_index("id")["text"]
    assert all(texts[r.plain] in r.text for r in table.itertuples())
    assert set(table["form"]) == {"imperative"} and (table["request"].value_counts() == 10).all()
    with pytest.raises(DCRError, match="'shout' is unknown; known: plain"):
        wrap(PROMPTS, "shout")


def test_changes_under_a_wrapper_are_paired_with_the_plain_prompt():
    table = wrapped()
    soft = (table["wrapper"] == "polite") & (table["label"] == "toxic")
    said = np.where((table["label"] == "toxic") & ~soft, "refuse", "comply")
    said[np.flatnonzero(soft)[:3]] = "refuse"
    found = robustness(table, verdicts(table, said)).set_index(["label", "wrapper"])
    row = found.loc[("toxic", "polite")]
    assert row["value"] == 0.3 and row["change"] == pytest.approx(-0.7) and row["n"] == 10
    assert row["change_low"] < -0.7 < row["change_high"] < 0.1
    same = found.loc[("toxic", "prefix")]
    assert same["change"] == 0 and same["value"] == 1 and same["low"] < 1
    shuffled = table.sample(frac=1, random_state=0)  # row order does not matter
    other = robustness(shuffled, verdicts(table, said)).set_index(["label", "wrapper"])
    assert other.loc[("toxic", "polite"), "change"] == pytest.approx(-0.7)


def test_what_short_answers_hide_is_counted():
    rng = np.random.default_rng(0)
    prompts = pd.DataFrame({"id": [f"p{i}" for i in range(200)]})
    long = np.where(rng.random(200) < 0.5, "refuse", "comply")
    short = np.where(rng.random(200) < 0.2, "comply", long)
    tables = verdicts(prompts, short), verdicts(prompts, long)
    both = [pd.concat([t, t.assign(method="same", verdict=long)]) for t in tables]
    table = length_agreement(*both).set_index("method")
    row = table.loc["m"]
    assert row["kappa"] == pytest.approx(cohen_kappa_score(short, long))
    assert row["missed"] == ((long == "refuse") & (short != "refuse")).sum() and row["n"] == 200
    assert row["taken_back"] == 0 and row["low"] < row["kappa"] < row["high"]
    assert table.loc["same", ["kappa", "same", "missed"]].tolist() == [1, 1, 0]
    assert (
        table.loc["same", "low"] > 0.9 and table.index[0] == "all" and table.loc["all", "n"] == 400
    )
    with pytest.raises(DCRError, match="200 longer answers have no short one"):
        length_agreement(both[0][both[0]["method"] == "m"], both[1])


def test_fixed_and_broken_prompts_by_the_majority_of_seeds():
    prompts = PROMPTS.iloc[[0, 1, 10, 11]]
    said = {
        ("STL", 0): ["refuse", "comply", "refuse", "comply"],
        ("m", 0): ["comply", "refuse", "comply", "comply"],
        ("m", 1): ["comply", "refuse", "refuse", "comply"],
        ("m", 2): ["comply", "partial", "comply", "refuse"],
    }
    table = pd.concat([verdicts(prompts, v, *k) for k, v in said.items()])
    found = changes(prompts, table).set_index("id")
    assert found["change"].to_dict() == {"t-0": "broken", "t-0~": "fixed", "s-0": "fixed"}
    assert found.loc["t-0~", ["before", "after"]].tolist() == ["comply", "refuse"]
    assert "text" not in found and set(found["method"]) == {"m"}
    assert changes(prompts, table[table["method"] == "STL"]).empty
    with pytest.raises(DCRError, match="'DCR' was not run; methods: STL, m"):
        changes(prompts, table, "DCR")
