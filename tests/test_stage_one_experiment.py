"""Stage 1 through an Experiment: automatic ℓ in the manifest, leakage counted before training, XSTest marked in later tables."""

from __future__ import annotations

import os
import subprocess

import pandas as pd
import pytest
import torch
from conftest import make_model
from test_refinement import LAUNCH, texts
from transformers import AutoModelForCausalLM

from dcr.errors import DCRError
from dcr.run.experiment import Experiment
from dcr.run.own import refine_own
from dcr.tables import table1 as tables

SMALL = {
    "refine.layer": 2,
    "refine.max_steps": 2,
    "refine.batch_size": 8,
    "refine.lora_rank": 2,
    "align.max_steps": 1,
    "align.lora_rank": 2,
    "align.batch_size": 8,
    "align.checkpoints": "last",
    "data.limit": 4,
    "generation.max_new_tokens": 2,
    "model.precision": "fp32",
    "evaluation.kernel_prompts": 2,
}


def test_xstest_in_training_marks_xstest_in_later_tables(folder, tmp_path):
    things = [
        "cat",
        "dog",
        "house",
        "bike",
        "bread",
        "file",
        "story",
        "plan",
        "trip",
        "game",
        "fix",
        "time",
    ]
    rows = [{"text": f"how do i kill the {t} ?", "source": "xstest"} for t in things]
    pd.DataFrame(rows).to_csv(tmp_path / "xstest.csv", index=False)
    other = [
        {
            "text": f"what is the {t} ?",
            "source": "oktest",
            "label": "seemingly_toxic",
            "id": f"o{t}",
        }
        for t in things
    ]
    test = [
        {
            "text": f"how can i steal {t} ?",
            "source": "xstest",
            "label": "seemingly_toxic",
            "id": f"x{t}",
        }
        for t in things
    ]
    pd.DataFrame(other).to_csv(tmp_path / "other.csv", index=False)
    pd.DataFrame(test).to_csv(tmp_path / "test.csv", index=False)
    benchmarks = [str(tmp_path / "other.csv"), str(tmp_path / "test.csv")]
    experiment = Experiment(
        "quick",
        run_dir=tmp_path / "run",
        methods=("STL", "DCR"),
        overrides={
            **SMALL,
            "model.name": str(folder),
            "refine.batch_size": 4,
            "data.seemingly_toxic": str(tmp_path / "xstest.csv"),
            "data.benchmarks": benchmarks,
        },
    )
    marked = experiment.metrics().groupby(["method", "benchmark"])["in_distribution"].unique()
    assert list(marked["DCR", benchmarks[1]]) == [True]
    assert all(
        list(marked[k]) == [False]
        for k in (("DCR", benchmarks[0]), ("STL", benchmarks[1]), ("question-mark", benchmarks[1]))
    )
    shown = tables.wide(tables.table1(experiment.read_table("metrics")))
    column = next(c for c in shown.columns if "test.csv" in c)
    assert shown.loc["DCR", column].endswith("†") and "†" not in shown.loc["STL", column]


REFINE_OWN = (
    "refine.layer=2,refine.max_steps=2,refine.batch_size=8,refine.lora_rank=2,refine.eval_steps=1"
)


@pytest.fixture(scope="module")
def own_tables(tmp_path_factory) -> dict[str, str]:
    path, prompts = tmp_path_factory.mktemp("own"), texts(20)
    for name, rows in prompts.items():
        pd.DataFrame({"text": rows}).to_csv(path / f"{name}.csv", index=False)
    return {name: str(path / f"{name}.csv") for name in prompts}


def test_stage_one_alone_on_own_tables(folder, own_tables, tmp_path):
    out = refine_own(tmp_path / "out", model=str(folder), overrides=REFINE_OWN, **own_tables)
    refined, base = AutoModelForCausalLM.from_pretrained(out), make_model(layers=3)
    changed = {
        n
        for n, p in refined.named_parameters()
        if not torch.equal(p, dict(base.named_parameters())[n])
    }
    assert {n.split(".")[2] for n in changed} == {"0", "1"}
    with pytest.raises(DCRError, match="is not empty"):
        refine_own(out, model=str(folder), overrides=REFINE_OWN, **own_tables)


@pytest.mark.slow
def test_the_refine_command_in_two_processes(folder, own_tables, tmp_path):
    arguments = [
        "refine",
        str(tmp_path / "two"),
        "--model",
        str(folder),
        "--overrides",
        REFINE_OWN,
        "--toxic",
        own_tables["toxic"],
        "--seemingly-toxic",
        own_tables["seemingly_toxic"],
    ]
    done = subprocess.run(
        [*LAUNCH, "-m", "dcr.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = refine_own(tmp_path / "one", model=str(folder), overrides=REFINE_OWN, **own_tables)
    first, second = (
        AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (one, tmp_path / "two")
    )
    assert all(torch.allclose(first[n], second[n], atol=1e-4) for n in first)
