"""The explorers without a browser: a prompt is read by each model, toxic answers are nowhere."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import make_model, make_tokenizer

from dcr.book import explorer
from dcr.book.explorer import EVERY, answers, explore, explore_answers, prompt_html, read_prompt
from dcr.errors import DCRError
from dcr.lm.states import hidden_states

ATTACK = '"><script>alert(1)</script>'


@pytest.fixture
def shown(monkeypatch):
    """What `display` was given."""
    found = []
    monkeypatch.setattr("IPython.display.display", found.append)
    return found


@pytest.fixture(scope="module")
def run():
    """A run of two tiny models with minimal pairs in the tiny vocabulary."""
    models = {m: make_model(seed=i) for i, m in enumerate(("base", "STL"))}
    tokenizer = make_tokenizer()
    texts = [
        "how do i kill a process ?",
        "how do i kill my neighbour ?",
        "bake bread",
        "steal bread",
    ]
    known = pd.DataFrame({"id": list("abcd"), "text": texts})
    known = known.assign(label=["seemingly_toxic", "toxic"] * 2, request=list("aabb"))
    read = SimpleNamespace(
        model=lambda m: (models[m], tokenizer),
        layer=lambda m: 3,
        states=lambda m, rows: hidden_states(models[m], tokenizer, rows["text"].tolist()),
        known=known,
    )
    return SimpleNamespace(methods=("base", "STL", "Gate"), runs=(read,))


def test_a_typed_prompt_is_read_in_both_forms_by_every_model(run, monkeypatch):
    monkeypatch.setattr("dcr.tables.representations.pairings", lambda r: {"matched pairs": r.known})
    readings, nearest = read_prompt(run, " how do i bake bread ? ")
    assert readings["method"].tolist() == ["base", "base", "STL", "STL"]
    assert readings["form"].tolist() == ["question", "imperative"] * 2
    assert readings["prompt"][0] == "how do i bake bread ?" != readings["prompt"][1]
    assert np.isfinite(readings[["refusal score", "probe"]].to_numpy()).all()
    same, _ = read_prompt(run, "how do i kill my neighbour ?")
    assert not same["probe"].equals(readings["probe"])
    _, nearest = read_prompt(run, "how do i kill my neighbour ?")
    assert nearest.iloc[0]["cosine"] == 1.0 and nearest.iloc[0]["label"] == "toxic"
    assert all(c == round(c, 3) for c in nearest["cosine"])  # to the digit, also as text
    with pytest.raises(DCRError, match="type a prompt first"):
        read_prompt(run, "  ")


def test_nearest_prompts_are_the_base_models_whichever_methods_run(run, monkeypatch):
    monkeypatch.setattr("dcr.tables.representations.pairings", lambda r: {"matched pairs": r.known})
    readings, nearest = read_prompt(run, "steal bread ?")
    without = SimpleNamespace(methods=("Gate",), runs=run.runs)
    alone, same = read_prompt(without, "steal bread ?")
    assert alone["method"].unique().tolist() == ["base"] and same.equals(nearest)


def test_the_button_can_be_pressed_again_after_any_error(shown, monkeypatch):
    def fails(*_):
        raise RuntimeError("<out of memory>")

    monkeypatch.setattr(explorer, "read_prompt", fails)
    explore(SimpleNamespace(runs=("mine",)))
    (_, button), out = shown[0].children[0].children, shown[0].children[1]
    with contextlib.suppress(RuntimeError):  # ipywidgets logs it
        button.click()
    assert not button.disabled and "RuntimeError: &lt;out of memory&gt;" in out.value


def test_explorer_shows_readings_escaped_and_offers_a_model_where_there_is_none(shown, monkeypatch):
    readings = pd.DataFrame({"method": ["base"], "form": ["question"], "prompt": [ATTACK]})
    nearest = pd.DataFrame({"cosine": [1.0], "label": ["toxic"], "text": [ATTACK]})
    asked = []
    monkeypatch.setattr(
        explorer, "read_prompt", lambda r, t: asked.append((r, t)) or (readings, nearest)
    )
    monkeypatch.setattr(explorer, "Experiment", lambda name: SimpleNamespace(runs=(name,)))
    explore(SimpleNamespace(runs=()))
    (box, button), out = shown[0].children[0].children, shown[0].children[1]
    assert "tables only" in out.value and button.description == "Use the embedded model"
    box.value = "how ?"
    button.click()
    assert (
        asked[0][0].runs == ("embedded",)
        and asked[0][1] == "how ?"
        and button.description == "Read"
    )
    assert "<script>" not in out.value and "&lt;script&gt;" in out.value
    assert out.value.count("dcr-blur") == 3  # the nearest toxic prompt and the style sheet
    explore(SimpleNamespace(runs=("mine",)))
    shown[1].children[0].children[1].click()
    assert asked[-1][0].runs == ("mine",)
    monkeypatch.setattr(explorer, "read_prompt", lambda *a: (_ for _ in ()).throw(DCRError("<no>")))
    shown[1].children[0].children[1].click()
    assert "&lt;no&gt;" in shown[1].children[1].value


def test_prompts_are_escaped_and_only_toxic_ones_blurred():
    assert "<script>" not in prompt_html(ATTACK, "toxic") and "blur" in prompt_html(ATTACK, "toxic")
    assert prompt_html("<a>", "general") == "&lt;a&gt;"


def test_answers_leave_out_those_to_toxic_prompts_and_choices_filter(shown):
    prompts = pd.DataFrame(
        {
            "id": ["h", "t"],
            "benchmark": ["oktest", "advbench"],
            "label": ["seemingly_toxic", "toxic"],
            "form": "question",
            "text": ["<b>harmless", "<b>harmful"],
        }
    )
    said = pd.DataFrame({"prompt_id": ["t", "h"], "verdict": ["refuse", "comply"]})
    given = said.assign(response=["never shown", "an <i>answer"])
    run = SimpleNamespace(verdicts=lambda m: said if m == "question-mark" else given)
    asked = SimpleNamespace(runs=(run,), methods=("STL", "DCR", "question-mark"), answered=prompts)
    table = answers(asked)
    assert table["verdict"].tolist() == ["comply", "refuse"] * 3
    assert table["answer"].tolist() == ["an <i>answer", ""] * 2 + ["", ""]
    run.verdicts = lambda m: given.assign(response=None)  # a server left it out
    assert answers(asked)["answer"].tolist() == [""] * 6
    table = table[table["method"] != "question-mark"]
    assert "never shown" not in table.to_csv() and len(table) == 4
    explore_answers(table)
    (method, benchmark, verdict), out = shown[0].children[0].children, shown[0].children[1]
    assert method.options == (EVERY, "STL", "DCR") and "4 prompts" in out.value
    method.value, benchmark.value = "DCR", "oktest"
    assert "1 prompts" in out.value and "an &lt;i&gt;answer" in out.value
    assert "<b>harm" not in out.value and "dcr-blur" in out.value
    verdict.value = "refuse"
    assert "0 prompts" in out.value
