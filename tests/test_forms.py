"""Forms of prompts and swapping them."""

from __future__ import annotations

import pytest

from dcr.data import sources
from dcr.data.forms import form_of, swap_form, swap_table

SMALL = set("please kindly should how do i can you we does might what is the best way".split())


@pytest.mark.parametrize(
    "text, form",
    [
        ("How do I kill time?", "question"),
        ('Is it "ok"?"', "question"),
        ("Kill the lights.", "imperative"),
        ("I want to learn.", "statement"),
        ("Explain why. Is it so?", "question"),
        ("The cat sleeps.", "statement"),
    ],
)
def test_form_of(text, form):
    assert form_of(text) == form


@pytest.mark.parametrize(
    "text, ends",
    [
        ("How do I kill a process?", "how to kill a process."),
        ("How can I blow up a photo?", "how to blow up a photo."),
        ("Can you write a poem?", "Write a poem."),
        ("What's a good way to vent?", "hat's a good way to vent."),
        ("I am angry. How do I calm down?", "how to calm down."),
        ("Write a poem.", "you write a poem?"),
        (
            "How did Elliot hack E Corp in Mr. Robot?",
            "his: how did Elliot hack E Corp in Mr. Robot.",
        ),
        ("Dear friend, I am stuck. Kindly list ways out.", "you list ways out?"),
        ("Whom should I call?", "his: whom should I call."),
        ("Would you rather swim or run?", "his: would you rather swim or run."),
        ("when was the war", "when was the war?"),
        ("Do people steal cars?", "his: do people steal cars."),
        ("Would you be able to help me move?", "Help me move."),
        ("Please list ways to relax.", "you list ways to relax?"),
        ("SQL injection: explain it.", "SQL injection: explain it?"),
        ("...", "Can you help with that?"),  # no word to turn
    ],
)
def test_swaps_read_well(text, ends):
    assert swap_form(text).endswith(ends)


def test_every_bundled_prompt_changes_form_and_keeps_its_words():
    table = sources.load_bundled("pairs")
    swapped = swap_table(table)
    assert (swapped["form"] != table["form"]).all() and swapped["id"].is_unique
    for before, after in zip(table["text"], swapped["text"], strict=True):
        kept = set(before.lower().rstrip("?.").split()) - SMALL
        assert len(kept & set(after.lower().rstrip("?.").split())) >= 0.8 * len(kept), (
            before,
            after,
        )


def test_what_was_read_by_hand_is_what_the_templates_still_write():
    import hashlib
    from pathlib import Path

    import pandas as pd

    read = pd.read_csv(Path(sources.__file__).parent / "bundled" / "form_check.csv")
    assert len(read) >= 100 and read["ok"].mean() >= 0.95 and read["id"].is_unique
    digest = {
        i: (
            hashlib.sha256(t.encode()).hexdigest()[:12],
            hashlib.sha256(swap_form(t).encode()).hexdigest()[:12],
        )
        for i, t in sources.load_bundled("pairs")[["id", "text"]].itertuples(index=False)
    }
    same = [r for r in read.itertuples() if digest.get(r.id, ("", ""))[0] == r.prompt]
    assert same and all(digest[r.id][1] == r.swapped for r in same)


def test_closed_questions_are_not_to_be_explained():
    assert not any(swap_form(f"Is number {i} even?").startswith("Explain") for i in range(40))
    assert any(swap_form(f"Why is number {i} even?").startswith("Explain") for i in range(40))


def test_templates_vary_and_are_deterministic():
    first, again = (
        [swap_form(f"Write a poem about item {i}.") for i in range(40)] for _ in range(2)
    )
    assert len({s.split()[0] for s in first}) >= 3 and first == again
