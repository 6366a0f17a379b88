"""Counts against peft's own, tokens against the trainer's, and the cost table against the manifests."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_model, make_tokenizer

from dcr.config import load_config
from dcr.errors import DCRError
from dcr.run.experiment import Experiment
from dcr.tables.estimate import cost_table, counts, estimate, matrix_rate
from dcr.train.adapters import Lora, train_blocks

SMALL = {
    "refine.layer": 2,
    "refine.max_steps": 2,
    "refine.batch_size": 8,
    "align.max_steps": 4,
    "align.batch_size": 16,
    "generation.max_new_tokens": 3,
    "model.precision": "fp32",
    "data.limit": 4,
    "align.n_general": 32,
    "align.n_safe": 32,
    "align.checkpoints": "last",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(layers=3).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("rank", [0, 4])
def test_counts_equal_what_trains(family, rank):
    model = make_model(family)
    size = counts(model, 1, 3, rank=rank)
    assert size["all"] == sum(p.numel() for p in model.parameters())
    trained = train_blocks(model, 1, 3, Lora(rank, 8))
    assert size["trainable"] == sum(p.numel() for p in trained.parameters() if p.requires_grad)


def test_estimated_tokens_are_those_that_training_reads(folder, tmp_path):
    exp = Experiment(
        "quick",
        run_dir=tmp_path,
        overrides={**SMALL, "model.name": folder},
        methods=("base", "STL", "DCR"),
    )
    table = estimate(exp.config, exp.methods).set_index(["method", "stage"])
    assert set(table.index) == {
        ("base", "generate"),
        ("STL", "align"),
        ("STL", "generate"),
        ("DCR", "refine"),
        ("DCR", "align"),
        ("DCR", "generate"),
    }
    read = exp.history("STL", "align")["tokens"].iloc[
        -1
    ]  # 4 steps of 16 = one pass over all 64 rows, so exact
    assert table.loc[("STL", "align"), "tokens"] == read
    assert (table["seconds"] > 0).all() and (table["memory_mib"] > 500).all()
    assert table.loc[("DCR", "refine"), "trainable"] < exp.config.refine.lora_rank * 10**4

    for method in exp.methods:
        exp.metric_rows(method)
    cost = cost_table(exp).set_index("method")
    manifest = exp.aligned("STL").manifest
    assert (
        cost.loc["STL", "align_seconds"] == manifest["seconds"]
        and cost.loc["STL", "training_tokens"] == read
    )
    assert cost.loc["base", "training_tokens"] == 0 and cost.loc["STL", "inference_vs_STL"] == 1.0
    assert cost.loc["DCR", "refine_seconds"] > 0 and cost["ms_per_token"].notna().all()


def test_all_token_labels_and_whole_training_cost_more(folder):
    plain = load_config("quick", overrides={**SMALL, "model.name": folder})
    whole = plain.override({"align.lora_rank": 0, "align.labels": "all"})
    a, b = (estimate(c, ("STL",)).set_index("stage").loc["align"] for c in (plain, whole))
    assert (
        b["trainable"] > a["trainable"]
        and b["tokens"] == a["tokens"]
        and b["memory_mib"] >= a["memory_mib"]
    )


def test_matrix_rate_is_finite():
    assert 1e8 < matrix_rate(torch.float32, seconds=0.05) < 1e16 and math.isfinite(
        matrix_rate(torch.bfloat16, seconds=0.05)
    )


def test_errors(tmp_path):
    with pytest.raises(DCRError, match="nothing has been run"):
        cost_table(Experiment("quick", run_dir=tmp_path))
    with pytest.raises(DCRError, match="no-such/model"):
        estimate(load_config("quick", overrides={"model.name": "no-such/model"}), ("STL",))
