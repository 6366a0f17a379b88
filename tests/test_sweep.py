"""The sweep: grids read strictly, cells run once whoever runs them, failures kept, recipes above the method's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import yaml

from dcr import plots
from dcr.errors import DCRError
from dcr.run import grid as sweep
from dcr.run.cell import Cell, screen
from dcr.run.grid import chosen_cells, collect, grid_for, load_grid, run_sweep
from dcr.tables.harm_scores import harm_prompts

SMALL = {
    "refine.layer": 2,
    "refine.max_steps": 2,
    "refine.batch_size": 8,
    "refine.lora_rank": 2,
    "align.max_steps": 1,
    "align.lora_rank": 2,
    "align.batch_size": 8,
    "align.checkpoints": "last",
    "generation.max_new_tokens": 2,
    "model.precision": "fp32",
}


def write(path, **content):
    path.write_text(yaml.safe_dump({"profile": "quick", **content}, sort_keys=False))
    return path


def test_products_and_named_recipes_become_cells(tmp_path):
    path = write(
        tmp_path / "g.yaml",
        seeds=[0, 1],
        grid={"refine.layer": [0.5, 0.75], "refine.loss": ["circle", "supcon"]},
        recipes={"sham": {"refine.pairing": "sham"}, "STL": {"method": "STL"}},
    )
    grid = load_grid(path)
    assert len(grid.cells) == 12 and {c.name for c in grid.cells} >= {
        "layer=0.5 loss=supcon",
        "sham",
        "STL",
    }
    assert {c.method for c in grid.cells} == {"DCR", "STL"} and {c.seed for c in grid.cells} == {
        0,
        1,
    }
    assert len({grid.row_path(tmp_path, c, p) for c in grid.cells for p in sweep.PHASES}) == 24


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "neither grid nor recipes"),
        ({"grids": {}}, "unknown key 'grids'; known: profile"),
        ({"grid": {"refine.layer": 0.5}}, "must be a list"),
        ({"grid": [1]}, "must map names"),
        ({"grid": {"refine.layr": [0.5]}}, "unknown parameter 'layr'.*Did you mean 'layer'"),
        ({"recipes": {"a": {"method": "DRC"}}}, "method 'DRC' is unknown"),
        ({"recipes": {"a": {}}, "align": "some"}, "align='some'"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(tmp_path, content, message):
    with pytest.raises(DCRError, match=message):
        load_grid(write(tmp_path / "g.yaml", **content))
    with pytest.raises(DCRError, match="no such grid.*quick"):
        load_grid("nowhere")


def test_shipped_grids_load_and_cover_the_levers():
    assert len(load_grid("quick").cells) == 4
    search = load_grid("search")
    assert pd.Series([c.name.split(":")[0] for c in search.cells]).value_counts().to_dict() == {
        "STL": 9,
        "STL-aug": 9,
        "ours": 9,
    }
    for profile in ("embedded", "smollm2-135m", "qwen2.5-7b"):
        grid = grid_for(profile)
        keys = {k for c in grid.cells for k in c.recipe}
        assert grid.profile == profile and keys >= {
            "refine.layer",
            "refine.loss",
            "refine.pairing",
            "refine.balance_forms",
            "refine.toxic_share",
            "refine.retention",
        }
        assert keys & {"refine.epochs", "refine.max_steps"}  # strength of stage 1


def test_a_cells_recipe_stands_above_the_methods_and_validation_replaces_the_benchmarks(tmp_path):
    cell = Cell(
        "quick",
        method="DCR",
        seed=0,
        run_dir=tmp_path,
        base={"align.n_safe": 8},
        recipe={"refine.pairing": "matched"},
        validation=("validation-safe", "validation-toxic"),
    )
    assert cell.recipe("DCR").refine.pairing == "matched" and cell.recipe("DCR").align.n_safe == 8
    assert set(cell.prompts["benchmark"]) == {
        f"validation-{s}{w}" for s in ("safe", "toxic") for w in ("", "/swapped")
    }
    assert set(cell.prompts["split"]) == {"validation"}


def test_every_cell_is_asked_for_harm_by_the_same_prompts():
    harm = harm_prompts("quick", 0)
    assert harm["label"].value_counts().nunique() == 1 and set(harm["form"]) >= {
        "question",
        "imperative",
    }
    assert harm["text"].tolist() == harm_prompts("quick", 0)["text"].tolist() and set(
        harm["split"]
    ) == {"train"}


def test_a_grid_runs_keeps_failures_and_does_nothing_twice(folder, tmp_path, monkeypatch):
    path = write(
        tmp_path / "tiny.yaml",
        base={**SMALL, "model.name": str(folder)},
        align="all",
        recipes={"good": {}, "broken": {"refine.batch_size": 4096}, "STL": {"method": "STL"}},
    )
    grid = load_grid(path)
    assert set(collect(grid, tmp_path)["status"]) == {"missing"}
    table = run_sweep(grid, tmp_path / "run").set_index("cell")
    assert table["status"].to_dict() == {"good": "done", "broken": "failed", "STL": "done"}
    assert "a batch needs 2048" in table.loc["broken", "error"] and pd.isna(
        table.loc["broken", "dsr"]
    )
    done = table.loc[["good", "STL"]]
    assert (
        done[
            [
                "probe_auroc",
                "harm_auroc",
                "mean_auroc",
                "dsr",
                "compliance",
                "general_compliance",
                "refusal_auroc",
            ]
        ]
        .apply(lambda c: c.between(0, 1).all())
        .all()
    )
    assert (
        table.loc["good", "layer"] == 2
        and table.loc["good", "general_drift"] > table.loc["STL", "general_drift"] == 0
    )
    written = pd.read_csv(tmp_path / "run" / "tables" / "sweep_tiny.csv")
    assert written["cell"].tolist() == ["good", "broken", "STL"]
    manifest = tmp_path / "run" / "manifest.json"
    assert (
        json.loads(manifest.read_text())["config"]["profile"] == grid.profile
    )  # figures name the run that drew them
    manifest.write_text('{"config": {"profile": "mine"}}')
    levers, outcomes = (plots.REDRAW[n](written) for n in ("ablation_levers", "ablation_outcomes"))
    assert len(levers.axes) == 6 and [t.get_text() for t in levers.axes[0].texts] == ["failed"]
    dots = outcomes.axes[0].collections
    assert [tuple(d.get_offsets()[0]) for d in dots] == [
        (table.loc[c, "dsr"], table.loc[c, "compliance"]) for c in ("good", "STL")
    ]

    ran = []
    monkeypatch.setattr(
        sweep,
        "_run_cell",
        lambda grid, cell, *a: ran.append(cell.name) or {"status": "failed", "error": "again"},
    )
    again = run_sweep(grid, tmp_path / "run").set_index("cell")
    assert not ran and again["probe_auroc"].equals(table["probe_auroc"])
    assert (
        json.loads(manifest.read_text())["config"]["profile"] == "mine"
    )  # an experiment's own manifest stays
    monkeypatch.setattr(
        sweep,
        "_run_cell",
        lambda grid, cell, *a: (
            ran.append(cell.name) or {"status": "failed", "error": "again", "finished": time.time()}
        ),
    )
    assert run_sweep(grid, tmp_path / "run", retry=True).set_index("cell").loc[
        "broken", "error"
    ] == "again" and ran == ["broken"]


def test_a_screen_belongs_to_the_prompts_its_probe_was_fitted_on(folder, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "dcr.run.cell._screen",
        lambda cell, refined, prompts, probed, harm: (
            sizes.append(len(probed)) or {"probe_auroc": 0.5}
        ),
    )
    for n in (8, 12, 8):
        screen(
            Cell(
                "quick",
                method="STL",
                seed=0,
                run_dir=tmp_path,
                base={"model.name": str(folder)},
                recipe={"data.n_toxic": n},
                validation=("validation-safe", "validation-toxic"),
            )
        )
    assert sizes == [16, 24]  # the third is the first


def test_the_best_of_the_screen_are_aligned(tmp_path):
    path = write(tmp_path / "g.yaml", seeds=[0, 1], recipes={n: {} for n in "abc"}, align=1)
    grid = load_grid(path)
    for cell, value in zip(
        grid.cells, (0.5, 0.5, 0.9, 0.4, 0.6, 0.6), strict=True
    ):  # a 0.5, b 0.65, c 0.6 over seeds
        row = grid.row_path(tmp_path, cell, "screen")
        row.parent.mkdir(parents=True, exist_ok=True)
        row.write_text(json.dumps({"status": "done", "probe_auroc": value}))
    assert {(c.name, c.seed) for c in chosen_cells(grid, tmp_path)} == {("b", 0), ("b", 1)}


WORKER = """
import sys, time, os
from pathlib import Path
from dcr import plots
from dcr.run import grid as sweep
def fake(grid, cell, phase, root):
    with open(root / "log.txt", "a") as log: log.write(f"{os.getpid()} {cell.name} {phase}\\n")
    time.sleep(float(sys.argv[3]))
    return {"status": "done", "error": "", "probe_auroc": 0.5, "finished": time.time()}
sweep._run_cell = fake
sweep.run_sweep(sweep.load_grid(sys.argv[1]), sys.argv[2])
"""


def worker(path, run_dir, seconds: float):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(path), str(run_dir), str(seconds)])


def test_two_workers_share_a_folder_and_a_dead_ones_cell_is_taken_over(tmp_path):
    path = write(
        tmp_path / "g.yaml",
        recipes={f"c{i}": {"refine.max_steps": i + 1} for i in range(6)},
        align="all",
    )
    log, run_dir = tmp_path / "run" / "log.txt", tmp_path / "run"
    run_dir.mkdir()
    dying = worker(path, run_dir, 600)
    deadline = time.time() + 60
    while not log.exists() and time.time() < deadline:
        time.sleep(0.05)
    both = [worker(path, run_dir, 0.5) for _ in range(2)]
    while len(log.read_text().splitlines()) < 4 and time.time() < deadline:
        time.sleep(0.05)
    os.kill(dying.pid, signal.SIGKILL)
    dying.wait()
    assert [w.wait(timeout=60) for w in both] == [0, 0]
    lines = [line.split() for line in log.read_text().splitlines()]
    finished = [tuple(rest) for pid, *rest in lines if int(pid) != dying.pid]
    assert sorted(finished) == sorted(
        (f"c{i}", p) for i in range(6) for p in sweep.PHASES
    )  # each once
    assert len({pid for pid, *_ in lines}) == 3
    assert set(pd.read_csv(run_dir / "tables" / "sweep_g.csv")["status"]) == {"done"}


@pytest.mark.slow
def test_the_command_in_two_processes_trains_each_cell_once(folder, tmp_path):
    path = write(
        tmp_path / "g.yaml",
        base={**SMALL, "model.name": str(folder)},
        align="all",
        grid={"refine.layer": [1, 2], "refine.loss": ["circle", "supcon"]},
    )
    command = [
        sys.executable,
        "-m",
        "dcr.cli",
        "sweep",
        str(path),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [p.communicate(timeout=280) for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert all("layer=2 loss=supcon" in out for out, _ in outputs)
    assert sum(err.count("refine/DCR") and err.count("computed in") for _, err in outputs) > 0
    assert len(list((tmp_path / "run" / "refine").glob("DCR-*/manifest.json"))) == 4
