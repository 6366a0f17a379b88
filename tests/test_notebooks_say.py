"""Words that follow an interval, and the notebooks' toy tokenizer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dcr.book.say import MAIN, change, main_rows, number, side
from dcr.book.toys import toy_tokenizer
from dcr.lm.chat import encode_examples


def row(value, low, high):
    return {"value": value, "low": low, "high": high}


def test_a_number_stands_with_its_interval_or_says_that_it_has_none():
    assert number(row(0.444, 0.4, 0.48)) == "0.44 [0.40, 0.48]"
    assert number(row(0.444, 0.4, 0.48), form="+.1f") == "+0.4 [+0.4, +0.5]"
    given = {"dsr": 0.5, "dsr_low": 0.1, "dsr_high": 0.9, "low": 0.4, "high": 0.6}
    assert number(given, "dsr", "dsr_low") == "0.50 [0.10, 0.90]"
    for low, high in ((0.5, 0.5), (np.nan, np.nan)):
        assert number(row(0.5, low, high)) == "0.50 (no interval)"


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.1, 0.2, "above"), (-0.2, -0.1, "below"), (-0.1, 0.1, "not told from"),
     (0.0, 0.1, "not told from"), (0.3, 0.3, "not told from"), (np.nan, np.nan, "not told from")],
)  # fmt: skip
def test_a_side_is_told_only_by_an_interval_that_leaves_the_value_out(low, high, word):
    assert side(row(0.0, low, high)) == word


def test_a_change_is_told_only_where_intervals_do_not_overlap():
    low, high = row(0.1, 0.0, 0.2), row(0.5, 0.4, 0.6)
    assert change(low, high) == "rises" and change(high, low) == "falls"
    assert change(low, row(0.3, 0.2, 0.5)) == "cannot be told to change"
    assert change(low, row(0.9, 0.9, 0.9)) == "cannot be told to change"  # a single seed
    assert change(low, high, ("up", "down", "?")) == "up"


def test_main_rows_are_in_one_order_and_only_those_that_ran():
    table = pd.DataFrame({"method": ["DCR", "Tied", "STL", "DCR"], "x": [1, 2, 3, 4]})
    found = main_rows(table)
    assert found["method"].tolist() == ["STL", "DCR", "DCR"] and found["x"].tolist() == [3, 1, 4]
    assert main_rows(table, ("Tied",))["x"].tolist() == [2] and "STL" in MAIN


def test_the_toy_tokenizer_has_a_token_a_word_and_ends_an_answer():
    tokenizer = toy_tokenizer(["Name a colour.", "Blue is one."])
    (ids,), (start,) = encode_examples(tokenizer, ["Name a colour."], ["Blue is one."])
    assert tokenizer.decode(ids[start:]) == "Blue is one. <end>"
    assert tokenizer.unk_token_id not in ids and len(tokenizer) == 5 + 6
