"""Grids: cells through joblib and Ray, failures as rows, a second call runs what is missing."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from dcr.config import load_config, profiles
from dcr.errors import DCRError
from dcr.run.store import Store
from dcr.study import grid as grids
from dcr.study.grid import collect, grid_for, load_grid, run_all, run_grid
from dcr.study.registry import load_all, table_entry

load_all()

BASE = {
    "refine.max_steps": 2,
    "refine.batch_size": 8,
    "refine.lora_rank": 2,
    "align.max_steps": 2,
    "align.n_general": 16,
    "align.n_safe": 8,
    "align.batch_size": 8,
    "align.checkpoints": "last",
    "align.lora_rank": 2,
    "generation.max_new_tokens": 2,
    "model.precision": "fp32",
    "data.limit": 6,
}


def written(tmp_path, folder, **content):
    path = tmp_path / "small.yaml"
    base = {**BASE, "model.name": str(folder)}
    path.write_text(yaml.safe_dump({"profile": "quick", "base": base, **content}))
    return path


def test_a_grid_is_every_combination_and_the_recipes_of_every_seed(tmp_path, folder):
    path = written(
        tmp_path,
        folder,
        seeds=[0, 1],
        grid={"refine.layer": [1, 2], "refine.loss": ["circle", "supcon"]},
        recipes={"plain": {"method": "STL"}},
    )
    grid = load_grid(path, overrides="align.max_steps=3")
    assert len(grid.cells) == 2 * (2 * 2 + 1) and grid.profile == "quick"
    assert grid.cells[0].name == "layer=1 loss=circle"
    assert {c.method for c in grid.cells} == {"DCR", "STL"}
    assert grid.config(grid.cells[0]).align.max_steps == 3
    assert len({grid.row_path(tmp_path, c, "screen") for c in grid.cells}) == 10


def test_a_recipes_section_is_laid_over_the_bases_field_by_field(tmp_path, folder):
    path = written(tmp_path, folder, recipes={"x": {"refine": {"layer": 2}}})
    content = yaml.safe_load(path.read_text())
    content["base"]["refine"] = {"eval_steps": 3, "margin": 0.1}
    path.write_text(yaml.safe_dump(content))
    grid = load_grid(path, overrides={"refine": {"margin": 0.2}})
    refine = grid.config(grid.cells[0]).refine
    assert (refine.layer, refine.eval_steps, refine.margin, refine.max_steps) == (2, 3, 0.2, 2)
    assert grid.cells[0].recipe == {"refine.layer": 2}


WRONG = [
    ({"grids": {}}, "unknown key 'grids'; known: profile"),
    ({}, "neither grid nor recipes"),
    ({"grid": {"refine.layer": 2}}, "grid.refine.layer must be a list"),
    ({"grid": [1]}, "grid must map"),
    ({"recipes": {"x": {"method": "DRC"}}}, "x: method 'DRC' is unknown"),
    ({"recipes": {"x": {"refine.loss": "foo"}}}, "refine.loss='foo': should be"),
    ({"recipes": {"x": True}}, "recipes.x must map"),
    ({"recipes": {3: {}}}, "recipes must map names"),
    ({"grid": {3: [1]}}, "grid must map names"),
    ({"recipes": {"x": {}}, "seeds": ["a"]}, "seeds=.'a'.: give e.g."),
    ({"recipes": {"x": {}}, "align": -1}, "align=-1"),
    ({"recipes": {"x": {}}, "profile": "quikc"}, "Did you mean 'quick'"),
]


@pytest.mark.parametrize("content, message", WRONG)
def test_a_wrong_grid_is_told_before_anything_runs(tmp_path, folder, content, message):
    with pytest.raises(DCRError, match=message):
        load_grid(written(tmp_path, folder, **content))


def test_a_file_that_is_no_grid(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "date.yaml").write_text("align: 2020-13-45")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    wrong = {"broken": "not YAML", "date": "not YAML", "deep": "not YAML"}
    for name, message in {**wrong, "list": "a grid maps", "gone": "no such"}.items():
        with pytest.raises(DCRError, match=message):
            load_grid(tmp_path / f"{name}.yaml")
    with pytest.raises(DCRError, match="serch: no such grid.*Did you mean 'search'"):
        load_grid("serch")


def test_every_grid_of_the_kit_and_the_one_of_every_profile_loads():
    for path in grids.GRIDS.glob("*.yaml"):
        assert load_grid(path.stem).cells
    for profile in profiles():
        assert grid_for(load_config(profile)).profile == profile


def test_cells_are_screened_the_best_aligned_failures_are_rows_and_a_second_call_does_the_rest(
    tmp_path, folder, monkeypatch
):
    recipes = {"sham": {"refine.pairing": "sham"}, "bad": {"refine.layer": 9}}
    path = written(tmp_path, folder, grid={"refine.layer": [1, 2]}, recipes=recipes, align=1)
    grid = load_grid(path)
    assert set(collect(grid, tmp_path)["status"]) == {"missing"}
    rows = run_grid(grid, tmp_path / "run").set_index("cell")
    assert rows.loc["bad", "status"] == "failed" and "out of range" in rows.loc["bad", "error"]
    fine = rows.drop("bad")
    measures = ["probe_auroc", "harm_auroc", "cross_similarity", "within_similarity", "layer"]
    assert (fine["status"] == "done").all() and fine[
        [*measures, "general_drift"]
    ].notna().all().all()
    aligned = fine["dsr"].notna()
    assert aligned.sum() == 1 and fine["probe_auroc"].idxmax() == aligned.idxmax()
    trained = [a.manifest["kind"] for a in Store(tmp_path / "run").artifacts()]
    assert (trained.count("refine"), trained.count("align")) == (3, 1)  # a screen aligns nothing
    assert (
        fine.loc[aligned, ["compliance", "general_compliance", "refusal_auroc"]].notna().all().all()
    )
    saved = pd.read_csv(tmp_path / "run" / "grid" / "small.csv")
    assert saved["cell"].tolist() == rows.index.tolist()
    asked = []
    monkeypatch.setattr(grids, "_run_cell", lambda *a: asked.append(a[-1].name))
    run_grid(grid, tmp_path / "run")
    assert asked == []
    run_grid(grid, tmp_path / "run", retry=True)
    assert asked == ["bad"]
    next((tmp_path / "run" / "grid" / "small").glob("sham-s0-screen-*")).unlink()
    run_grid(grid, tmp_path / "run")
    assert asked == ["bad", "sham"]


def task(item):
    if item == 2:
        raise ValueError("two is wrong")
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


@pytest.mark.parametrize("jobs", [1, 2])
def test_failures_are_told_by_item(jobs):
    found = dict(run_all(task, [0, 1, 2, 4], jobs=jobs))
    assert found == {0: "", 1: "", 2: "ValueError: two is wrong", 4: ""}


def test_a_worker_that_dies_is_a_row_too():
    """And those after it are run all the same, in new processes."""
    found = dict(run_all(task, [0, 1, 3, *range(4, 12)], jobs=2))
    assert "worker process died" in found.pop(3) and len(found) == 10
    assert not any(found.values())


def test_an_unknown_engine_and_a_missing_ray(monkeypatch):
    with pytest.raises(DCRError, match="use joblib or ray"):
        list(run_all(task, [0], engine="slurm"))
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(DCRError, match=r"pip install 'dcr-kit\[cluster\]'"):
        list(run_all(task, [0], engine="ray"))


@pytest.fixture(scope="module")
def cluster():
    """A real Ray cluster on this machine, started and stopped here; its address in RAY_ADDRESS."""
    from ray.cluster_utils import Cluster

    here = Path(__file__).parent
    found = [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(found)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    os.environ["RAY_ADDRESS"] = made.address
    yield made
    os.environ.pop("RAY_ADDRESS")
    made.shutdown()


@pytest.mark.slow
def test_a_grid_through_a_ray_cluster_equals_one_through_joblib(tmp_path, folder, cluster):
    path = written(
        tmp_path,
        folder,
        grid={"refine.layer": [1, 2]},
        recipes={"bad": {"refine.layer": 9}},
        align="all",
    )
    grid = load_grid(path)
    through_ray = run_grid(grid, tmp_path / "ray", engine="ray")
    through_joblib = run_grid(grid, tmp_path / "joblib", jobs=2)
    numbers = through_ray.columns.difference(["screen_seconds", "align_seconds"])
    pd.testing.assert_frame_equal(through_ray[numbers], through_joblib[numbers])
    assert through_ray["status"].tolist() == ["done", "done", "failed"]


@pytest.mark.slow
def test_many_seeds_of_a_run_go_through_the_cluster(tmp_path, folder, cluster):
    from dcr.study.experiment import Experiment

    overrides = {**BASE, "refine.layer": 2, "model.name": str(folder)}
    experiment = Experiment("quick", seeds="0-1", run_dir=tmp_path, overrides=overrides)
    found = list(experiment.complete(engine="ray"))
    assert len(found) == 6 and not any(problem for *_, problem in found)
    store = experiment.store
    for run in experiment.runs:
        run.scores("DCR")
    assert store.computed == []


@pytest.mark.slow
def test_a_worker_of_the_cluster_that_dies_is_a_row(cluster):
    found = dict(run_all(task, [0, 3, 1], engine="ray"))
    assert found[0] == found[1] == "" and "the worker died" in found[3]


def test_a_grid_without_both_forms_says_what_to_turn_on(tmp_path, folder):
    recipes = {"published": {"data.bundled_forms": "published"}}
    grid = load_grid(written(tmp_path, folder, recipes=recipes))
    assert not grid.config(grid.cells[0]).evaluation.forms
    error = run_grid(grid, tmp_path / "run")["error"].item()
    assert "all of one form: turn evaluation.forms on" in error


def test_a_profile_without_a_grid_takes_the_ablations():
    assert {c.name for c in grid_for(load_config("llama-3-8b")).cells} == {
        c.name for c in load_grid("ablations").cells
    }
    assert load_config("llama-3-8b").methods


def test_what_a_run_changes_of_its_profile_holds_for_the_cells_of_its_grid(tmp_path):
    """Else the grid of a run on a model of one's own was one on the profile's."""
    asked = {"model.name": "own", "align.max_steps": 5, "model.precision": "fp32"}
    config = load_config("quick", overrides=asked)
    for cell in (grid := grid_for(config)).cells:
        found = grid.config(cell)
        assert found.model.name == "own" and found.align.max_steps == 5
        assert found.model.precision == load_config("quick").model.precision
    plain = load_grid("quick")
    assert grid_for(load_config("quick")).shared == plain.shared
    other = SimpleNamespace(config=load_config("llama-3-8b", overrides=asked), root=tmp_path)
    with pytest.raises(DCRError, match='--overrides "model.name=own,align.max_steps=5" runs it'):
        table_entry("ablations").make(other)


def test_a_large_grid_is_never_run_for_a_table_unasked(tmp_path):
    asked = SimpleNamespace(config=load_config("llama-3-8b"), root=tmp_path)
    with pytest.raises(DCRError, match="dcr grid ablations --profile llama-3-8b --run-dir"):
        table_entry("ablations").make(asked)
    assert not list(tmp_path.iterdir())
    grid = grid_for(asked.config)
    path = grid.row_path(tmp_path, grid.cells[0], "screen")
    path.parent.mkdir(parents=True)
    path.write_text('{"status": "done", "error": "", "probe_auroc": 0.5}')
    assert list(table_entry("ablations").make(asked)["status"][:2]) == ["done", "missing"]


def test_no_process_at_all_is_refused():
    with pytest.raises(DCRError, match="jobs=0: give"):
        list(run_all(task, [0, 1], jobs=0))


def test_a_row_belongs_to_its_whole_grid(tmp_path, folder):
    """All cells share one ledger, so another cell's sources may change a cell's prompts."""
    paths = set()
    for other in ({}, {"data.toxic": "pairs-toxic"}):
        recipes = {"a": {}, "b": other}
        grid = load_grid(written(tmp_path, folder, recipes=recipes))
        paths.add(grid.row_path(tmp_path, grid.cells[0], "screen"))
    assert len(paths) == 2


def test_a_row_belongs_to_the_files_that_it_was_read_from(tmp_path, folder):
    copied = shutil.copytree(folder, tmp_path / "model")
    prompts = tmp_path / "toxic.csv"
    prompts.write_text("text\nPick a lock\n")
    recipes = {"a": {"data.toxic": str(prompts)}, "gone": {"model.name": str(tmp_path / "none")}}

    def place():
        grid = load_grid(written(tmp_path, copied, recipes=recipes))
        return grid.row_path(tmp_path, grid.cells[0], "screen")

    paths = [place(), place()]
    prompts.write_text("text\nPick two locks\n")
    paths.append(place())
    (copied / "config.json").write_text((copied / "config.json").read_text() + " ")
    paths.append(place())
    assert paths[0] == paths[1] and len(set(paths)) == 3
