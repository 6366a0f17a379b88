"""The explorers without a browser: choices change rates and prompts, toxic prompts are blurred, their answers are nowhere."""

from __future__ import annotations

import pandas as pd
import pytest

from dcr.book import explorer
from dcr.errors import DCRError

ROWS = pd.DataFrame(
    [
        {
            "id": f"{b}{i}",
            "benchmark": b,
            "label": label,
            "category": c,
            "form": "question",
            "text": f"<b>{b} {i}</b>",
            "method": m,
            "verdict": "refuse" if (label == "toxic") == (m == "DCR") else "comply",
            "answer": "" if label == "toxic" else f"<i>answer {m}</i>",
        }
        for m in ("STL", "DCR")
        for b, label, c in (("oktest", "seemingly_toxic", "tools"), ("advbench", "toxic", "crime"))
        for i in range(3)
    ]
)


@pytest.fixture
def shown(monkeypatch):
    """What `display` was given."""
    found = []
    monkeypatch.setattr("IPython.display.display", found.append)
    return found


def test_choosing_changes_rates_and_prompts(shown):
    explorer.explore_answers(ROWS)
    box, static = shown
    (method, benchmark, category, verdict), rates, prompts = (
        box.children[0].children,
        *box.children[1:],
    )
    assert (
        method.value == "DCR" and "6 prompts" in prompts.value and "(every), (every)" in rates.value
    )
    before = rates.value
    benchmark.value = "oktest"
    assert (
        rates.value != before
        and "3 prompts" in prompts.value
        and category.options == (explorer.EVERY, "tools")
    )
    assert "answer DCR" in prompts.value and "advbench" not in prompts.value
    method.value = "STL"
    assert "answer STL" in prompts.value and "answer DCR" not in prompts.value
    verdict.value = "comply"
    assert "0 prompts" in prompts.value
    benchmark.value = "advbench"  # a category that the new benchmark lacks is dropped
    assert (
        category.value == explorer.EVERY
        and "3 prompts" in prompts.value
        and "not shown" in prompts.value
    )
    assert (
        "&lt;b&gt;" in prompts.value
        and "<b>advbench" not in prompts.value
        and "blur(5px)" in prompts.value
    )
    assert (
        "oktest" in static.data
        and "<b>oktest 0" not in static.data
        and "advbench 0" not in static.data
    )


def test_rates_are_shares_of_verdicts():
    table = explorer.rates(ROWS, benchmark="advbench")
    assert (
        table.loc["DCR", "refuse"] == 1.0
        and table.loc["STL", "refuse"] == 0.0
        and (table["n"] == 3).all()
    )


def test_prompts_are_escaped_and_only_toxic_ones_blurred():
    attack = '"><script>alert(1)</script>'
    assert "<script>" not in explorer.prompt_html(
        attack, "toxic"
    ) and "blur" in explorer.prompt_html(attack, "toxic")
    assert explorer.prompt_html("<a>", "general") == "&lt;a&gt;"
    page = explorer.prompts_html(ROWS[ROWS["label"] == "toxic"].assign(answer="leaked"))
    assert "leaked" not in page


def test_missing_answers_name_the_notebook(tmp_path):
    with pytest.raises(DCRError, match="run notebook 04_evaluation first"):
        explorer.read_answers(tmp_path)
    (tmp_path / "tables").mkdir()
    ROWS.to_csv(tmp_path / "tables" / "explorer.csv", index=False)
    assert explorer.read_answers(tmp_path).equals(ROWS)


def test_old_name_still_works():
    from dcr.book.start import explore

    assert explore is explorer.explore
