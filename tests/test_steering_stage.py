"""Steering inside an experiment: every method runs, anchors and thresholds are on record, curves sweep the strength."""

from __future__ import annotations

import pandas as pd
import pytest
from conftest import make_model, make_tokenizer

from dcr.config import load_config, methods_file
from dcr.data import loaders, sets
from dcr.errors import DCRError
from dcr.run import steer as stage
from dcr.run.experiment import Experiment, run_methods
from dcr.tables.failures import costs
from dcr.tables.table1 import plane_points

OVERRIDES = {
    "refine.layer": 2,
    "refine.max_steps": 2,
    "refine.batch_size": 8,
    "refine.lora_rank": 2,
    "align.max_steps": 3,
    "align.lora_rank": 2,
    "align.batch_size": 8,
    "generation.max_new_tokens": 3,
    "model.precision": "fp32",
    "data.limit": 6,
    "data.curve_limit": 20,
    "align.checkpoints": [0, 2],
    "steering.anchors": 8,
    "steering.strengths": [0.0, 2.0],
}
ALL = (
    "base",
    "STL",
    "STL-aug",
    "STL-tuned",
    "DCR",
    "DCR-matched",
    "DCR-keep",
    "DCR-sham",
    "DCR-tuned",
    "SCANS",
    "Surgical",
    "SelfCD",
    "question-mark",
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(layers=4).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    exp = Experiment(
        "quick",
        seed=1,
        run_dir=tmp_path_factory.mktemp("run"),
        methods=ALL,
        overrides={**OVERRIDES, "model.name": str(folder)},
    )
    exp.done = list(run_methods(exp))
    return exp


def test_every_method_of_the_list_runs(experiment):
    assert set(methods_file()) == set(ALL) == {m for m, what in experiment.done if what == "judged"}
    rows = experiment.metrics()
    assert (
        set(rows["method"]) == set(ALL)
        and not rows.duplicated(["method", "benchmark", "metric", "form"]).any()
    )
    assert rows["value"].between(0, 1).all()


def test_curves_sweep_the_strength(experiment):
    rows = experiment.curves()
    assert "base" not in set(rows["method"])
    for method in ("SCANS", "Surgical", "SelfCD"):
        mine = rows[rows["method"] == method]
        assert (
            sorted(mine["step"].unique()) == [0, 100, 200]
            and (mine["strength"] == mine["step"] / 100).all()
        )
    assert rows.loc[rows["method"] == "STL", "strength"].isna().all()
    points = plane_points(rows)
    assert set(points["method"]) == set(ALL) - {"base", "question-mark"}
    known = points[points["nominal"]].set_index("method")["step"]
    assert known.index.is_unique and (known["SCANS"], known["Surgical"], known["SelfCD"]) == (
        100,
        100,
        100,
    )
    assert known["STL"] == points.loc[points["method"] == "STL", "step"].max()
    off = points[(points["step"] == 0) & (points["method"] == "SCANS")].iloc[0]
    last = points[(points["method"] == "STL")].sort_values("step").iloc[-1]
    assert (off["dsr"], off["compliance"]) == (
        last["dsr"],
        last["compliance"],
    )  # strength 0 is the steered model itself


def test_fitting_a_steering_method_has_its_cost(experiment):
    cost = costs(experiment)
    assert set(cost.loc[cost["kind"] == "steer", "name"]) >= {"SCANS", "Surgical"}


def test_the_threshold_is_chosen_once_on_held_out_prompts_and_stated(experiment):
    facts = stage.fitted(experiment, "SCANS").manifest
    assert facts["threshold_from"] == "bundled validation prompts" and facts["n"] == len(
        stage.validation_table()
    )
    assert stage.steering_of(experiment, "SCANS").threshold == facts["threshold"]
    assert not set(stage.validation_table()["id"]) & set(experiment.prompts["id"])
    assert experiment.generations("SCANS").shape[0] == len(experiment.prompts)


def test_anchors_are_marked(experiment):
    for method in ("SCANS", "Surgical"):
        facts = stage.fitted(experiment, method).manifest
        assert (
            set(facts["in_distribution"])
            == {"dcr-pairs", "dcr-general"}
            <= experiment.in_distribution(method)
        )
        assert set(facts["anchors_also_tested"].values()) == {0}
    assert experiment.in_distribution("SelfCD") == experiment.in_distribution("STL")


def test_published_anchor_sets_are_in_distribution_and_leave_the_tested_prompts(monkeypatch):
    config = load_config("smollm2-135m")
    public = pd.DataFrame(
        {"id": [f"a{i}" for i in range(9)], "text": "x", "label": "toxic", "source": "advbench"}
    )
    monkeypatch.setattr(sets, "table", lambda name, **_: public.assign(source=name))
    monkeypatch.setattr("dcr.data.fetch.path_of", lambda name, download: name)
    rows = stage.anchor_table("harmful", config, exclude={"a0", "a1", "a2", "a3"}, n=5)
    assert set(rows["source"]) == {"advbench"} and set(rows["id"]) == {"a4", "a5", "a6", "a7", "a8"}
    assert set(stage.anchor_table("pseudo", config, n=5)["source"]) == {"or-bench"}

    def missing(name, download):
        raise DCRError("not at hand")

    monkeypatch.setattr("dcr.data.fetch.path_of", missing)
    assert set(stage.anchor_table("harmful", config, n=5)["source"]) == {"dcr-pairs"}


def test_steered_methods_share_the_weights_they_steer(experiment):
    for method in ("SCANS", "Surgical", "SelfCD"):
        assert experiment.weights_key(method, 50) == experiment.weights_key("STL", -1)
    with pytest.raises(DCRError, match="fits nothing"):
        stage.fitted(experiment, "SelfCD")


def test_augmented_rows_are_the_refined_prompts_answered(experiment, monkeypatch):
    recipe = experiment.recipe("STL-aug")
    mix = sets.alignment_mix(recipe)
    augment = mix[mix["role"] == "augment"]
    assert len(augment) and (augment["response"] != "").all()
    assert set(augment["text"]) <= set(sets.contrastive_sets(experiment.recipe("DCR"))[1]["text"])
    plain = sets.alignment_mix(experiment.recipe("STL"))
    assert mix[mix["role"] != "augment"].reset_index(drop=True).equals(plain)
    chosen = pd.DataFrame(
        {
            "id": ["c0"],
            "text": ["x"],
            "label": "seemingly_toxic",
            "source": "coconot",
            "form": "question",
            "response": ["y"],
        }
    )
    monkeypatch.setattr(sets, "table", lambda name, **_: chosen)
    mix = sets.alignment_mix(recipe.override({"align.augment_source": "coconot-pref"}))
    assert set(mix.loc[mix["role"] == "augment", "source"]) == {
        "coconot"
    }  # what in_distribution marks by


def test_the_audit_drops_what_is_not_harmful_in_our_recipes_only(experiment, monkeypatch, tmp_path):
    assert {m for m in ALL if experiment.recipe(m).data.audited} == {
        "STL-tuned",
        "DCR-matched",
        "DCR-keep",
        "DCR-tuned",
    }
    rows = [
        {"text": f"prompt {i}", "response": "no", "id": f"safety-only-{i:04d}"} for i in range(4)
    ]
    monkeypatch.setattr(loaders, "path_of", lambda name, download=True: tmp_path / "x.json")
    monkeypatch.setitem(
        loaders.PARSERS, "alpaca", lambda path, entry: iter([dict(r) for r in rows])
    )
    monkeypatch.setattr(
        loaders,
        "source",
        lambda name: type("S", (), {"rows": 0, "parser": "alpaca", "label": "toxic"})(),
    )
    monkeypatch.setattr(
        loaders,
        "audit",
        lambda: {
            "safety-only-0001": "harmless",
            "safety-only-0002": "ambiguous",
            "safety-only-0003": "harmful",
        },
    )
    assert len(sets.table("safety-only")) == 4
    assert sets.table("safety-only", audited=True)["id"].tolist() == [
        "safety-only-0000",
        "safety-only-0003",
    ]
