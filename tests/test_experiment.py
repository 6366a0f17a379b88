"""The whole line on a tiny local model: every stage runs, nothing runs twice, a change recomputes only what hangs on it."""

from __future__ import annotations

import json

import pytest

from dcr.book.explorer import answers_table
from dcr.book.figures import draw_all, draw_tables
from dcr.book.report import write_report
from dcr.errors import DCRError
from dcr.run.experiment import Experiment, run_methods
from dcr.tables import representations as analysis
from dcr.tables.comparisons import paired_table
from dcr.tables.failures import category_rates, costs, still_refused

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
    "evaluation.trajectory_prompts": 4,
    "evaluation.kernel_prompts": 2,
    "align.checkpoints": [0, 2],
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


def experiment(folder, run_dir, **more) -> Experiment:
    return Experiment(
        "quick", seed=1, run_dir=run_dir, overrides={**OVERRIDES, "model.name": str(folder), **more}
    )


def test_the_whole_line_runs_then_reuses_then_recomputes_what_changed(folder, run_dir):
    first = experiment(folder, run_dir)
    assert [m for m, _ in run_methods(first)][-1] == "DCR"
    rows = first.metrics()
    assert (
        set(rows["method"]) == {"base", "STL", "DCR", "question-mark"}
        and rows["value"].between(0, 1).all()
    )
    curves = first.curves()
    assert sorted(curves["step"].unique()) == [0, 2, 3]
    answered = {p.name.rpartition("-")[0] for p in (run_dir / "generate").iterdir() if p.is_dir()}
    assert answered == {
        "base",
        "STL",
        "STL@2",
        "DCR",
        "DCR@0",
        "DCR@2",
    }  # last steps and the untrained STL are not answered twice
    full, part = (
        first.generations("STL").set_index("prompt_id")["response"],
        first.generations("STL", 3),
    )
    assert (
        set(part["prompt_id"]) == set(first.curve_prompts["id"])
        and (part["response"] == part["prompt_id"].map(full)).all()
    )
    model, _ = first.model("DCR")
    assert (
        all(p.requires_grad for p in model.parameters()) and not model.training
    )  # merged, and as trainable as a loaded one

    again = experiment(folder, run_dir)
    list(run_methods(again))
    assert (
        again.metrics().equals(rows)
        and not again.store.computed
        and "0 artifacts computed" in again.store.summary()
    )

    changed = experiment(folder, run_dir, **{"align.lr": 1e-4})
    list(run_methods(changed))
    kinds = {name.split("-")[0] for name in changed.store.computed}
    assert kinds == {
        "align/STL",
        "align/DCR",
        "generate/STL",
        "generate/DCR",
        "judge/STL",
        "judge/DCR",
    } or kinds <= {
        "align/STL",
        "align/DCR",
        "generate/STL",
        "generate/DCR",
        "judge/STL",
        "judge/DCR",
    }
    assert any("align/STL" in name for name in changed.store.computed)


def test_manifests_prove_what_was_run(folder, run_dir):
    manifest = experiment(folder, run_dir).aligned("DCR").manifest
    assert {
        "dependencies",
        "environment",
        "seconds",
        "peak_memory_mib",
        "rendering",
        "config",
        "outputs",
    } <= set(manifest)
    assert manifest["rendering"]["rendered_prompt"] and manifest["dependencies"]["seed"] == 1
    again = experiment(folder, run_dir)
    whole = again.manifest()
    assert whole["data"]["mix"]["rows"] == again.config.align.n_general + again.config.align.n_safe
    assert any(a["kind"] == "align" for a in whole["artifacts"])
    json.loads((run_dir / "manifest.json").read_text())


def test_analysis_figures_tables_and_report(folder, run_dir):
    exp = experiment(folder, run_dir)
    analysis.question_shares(exp)
    tables = analysis.separability(exp, layers=2)
    assert set(tables) == {"probe", "transfer", "surface", "cosine", "clusters"}
    mark = tables["surface"].query("baseline == 'question-mark'").set_index("pairing")["auroc"]
    assert mark["sources (paper)"] == 1.0 and mark["matched pairs"] == pytest.approx(0.5)
    analysis.before_after(exp)
    trajectories = analysis.trajectories(exp)
    assert set(trajectories["kernel"]["method"]) == {"STL", "DCR"}
    metrics = exp.metrics()
    from dcr.tables.table1 import plane_points

    exp.write_table("plane", plane_points(exp.curves()))
    paired = paired_table(exp)
    assert (
        set(paired["method"]) == {"base", "DCR", "question-mark"}
        and (paired["p_holm"] >= paired["p"]).all()
    )
    assert len(costs(exp)) >= 5
    assert set(still_refused(exp, "DCR").columns) >= {"text", "answer", "form"}
    assert set(category_rates(exp)["label"]) == {"toxic", "seemingly_toxic", "general"}
    answers = answers_table(exp)
    assert answers.query("label == 'toxic'")["answer"].eq("").all() and set(answers["method"]) == {
        "base",
        "STL",
        "DCR",
        "question-mark",
    }
    drawn, missing = draw_all(run_dir / "tables", run_dir / "figures")
    assert "losses" in missing and {"plane", "differences", "categories"} <= set(drawn)
    assert all(
        "run notebook" in message or "run `dcr run`" in message for message in missing.values()
    )
    draw_tables(metrics, run_dir / "tables")
    exp.manifest()
    assert "question-mark" in write_report(run_dir).read_text()


def test_in_distribution_sets_are_marked(folder, run_dir):
    exp = experiment(folder, run_dir)
    assert exp.in_distribution("base") == set() and exp.in_distribution("DCR") == {
        "dcr-pairs",
        "dcr-general",
    }


def test_sham_and_matched_recipes_differ_from_dcr(folder, run_dir):
    exp = experiment(folder, run_dir)
    assert (
        exp.recipe("DCR-sham").refine.pairing == "sham"
        and exp.recipe("DCR-matched").refine.pairing == "matched"
    )
    assert exp.recipe("STL-aug").align.n_augment > 0 and exp.stages("STL") == ["align"]


def test_unknown_method_and_missing_table(folder, run_dir):
    with pytest.raises(DCRError, match="method 'DRC' is unknown; known: base"):
        Experiment("quick", methods=("DRC",))
    with pytest.raises(DCRError, match="run the notebook that writes it"):
        experiment(folder, run_dir).read_table("nothing")


def test_export_loads_without_the_kit(folder, run_dir, tmp_path):
    import subprocess
    import sys

    from dcr.run.own import export

    out = export(experiment(folder, run_dir), "DCR", tmp_path / "plain")
    code = (
        "import sys, transformers as t; m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "k = t.AutoTokenizer.from_pretrained(sys.argv[1]); assert k.chat_template and 'dcr' not in sys.modules; "
        "assert not any('lora' in n for n, _ in m.named_parameters()); print('ok')"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code, str(out)], capture_output=True, text=True, timeout=120
        ).stdout.strip()
        == "ok"
    )
    card = (out / "README.md").read_text()
    assert "## Results" in card and "| pairs-toxic | dsr |" in card


def test_own_model_and_own_data(folder, tmp_path):
    import pandas as pd

    from dcr.run.own import align_own

    words = ["cat", "dog", "house", "bike", "bread", "file", "story", "plan", "trip", "game"] * 2
    for name, text, answer in (
        ("toxic", "steal the {} in {} .", "sorry , i cannot help ."),
        ("mine", "bake the {} in {} ?", ""),
        ("general", "list the {} of {} .", "sure , the cat ."),
    ):
        pd.DataFrame(
            {"text": [text.format(w, i) for i, w in enumerate(words)], "response": answer}
        ).to_csv(tmp_path / f"{name}.csv", index=False)
    files = {
        "toxic": str(tmp_path / "toxic.csv"),
        "seemingly_toxic": str(tmp_path / "mine.csv"),
        "general": str(tmp_path / "general.csv"),
    }
    text = "refine.layer=2,refine.max_steps=1,refine.batch_size=8,align.max_steps=1"
    out = align_own(tmp_path / "out", model=str(folder), overrides=text, **files)
    assert (out / "model.safetensors").exists() and (out / "README.md").exists()
    with pytest.raises(DCRError, match="is not empty"):
        align_own(tmp_path / "out", model=str(folder), overrides=text, **files)
    with pytest.raises(DCRError, match="row 0 has no response"):
        align_own(
            tmp_path / "out2",
            model=str(folder),
            overrides=text,
            **{**files, "toxic": files["seemingly_toxic"]},
        )


def test_an_endpoint_answers_for_one_method_only(folder, tmp_path):
    with pytest.raises(DCRError, match="serves one model, but the run has base, STL, DCR"):
        experiment(
            folder, tmp_path, **{"generation.endpoint": "http://127.0.0.1:9/v1"}
        ).generations("base")
