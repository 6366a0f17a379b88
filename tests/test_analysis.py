"""The analysis of one experiment on a tiny local model: cells, kernel before and after, Proposition 1, trajectories, figures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import make_model, make_tokenizer

from dcr import plots
from dcr.errors import DCRError
from dcr.plots.style import picture
from dcr.run.experiment import Experiment
from dcr.tables import representations as analysis
from dcr.tables.trajectories import kernel_steps

OVERRIDES = {
    "refine.layer": 2,
    "refine.max_steps": 2,
    "refine.batch_size": 8,
    "refine.lora_rank": 2,
    "align.max_steps": 2,
    "align.lora_rank": 2,
    "align.batch_size": 8,
    "generation.max_new_tokens": 2,
    "model.precision": "fp32",
    "data.limit": 6,
    "data.curve_limit": 20,
    "evaluation.trajectory_prompts": 4,
    "evaluation.kernel_prompts": 3,
    "evaluation.kernel_steps": 0,
    "align.checkpoints": [0, 1, 2],
}


@pytest.fixture(scope="module")
def exp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(layers=3).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return Experiment(
        "quick",
        seed=1,
        run_dir=tmp_path_factory.mktemp("run"),
        overrides={**OVERRIDES, "model.name": str(folder)},
    )


def test_cells_summary_and_note(exp):
    tables, cells = analysis.separability(exp, layers=2), analysis.probe_cells(exp)
    assert (
        set(cells["pairing"]) == {"sources (paper)", "matched pairs"}
        and (cells["layer"] == 2).all()
    )
    for _, rows in cells.groupby("pairing"):
        assert len(rows) == 5 and {"question", "imperative", "balanced"} <= set(rows["toxic_form"])
    summary = analysis.separability_summary(tables, 2).set_index("pairing")
    assert (
        summary.loc["sources (paper)", "question-mark"] == 1.0
        and summary["forms swapped"].between(0, 1).all()
    )
    transfer = tables["transfer"]
    assert set(transfer[transfer["pairing"] == "matched pairs"]["tested_on"]) == {
        "matched pairs, forms swapped",
        "sources (paper)",
        "sources, forms swapped",
    }
    kernel = pd.concat(
        [analysis.kernel_table(exp, "base"), analysis.kernel_table(exp, "DCR", step=0)]
    )
    assert len(kernel) == 18 and kernel["symmetric"].between(0, 1.001).all()
    changed = (
        kernel[kernel["method"] == "DCR"]["normalised"].to_numpy()
        - kernel[kernel["method"] == "base"]["normalised"].to_numpy()
    )
    assert np.abs(changed).max() > 0  # stage 1 moved the kernel
    check, pairs = analysis.proposition(exp)
    assert check["model"].tolist() == ["base", "DCR after stage 1"] and len(pairs) == 2 * 9 * 8 // 2
    note = analysis.closing_note(summary.reset_index(), cells, kernel, check)
    assert (
        "Proposition 1, base: Spearman" in note
        and "DCR after stage 1" in note
        and "sources (paper): probe AUROC" in note
    )
    for figure in (
        plots.kernel_matrix(kernel),
        plots.proposition(pairs, check),
        plots.probe_cells(cells),
        plots.transfer(transfer),
    ):
        assert picture(figure, "png")[:4] == b"\x89PNG"


def test_real_pairing_takes_the_profile_s_own_sets_and_xstest_folds_go_by_kind(exp, monkeypatch):
    from dcr.data import sets

    xstest = pd.DataFrame(
        [
            {
                "id": f"x{label}{i}",
                "text": f"What is kind{i % 4} number{i}?",
                "label": label,
                "source": "xstest",
                "category": ("contrast_" if label == "toxic" else "") + f"kind{i % 4}",
                "form": "question",
                "pair_id": "",
                "split": "test",
                "response": "",
            }
            for label in ("toxic", "seemingly_toxic")
            for i in range(12)
        ]
    )
    keep = sets.table
    monkeypatch.setattr(
        sets,
        "table",
        lambda name, **more: (
            xstest[xstest["label"] == ("toxic" if name.endswith("unsafe") else "seemingly_toxic")]
            if name.startswith("xstest")
            else keep(name, **more)
        ),
    )
    monkeypatch.setattr(
        exp, "config", exp.config.override({"data.benchmarks": ["xstest-safe", "xstest-unsafe"]})
    )
    found = analysis.probe_sets(exp)["XSTest contrasts"]
    assert set(found["pair_id"]) == {f"kind{i}" for i in range(4)} and len(found) == 24


def test_trajectories_cover_every_recorded_step(exp):
    tables = analysis.trajectories(exp, ("STL",))
    assert (
        sorted(tables["rejection"]["step"].unique())
        == [0, 1, 2]
        == sorted(tables["kernel"]["step"].unique())
    )
    assert set(zip(tables["kernel"]["class_a"], tables["kernel"]["class_b"], strict=True)) == {
        (a, b)
        for a in ("toxic", "seemingly_toxic", "general")
        for b in ("toxic", "seemingly_toxic", "general")
    }
    first = tables["kernel"].query("step == 0")["normalised"].to_numpy()
    assert (
        first == analysis.kernel_table(exp, "base")["normalised"].to_numpy()
    ).all()  # the same weights, measured once
    assert not [
        name for name in exp.store.computed if name.startswith(("kernel/STL@0", "rejection/STL@0"))
    ]
    rates = analysis.refusal_rates(exp, ("STL",))
    assert set(rates["measure"]) == {"refusal", "compliance"} and sorted(
        rates["step"].unique()
    ) == [0, 1, 2]
    one = rates[(rates["step"] == 2) & (rates["label"] == "toxic")].set_index("measure")
    judged = exp.curve_prompts.merge(
        exp.verdicts("STL", 2), left_on="id", right_on="prompt_id"
    ).query("label == 'toxic'")
    assert one.loc["refusal", "value"] == pytest.approx((judged["verdict"] == "refuse").mean())
    assert (
        picture(plots.refusal_rates(rates[rates["measure"] == "refusal"]), "png")[:4] == b"\x89PNG"
    )


@pytest.mark.parametrize(
    "wanted, steps",
    [(0, [0, 1, 2, 4, 8, 9]), (3, [0, 2, 9]), (2, [0, 9]), (1, [0, 9]), (9, [0, 1, 2, 4, 8, 9])],
)
def test_kernel_steps_keep_first_and_last(wanted, steps):
    assert kernel_steps([0, 1, 2, 4, 8, 9], wanted) == steps


def test_reliability_uses_answers_to_the_same_prompts(exp, monkeypatch):
    """With verdicts made from the probability itself AUROC is 1; a model that refuses nothing is said so."""
    prompts = exp.curve_prompts
    probability = np.linspace(0.05, 0.95, len(prompts))
    monkeypatch.setattr("dcr.tables.trajectories.refusal_probabilities", lambda *_: probability)

    def verdicts(method, step):
        kinds = np.where(probability > 0.5, "refuse", "comply")
        return pd.DataFrame({"prompt_id": prompts["id"], "verdict": kinds}).sample(
            frac=1, random_state=0
        )  # order must not matter

    monkeypatch.setattr(exp, "verdicts", verdicts)
    scores, table = analysis.rejection_reliability(exp, "STL")
    assert scores["auroc"].iloc[0] == 1.0 and table["refused"].is_monotonic_increasing
    assert picture(plots.reliability(scores, table), "png")[:4] == b"\x89PNG"
    monkeypatch.setattr(
        exp,
        "verdicts",
        lambda m, s: pd.DataFrame({"prompt_id": prompts["id"], "verdict": "comply"}),
    )
    with pytest.raises(DCRError, match="were refused; both need at least 2"):
        analysis.rejection_reliability(exp, "STL")


def test_following_a_run_never_changes_its_weights(tmp_path, exp):
    """The same alignment without any recorded step, and nothing read from it, ends with the same bits."""
    from safetensors.torch import load_file

    analysis.trajectories(exp, ("STL",))
    plain = Experiment(
        "quick",
        seed=1,
        run_dir=tmp_path,
        overrides={**OVERRIDES, "model.name": exp.config.model.name, "align.checkpoints": "last"},
    )
    followed, alone = (
        load_file(next((e.aligned("STL").path / "model").glob("*.safetensors")))
        for e in (exp, plain)
    )
    assert followed.keys() == alone.keys() and all(
        (followed[n] == alone[n]).all() for n in followed
    )
