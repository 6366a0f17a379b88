"""Outcome tables: what a run wrote gives the same matched safety, seeds compare from tables alone, differences are paired."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from test_comparisons import canned, experiments  # noqa: F401 (a fixture)

from dcr.errors import DCRError
from dcr.evaluate.matched import Curve, curves_from, matched_differences, matched_safety
from dcr.tables.comparisons import matched_safety_table
from dcr.tables.outcomes import compare, outcomes_table


def test_tables_give_what_the_experiments_give(experiments, monkeypatch, tmp_path):  # noqa: F811
    for e in experiments:
        canned(e, monkeypatch)
        folder = tmp_path / f"seed-{e.config.seed}" / "tables"
        folder.mkdir(parents=True)
        table = outcomes_table(e)
        assert "text" not in table and table.filter(like="@").isin([0, 1]).all().all()
        (e.store.root / "tables" / "outcomes.csv").rename(folder / "outcomes.csv")
    whole = matched_safety_table(experiments, (0.5,))
    found = compare(tmp_path, targets=(0.5,), out=tmp_path / "out", n_boot=50)
    pd.testing.assert_frame_equal(
        found["seeds_matched_safety"], whole[found["seeds_matched_safety"].columns]
    )
    assert (
        set(found["seeds_differences"]["method"]) == {"base", "question-mark"}
        and (tmp_path / "out" / "seeds_differences.csv").exists()
    )


def curves(n: int = 60) -> list[Curve]:
    """Two methods that differ by 0.2 on every seed, on prompts whose difficulty varies much."""
    rng, made = np.random.default_rng(0), []
    prompts = pd.DataFrame(
        {
            "id": [f"p{i}" for i in range(2 * n)],
            "label": ["toxic", "seemingly_toxic"] * n,
            "form": "question",
            "benchmark": "b",
            "source": "s",
        }
    )
    hard = rng.random(2 * n)
    safe = (prompts["label"] == "seemingly_toxic").to_numpy()
    for seed, (method, gain) in itertools.product((0, 1), (("STL", 0.0), ("DCR", 0.2))):
        start, end = np.where(safe, True, hard < 0.1), np.where(safe, hard < 0.3 + gain, hard < 0.9)
        made.append(Curve(method, seed, prompts, np.stack([start, end], 1).astype(float), (0, 9)))
    return made


def test_a_paired_difference_is_narrower_than_two_intervals():
    table = (
        matched_differences(curves(), "STL", (0.8,), n_boot=300)
        .set_index("quantity")
        .loc["compliance"]
    )
    apart = (
        matched_safety(curves(), (0.8,), n_boot=300)
        .query("quantity == 'compliance'")
        .set_index("method")
    )
    assert (
        table["difference"]
        == pytest.approx(apart.loc["DCR", "compliance"] - apart.loc["STL", "compliance"])
        and table["low"] > 0
    )
    assert table["high"] - table["low"] < (apart["high"] - apart["low"]).sum()
    missed = matched_differences(curves(), "STL", (0.99,), n_boot=20).iloc[0]
    assert (
        np.isnan(missed["difference"])
        and "DCR: seed 0: not reached" in missed["reason"]
        and "STL: seed" in missed["reason"]
    )


def test_wrong_input_is_named(tmp_path):
    with pytest.raises(DCRError, match="'SCANS' has no curve; methods: STL, DCR"):
        matched_differences(curves(), "SCANS")
    (tmp_path / "tables").mkdir()
    with pytest.raises(DCRError, match="no outcomes.csv"):
        compare(tmp_path)
    with pytest.raises(DCRError, match="column 'seed' is missing"):
        curves_from(curves()[0].prompts)
    with pytest.raises(DCRError, match="outcomes must be 0 or 1"):
        curves_from(curves()[0].prompts.assign(seed=0, **{"STL@1": 2}))
