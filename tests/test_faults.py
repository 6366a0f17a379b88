"""A run that is killed, starved of disk or shared goes on to the same tables, byte for byte."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
import time

import pytest

OVERRIDES = (
    "refine.layer=2,refine.max_steps=6,refine.batch_size=8,refine.lora_rank=2,align.max_steps=6,"
    "align.lora_rank=2,align.batch_size=8,align.checkpoints=[0,3],generation.max_new_tokens=2,"
    "model.precision=fp32,data.limit=3,data.curve_limit=12"
)
KILLS = int(os.environ.get("DCR_TEST_KILLS", "30"))
# A run whose two tables read answers and scores of all methods, whatever tables the kit has.
RUN = """
import sys
from dcr.run import registry
from dcr.cli import main
registry.load_all()
registry.TABLES.clear()

@registry.table("said")
def said(experiment):
    import pandas as pd
    return pd.concat([r.verdicts(m) for r in experiment.runs for m in experiment.methods])

@registry.table("scored")
def scored(experiment):
    import pandas as pd
    return pd.concat([r.scores(m) for r in experiment.runs for m in experiment.methods])

main()
"""


def start(folder, root, **options):
    command = [sys.executable, "-c", RUN, "run", "--profile", "quick", "--run-dir", str(root)]
    command += ["--overrides", f"{OVERRIDES},model.name={folder}"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def tables(root):
    return {p.name: p.read_bytes() for p in (root / "tables").glob("*.csv")}


def stray(root):
    return [p for p in root.rglob("*") if p.name.endswith((".lock", ".partial", ".tmp"))]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The undisturbed run, and how long it takes."""
    root, began = tmp_path_factory.mktemp("whole"), time.monotonic()
    process = start(folder, root)
    assert not process.communicate(timeout=300)[1].count("Traceback") and not process.returncode
    assert set(tables(root)) == {"said.csv", "scored.csv"}
    return root, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_at_random_moments(folder, whole, tmp_path):
    root, lasts = tmp_path / "a run", whole[1]
    draws = random.Random(0)
    for _ in range(KILLS):
        process = start(folder, root)
        try:
            process.wait(timeout=draws.uniform(0.3, 1.0) * lasts)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    process = start(folder, root)
    process.communicate(timeout=300)
    assert process.returncode == 0 and tables(root) == tables(whole[0]) and not stray(root)


@pytest.mark.slow
@pytest.mark.parametrize("largest", [200, 3_000, 6_150, 10_000])
def test_a_disk_that_takes_no_more_is_one_line(folder, whole, tmp_path, largest):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    process = start(folder, tmp_path / "run", preexec_fn=limit)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 2 and "Free space" in said and "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("dcr: ")
    process = start(folder, tmp_path / "run")  # there is room again
    process.communicate(timeout=300)
    assert process.returncode == 0 and tables(tmp_path / "run") == tables(whole[0])
    assert not stray(tmp_path / "run")


@pytest.mark.slow
def test_two_processes_on_one_run_directory(folder, whole, tmp_path):
    both = [start(folder, tmp_path) for _ in range(2)]
    assert [(p.communicate(timeout=300), p.returncode)[1] for p in both] == [0, 0]
    assert tables(tmp_path) == tables(whole[0]) and not stray(tmp_path)


@pytest.mark.slow
def test_a_cut_model_in_a_moved_run_directory_is_made_again(folder, whole, tmp_path):
    root = tmp_path / "moved run"
    shutil.copytree(whole[0], root)
    shutil.rmtree(root / "tables")
    adapter = next((root / "align").glob("STL-*")) / "model" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-40])
    process = start(folder, root)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and "adapter_model.safetensors has changed" in said
    assert tables(root) == tables(whole[0]) and not stray(root)
