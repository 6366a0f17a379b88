"""Quality of the bundled data: schema, balance, splits, answers, refusals."""

from __future__ import annotations

import re
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pandas as pd
import pytest

from dcr.data import sources
from dcr.data.pairs import leakage_report, normalised
from dcr.evaluate.judges.phrases import score_text

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
card = SourceFileLoader("data_card", str(SCRIPTS / "data_card.py")).load_module()
FUNCTION_WORDS = set(
    "a an the of in on at by for from with without into onto over under about as and or but if "
    "so that this these those my your his "
    "her its our their i you we he she they it me him them us is are was were be been do does "
    "did can could would should will may "
    "might must have has had not no how what why when where which who whose there than then out "
    "up off down after before while "
    "during until between some any all every each more most less to".split()
)


@pytest.fixture(scope="module")
def pairs():
    return sources.load_bundled("pairs")


@pytest.fixture(scope="module")
def general():
    return sources.load_bundled("general")


def test_sizes_and_kinds(pairs, general):
    wide = card.as_pairs(pairs)
    request = wide["pair_id"].str.rsplit("-", n=1).str[0]
    assert len(wide) >= 400 and request.duplicated().sum() >= 100 and len(general) >= 500
    assert pairs["category"].nunique() >= 15 and wide.groupby("category").size().min() >= 10
    assert general["category"].nunique() >= 8 and general.groupby("category").size().min() >= 50
    assert pairs["text"].map(normalised).is_unique and general["text"].map(normalised).is_unique
    assert len(leakage_report(general, general).query("train_id != test_id")) == 0


def skeleton(text: str) -> str:
    """The sentence with function words kept and content words blanked: what counts as its
    template."""
    return " ".join(w if w in FUNCTION_WORDS else "_" for w in normalised(text).split())


def test_no_template_repeats_or_crosses_a_split(pairs):
    templates = pairs.drop_duplicates(["pair_id", "label"]).assign(
        template=pairs["text"].map(skeleton)
    )
    one_side = templates[templates["label"] == "toxic"]
    assert one_side["template"].value_counts().max() <= 5
    assert (templates.groupby("template")["split"].nunique() == 1).all()


def test_no_near_duplicate_crosses_a_split(pairs, general):
    for table in (pairs, general):
        for split in set(table["split"]) - {"train"}:
            report = leakage_report(
                table[table["split"] == "train"], table[table["split"] == split], threshold=0.6
            )
            assert report.empty, report.to_string()


def test_spelling_and_language(pairs, general):
    """Every lower-case word is in the checker's list or in tests/words/known.txt; every text has
    English function words."""
    from spellchecker import SpellChecker

    known = set((Path(__file__).parent / "words" / "known.txt").read_text().splitlines())
    general = general[~general["category"].isin(["translate", "code"])]
    texts = [*pairs["text"], *pairs["response"], *general["text"], *general["response"]]
    words = {
        w.removesuffix("'s")
        for t in texts
        for w in re.findall(r"(?<![\w'])[a-z]+(?:'[a-z]+)?(?![\w'])", t)
    }
    assert SpellChecker().unknown([w for w in words if len(w) > 2]) <= known
    assert SpellChecker().unknown(["recieve", "harmfull"])  # the check sees what is wrong
    foreign = [t for t in pairs["text"] if not set(normalised(t).split()) & FUNCTION_WORDS]
    assert not foreign, foreign


def test_second_reading_and_card(pairs):
    read = pd.read_csv(sources.BUNDLED / "second_reading.csv")
    kept = read[~read["id"].str.startswith("dropped")]
    assert set(kept["id"]) == set(pairs["id"]) and (kept["label"] == kept["blind"]).all()
    assert kept.set_index("id")["label"].to_dict() == pairs.set_index("id")["label"].to_dict()
    assert card.card_text() in card.CARD.read_text(encoding="utf-8"), (
        "the card is old: run python scripts/data_card.py"
    )


def test_audit_covers_the_public_file():
    audit = sources.audit()
    assert len(audit) == 2483 and set(audit.values()) == {"harmful", "ambiguous", "harmless"}


def test_loads_with_the_datasets_library(pairs):
    import datasets

    table = datasets.load_dataset(
        "json", data_files=str(sources.BUNDLED / "pairs.jsonl"), split="train"
    )
    assert table.num_rows == len(pairs) and {"id", "text", "label", "pair_id"} <= set(
        table.column_names
    )


def test_forms_are_equal_in_both_classes(pairs):
    counts = pairs.groupby(["label", "form"]).size()
    share = counts["toxic", "question"] / counts["toxic"].sum()
    assert abs(share - 0.5) < 0.06 and counts["toxic"].equals(counts["seemingly_toxic"])


def test_surface_tells_nothing(pairs):
    assert card.surface_accuracy(pairs, card.punctuation_features(pairs["text"])) < 0.55
    mark = (pairs["text"].str.endswith("?") == (pairs["label"] == "toxic")).mean()
    assert abs(mark - 0.5) < 0.05


def test_members_differ_in_few_words(pairs):
    distance = card.as_pairs(pairs)["distance"]
    assert distance.max() <= 12 and distance.median() <= 4
    assert pairs["text"].str.split().str.len().between(5, 40).all()


def test_splits_share_no_topic(pairs, general):
    for table in (pairs, general):
        assert (table.groupby("topic")["split"].nunique() == 1).all()
    assert {"train", "validation", "test", "style"} == set(pairs["split"])


def test_no_prompt_is_a_benchmarks(pairs, general):
    """Against every source at hand (CI has them all)."""
    ours = pd.concat([pairs, general])
    names = sources.list_sources().query("present and label != ''")["name"]
    if len(theirs := [sources.load(name, download=False) for name in names]):
        report = leakage_report(ours, pd.concat(theirs))
        assert report.empty, report.to_string()
    assert len(leakage_report(ours, ours.assign(id=ours["id"] + "'"))) >= len(
        ours
    )  # the check sees what is there


def test_answers_help_and_refusals_refuse(pairs, general):
    helpful = pd.concat([pairs[pairs["label"] == "seemingly_toxic"], general])
    refused = [
        r
        for r, p in zip(helpful["response"], helpful["text"], strict=True)
        if score_text(r, p)[0] == "refuse"
    ]
    assert not refused, refused[:5]
    toxic = pairs[pairs["label"] == "toxic"]
    missed = [
        r
        for r, p in zip(toxic["response"], toxic["text"], strict=True)
        if score_text(r, p)[0] != "refuse"
    ]
    assert not missed, missed[:5]


def test_refusals_vary(pairs):
    openings = pairs.loc[pairs.label == "toxic", "response"].map(
        lambda r: " ".join(re.findall(r"[\w']+", r)[:2]).lower()
    )
    assert openings.value_counts(normalize=True).max() <= 0.15
