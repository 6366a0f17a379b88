"""The contrastive batch schedule: balance, pairs, seeds, and its errors."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from dcr.config import RefineConfig
from dcr.errors import DCRError
from dcr.train.sampling import batch_plan as plan_of
from dcr.train.sampling import contrastive_batches as schedule
from dcr.train.sampling import epoch_batches, shuffled_labels


def batch_plan(*, retention_rows=0, **fields):
    """The plan of a configuration; a quarter of the batch on top where something is retained."""
    return plan_of(RefineConfig(**fields, retention=float(retention_rows > 0)))


def contrastive_batches(table, *, n_batches, seed, **plan):
    return schedule(table, batch_plan(**plan), n_batches=n_batches, seed=seed)


@pytest.fixture
def table() -> pd.DataFrame:
    rows = [
        {"label": label, "form": form, "pair_id": f"p{i}{form[0]}"}
        for i in range(12)
        for form in ("question", "imperative")
        for label in ("toxic", "seemingly_toxic")
    ]
    rows += [{"label": "general", "form": "imperative", "pair_id": ""} for _ in range(10)]
    return pd.DataFrame(rows)


def counts(table, batch, column="label"):
    return table.iloc[batch][column].value_counts().to_dict()


def test_sources_batches_hold_the_class_share(table):
    for batch in contrastive_batches(table, batch_size=12, n_batches=9, seed=1, toxic_share=0.25):
        assert counts(table, batch) == {"toxic": 3, "seemingly_toxic": 9}


def test_forms_are_balanced_in_both_classes(table):
    skewed = table[
        ~((table.label == "toxic") & (table.form == "question") & (table.index > 8))
    ].reset_index(drop=True)
    seen = []
    for batch in contrastive_batches(
        skewed, batch_size=8, n_batches=30, seed=0, balance_forms=True
    ):
        toxic = skewed.iloc[batch].query("label == 'toxic'")
        assert len(toxic) == 4 and (toxic.form == "question").sum() == 2
        seen += batch
    assert len(set(seen)) == (skewed.label != "general").sum()


def test_matched_batches_keep_both_members(table):
    for batch in contrastive_batches(
        table, batch_size=10, n_batches=8, seed=2, pairing="matched", balance_forms=True
    ):
        assert (
            table.iloc[batch].groupby("pair_id")["label"].nunique().eq(2).all() and len(batch) == 10
        )


def test_general_share_and_retention_rows(table):
    batch = contrastive_batches(table, batch_size=16, n_batches=1, seed=0, general_share=0.25)[0]
    assert counts(table, batch) == {"toxic": 8, "seemingly_toxic": 6, "general": 2}
    batch = contrastive_batches(table, batch_size=16, n_batches=1, seed=0, retention_rows=4)[0]
    assert counts(table, batch) == {"toxic": 8, "seemingly_toxic": 8, "general": 4}


def test_the_seed_decides_and_a_longer_schedule_begins_alike(table):
    short, long, other = (
        contrastive_batches(table, batch_size=8, n_batches=n, seed=s)
        for n, s in ((5, 0), (9, 0), (5, 1))
    )
    assert long[:5] == short and other != short


def test_an_epoch_is_a_function_of_seed_and_epoch(table):
    plan = batch_plan(batch_size=8)
    whole = schedule(table, plan, n_batches=18, seed=4)
    for epoch in (2, 0, 1):  # in any order: nothing is carried over
        assert epoch_batches(table, plan, seed=4, epoch=epoch) == whole[6 * epoch : 6 * epoch + 6]
    assert epoch_batches(table, plan, seed=4, epoch=0) != epoch_batches(
        table, plan, seed=4, epoch=1
    )


def test_no_global_random_state_is_touched(table):
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    contrastive_batches(table, batch_size=8, n_batches=9, seed=0)
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(
        torch.get_rng_state(), before[1]
    )


def test_an_epoch_shows_every_prompt_whatever_the_class_ratio(table):
    for share in (0.25, 0.5, 0.75):
        plan = batch_plan(batch_size=16, toxic_share=share)
        seen = {r for b in epoch_batches(table, plan, seed=0, epoch=0) for r in b}
        assert len(seen) == (table.label != "general").sum()


def test_each_class_is_used_up_before_it_repeats(table):
    batches = contrastive_batches(table, batch_size=8, n_batches=6, seed=0)
    toxic = [r for b in batches for r in b if table.label[r] == "toxic"]
    assert len(set(toxic)) == 24 == len(toxic)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"toxic_share": 1.0}, "toxic_share"),
        ({"batch_size": 64}, "24 toxic prompts, but a batch needs 32"),
        ({"batch_size": 4, "toxic_share": 0.75}, "two of each class"),
        ({"general_share": 0.1}, "general_share=0.1 of refine.batch_size=8 is not one general"),
        ({"batch_size": 64, "pairing": "matched"}, "found 24, a batch takes 32"),
    ],
)
def test_impossible_requests_are_refused(table, change, message):
    with pytest.raises(DCRError, match=message):
        contrastive_batches(table, **{"batch_size": 8, "n_batches": 1, "seed": 0, **change})


def test_missing_kinds_are_refused(table):
    no_general = table[table.label != "general"]
    with pytest.raises(DCRError, match="no general prompts"):
        contrastive_batches(no_general, batch_size=8, n_batches=1, seed=0, general_share=0.5)
    with pytest.raises(DCRError, match="of the toxic prompts 12 and 0 are questions"):
        contrastive_batches(
            table[table.form == "question"].reset_index(drop=True),
            batch_size=8,
            n_batches=1,
            seed=0,
            balance_forms=True,
        )
    with pytest.raises(DCRError, match="needs minimal pairs"):
        contrastive_batches(
            table.assign(pair_id=""), batch_size=8, n_batches=1, seed=0, pairing="matched"
        )


def test_what_a_batch_would_hold_twice_is_refused(table):
    few = table.drop(table.index[(table.label == "toxic") & (table.form == "question")][1:])
    with pytest.raises(DCRError, match="of the toxic prompts 1 and 12 are questions"):
        contrastive_batches(
            few.reset_index(drop=True), batch_size=8, n_batches=1, seed=0, balance_forms=True
        )
    twice = table.assign(pair_id=table["pair_id"].replace("p1q", "p0q"))
    with pytest.raises(DCRError, match="pair_id 'p0q' stands at two toxic prompts"):
        contrastive_batches(twice, batch_size=8, n_batches=1, seed=0, pairing="matched")


def test_sham_keeps_counts_and_general_rows(table):
    mixed = shuffled_labels(table["label"], seed=0)
    assert sorted(mixed) == sorted(table["label"]) and mixed != table["label"].tolist()
    assert [m for m, t in zip(mixed, table["label"], strict=True) if t == "general"] == [
        "general"
    ] * 10
