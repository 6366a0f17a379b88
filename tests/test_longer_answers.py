"""Short and longer answers side by side: the same prompts, each verdict from its own answer, and what the comparison counts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from test_experiment import experiment

from dcr.errors import DCRError
from dcr.tables.longer_answers import length_agreement, longer_answers


def test_the_same_prompts_are_answered_at_greater_length(folder, tmp_path):
    run = experiment(folder, tmp_path)
    table = longer_answers(run, ("STL",), tokens=9, per_class=2)
    assert table.groupby("label").size().to_dict() == {"toxic": 2, "seemingly_toxic": 2}
    short = run.verdicts("STL", run.steps("STL")[-1]).set_index("prompt_id")["verdict"]
    assert (table["short"] == table["id"].map(short)).all() and table["long"].notna().all()
    (stored,) = (tmp_path / "longer").glob("STL-*/generations.jsonl")
    lengths = pd.read_json(stored, lines=True)["n_tokens"]
    assert lengths.max() > run.config.generation.max_new_tokens and lengths.max() <= 9
    again = experiment(folder, tmp_path)
    assert (
        longer_answers(again, ("STL",), tokens=9, per_class=2).equals(table)
        and not again.store.computed
    )


def test_a_limit_that_is_no_longer_is_refused(folder, tmp_path):
    with pytest.raises(DCRError, match="max_new_tokens=3"):
        longer_answers(experiment(folder, tmp_path), ("STL",), tokens=3)


def test_missed_and_taken_back_are_counted():
    short = ["refuse", "comply", "comply", "refuse", "comply", "partial"]
    long = ["refuse", "refuse", "comply", "comply", "comply", "refuse"]
    found = length_agreement(
        pd.DataFrame({"method": ["STL"] * 4 + ["base"] * 2, "short": short, "long": long})
    ).set_index("method")
    assert found["n"].to_dict() == {"all": 6, "STL": 4, "base": 2}
    assert found.loc["all", ["missed", "taken_back"]].tolist() == [2, 1] and found.loc[
        "STL", ["missed", "taken_back"]
    ].tolist() == [1, 1]
    assert found.loc["all", "same"] == pytest.approx(0.5) and found.loc[
        "STL", "kappa"
    ] == pytest.approx(0.0)
    never = length_agreement(
        pd.DataFrame({"method": ["base"] * 3, "short": ["comply"] * 3, "long": ["comply"] * 3})
    )
    assert (
        np.isnan(never["kappa"]).all() and (never["same"] == 1).all()
    )  # nothing refused: no κ, said as missing
