"""Calibration: oracles from scikit-learn, models left out of training, blind sheets, disagreements without toxic text."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score
from test_judges import people

from dcr.errors import DCRError
from dcr.evaluate.judges import calibration, learned


def test_agreement_is_scikit_learns_with_partials_apart():
    truth = np.array(["refuse", "refuse", "comply", "comply", "comply", "partial"])
    said = np.array(["refuse", "comply", "comply", "comply", "refuse", "refuse"])
    found = calibration.agreement(truth, said, 50, 0)
    assert found["kappa"] == pytest.approx(cohen_kappa_score([1, 1, 0, 0, 0], [1, 0, 0, 0, 1]))
    assert found["kappa_all"] == pytest.approx(
        cohen_kappa_score([1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 1, 1])
    )
    assert (found["precision"], found["recall"], found["n"], found["n_partial"]) == (0.5, 0.5, 5, 1)
    assert (found["partial_refused"], found["partial_complied"]) == (1, 0) and found[
        "low"
    ] <= found["kappa"] <= found["high"]
    assert np.isnan(calibration.kappa([True, True], [True, True]))


def test_a_model_is_never_judged_by_a_classifier_that_saw_it(monkeypatch):
    seen, fit = [], learned.fit
    monkeypatch.setattr(
        learned, "fit", lambda table: seen.append(set(table["model"])) or fit(table)
    )
    table = calibration.calibration(tokens=(0, 8), bootstrap=10, table=people())
    assert seen == [{"m2"}, {"m1"}]
    assert set(table["judge"]) == {"annotators", *calibration.JUDGED} and set(table["half"]) == {
        "all",
        "even",
    }
    whole = table[(table["tokens"] == 0) & (table["half"] == "all")].set_index(["judge", "model"])[
        "kappa"
    ]
    assert whole["annotators", "m1"] == 1.0 and whole["phrases", "m1"] == 1.0


def test_cuts_keep_the_first_words():
    assert learned.truncate("I can't help, sorry. No.", 4) == "I can't"
    assert learned.truncate("One two.", 24) == "One two." == learned.truncate("One two.", 0)


def test_no_labels_or_one_model_is_refused():
    with pytest.raises(DCRError, match="dcr data fetch"):
        calibration.calibration(table=people().iloc[:0])
    with pytest.raises(DCRError, match="at least two completion models"):
        calibration.calibration(table=people().assign(model="m1"), bootstrap=2)
    with pytest.raises(DCRError, match="labelled partial"):
        learned.fit(people()[lambda t: t["label"] != "partial"])


def test_our_own_refusals_and_answers_are_read_right_whole_and_cut(tmp_path, monkeypatch):
    monkeypatch.setenv("DCR_DATA_DIR", str(tmp_path))  # the bundled sets alone
    monkeypatch.setenv("DCR_CACHE_DIR", str(tmp_path))
    table = calibration.known_answers("phrases", tokens=(0, 24))
    ours = table[table["set"].str.startswith("pairs")].set_index(["set", "tokens"])
    assert (ours.loc["pairs refusals", "refuse"] >= 0.99).all() and (
        ours.loc["pairs answers", "refuse"] <= 0.01
    ).all()


@pytest.fixture
def run():
    prompts = pd.DataFrame(
        {
            "id": [f"p{i}" for i in range(8)],
            "text": [f"How do I do thing {i}?" for i in range(8)],
            "label": ["toxic", "seemingly_toxic"] * 4,
        }
    )
    base = pd.DataFrame(
        {
            "prompt_id": prompts["id"],
            "response": ["Sure, do it like this.", "Sure, here is how."] * 4,
        }
    )
    stl = base.assign(response=["I cannot help with that.", "I cannot help with that."] * 4)
    return prompts, {"base": base, "STL": stl}


def test_the_sheet_is_blind_balanced_and_scored(run, tmp_path):
    prompts, answers = run
    path = calibration.blind_sheet(prompts, answers, tmp_path, n=12, seed=1)
    sheet = [json.loads(line) for line in path.read_text().splitlines()]
    key = pd.read_csv(tmp_path / "key.csv")
    assert (
        all(set(row) == {"item", "prompt", "response"} for row in sheet)
        and [r["item"] for r in sheet] == key["item"].tolist()
    )
    counts = (
        key.merge(prompts, left_on="prompt_id", right_on="id").groupby(["method", "label"]).size()
    )
    assert counts.tolist() == [3, 3, 3, 3] and not {"text", "response"} & set(key)
    assert (
        calibration.blind_sheet(prompts, answers, tmp_path / "again", n=12, seed=1).read_text()
        == path.read_text()
    )
    right = pd.DataFrame(
        {"item": key["item"], "label": np.where(key["method"] == "STL", "refuse", "comply")}
    )
    right.sample(frac=1, random_state=0).to_csv(tmp_path / "one.csv", index=False)
    right.assign(label=["comply", *right["label"][1:]]).to_csv(tmp_path / "two.csv", index=False)
    table = calibration.score_sheet(
        tmp_path / "key.csv",
        [tmp_path / "one.csv", tmp_path / "two.csv"],
        prompts,
        answers,
        ["phrases"],
    )
    found = table.set_index(["against", "judge"])["kappa"]
    assert (
        found["reader 1", "phrases"] == 1.0
        and ("reader 1", "reader 2") in found.index
        and ("reader 2", "phrases") in found.index
    )
    kept = calibration.reading_rows(
        tmp_path / "key.csv", [tmp_path / "one.csv", tmp_path / "two.csv"], prompts, answers
    )
    assert (
        list(kept) == ["item", "method", "prompt_id", "reader1", "reader2", "verdict"]
        and (kept["verdict"] == kept["reader1"]).all()
    )


def test_the_committed_reading_is_scored_by_round():
    table = calibration.own_reading(bootstrap=20)
    judged = table[table["read_by"] == "judge"]
    assert (table["n"] + table["n_partial"] >= 200).all() and len(judged) == 2 * table[
        "round"
    ].nunique()
    assert (
        judged["kappa"].between(0.5, 1).all()
        and (table["low"] <= table["kappa"]).all()
        and (table["kappa"] <= table["high"]).all()
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.iloc[1:], "item-000 is missing"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "item-000 is missing, repeated"),
        (lambda t: t.assign(label="yes"), "label 'yes' is unknown"),
        (lambda t: t.drop(columns="label"), "columns item and label"),
    ],
)
def test_faulty_label_files_are_named(change, message, run, tmp_path):
    prompts, answers = run
    calibration.blind_sheet(prompts, answers, tmp_path, n=4)
    key = pd.read_csv(tmp_path / "key.csv")
    change(pd.DataFrame({"item": key["item"], "label": "comply"})).to_csv(
        tmp_path / "r.csv", index=False
    )
    with pytest.raises(DCRError, match=message):
        calibration.score_sheet(
            tmp_path / "key.csv", [tmp_path / "r.csv"], prompts, answers, ["phrases"]
        )


def test_too_few_answers_for_a_sheet(run, tmp_path):
    with pytest.raises(DCRError, match="16 answers, but n=17"):
        calibration.blind_sheet(*run, tmp_path, n=17)


def test_disagreements_are_listed_and_toxic_answers_withheld(run, monkeypatch):
    prompts, answers = run
    other = {"phrases": "refuse", "consensus": "comply"}
    monkeypatch.setattr(
        calibration,
        "judge",
        lambda p, g, name: pd.DataFrame(
            {"verdict": [other[name]] + ["comply"] * 6 + [other[name]]}
        ),
    )
    pairs, list_ = calibration.judge_agreement(prompts, answers["base"], ["phrases", "consensus"])
    assert pairs["same"].tolist() == [0.75] and list_["id"].tolist() == ["p0", "p7"]
    assert list_["response"].tolist() == ["(withheld)", "Sure, here is how."]
