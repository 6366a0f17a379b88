"""Atomic writes and JSON lines."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dcr.data.files import append_jsonl, measured_peak, read_jsonl, write_atomic
from dcr.errors import DCRError


def test_atomic_write_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomic(path, "old")

    def full(_fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DCRError, match="x.json.*No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("content", ["old", "new"])
def test_what_a_killed_process_left_of_a_file_goes_away(tmp_path, content):
    """Also where there is nothing to write; what another process is writing stays."""
    path, node = tmp_path / "x [1].json", platform.node()
    write_atomic(path, "old")
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    lives = tmp_path / f".{path.name}.{node}-{os.getppid()}.tmp"
    other = tmp_path / f".{path.name}.{node}-2-{os.getpid()}.tmp"  # of a machine called NODE-2
    for file in (lives, other):
        file.write_text("half")
    (tmp_path / f".{path.name}.{node}-{int(gone.stdout)}.tmp").write_text("half")
    write_atomic(path, content)
    assert set(tmp_path.iterdir()) == {path, lives, other} and path.read_text() == content


def test_jsonl_survives_a_torn_last_line_only(tmp_path):
    path = tmp_path / "h.jsonl"
    append_jsonl(path, {"step": 1})
    with open(path, "a") as handle:
        handle.write('{"step": 2')
    assert read_jsonl(path) == [{"step": 1}]
    path.write_text('{"step": \n{"step": 2}\n')
    with pytest.raises(DCRError, match="line 1"):
        read_jsonl(path)


@pytest.fixture
def used(monkeypatch):
    """The most that a GPU says was used, in bytes, as a test sets it."""
    used = {"most": 900 * 2**20}
    gpu = SimpleNamespace(
        is_available=lambda: True,
        reset_peak_memory_stats=lambda: used.update(most=0),
        max_memory_allocated=lambda: used["most"],
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=gpu))
    return used


def test_the_gpus_peak_is_set_to_zero_before_every_stage(used):
    with measured_peak() as small:
        used["most"] = max(used["most"], 3 * 2**20)
    assert small.mib()["peak_gpu_mib"] == 3


def test_a_training_within_an_artifact_takes_nothing_from_the_artifacts_peak(used):
    with measured_peak() as artifact:
        used["most"] = 800 * 2**20  # a model is read
        with measured_peak() as training:
            used["most"] = 5 * 2**20
        assert training.mib()["peak_gpu_mib"] == 5
    assert artifact.mib()["peak_gpu_mib"] == 800
