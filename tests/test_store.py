"""Content keys, atomic writes, resume after a kill, and locks between processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dcr.data.files import append_jsonl, content_key, read_jsonl, write_atomic
from dcr.errors import DCRError
from dcr.run import store as store_module
from dcr.run.store import Store


def test_key_ignores_order_and_sees_every_value():
    assert content_key({"a": 1, "b": [1, 2]}) == content_key({"b": [1, 2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    with pytest.raises(DCRError, match="plain values"):
        content_key({"a": object()})


def test_second_call_computes_nothing_and_says_so(tmp_path):
    calls = []

    def build(folder):
        calls.append(1)
        (folder / "x.txt").write_text("hi")
        return {"rows": 3}

    first = Store(tmp_path)
    artifact = first.get("stage", "a", {"p": 1}, build)
    again = Store(tmp_path)
    assert again.get("stage", "a", {"p": 1}, build).path == artifact.path
    assert len(calls) == 1 and again.summary() == "0 artifacts computed, 1 reused"
    assert artifact.manifest["rows"] == 3 and "x.txt" in artifact.manifest["outputs"]
    assert artifact.manifest["environment"]["packages"]["torch"]
    Store(tmp_path).get("stage", "a", {"p": 2}, build)
    assert len(calls) == 2


def test_a_failed_build_leaves_no_artifact_but_keeps_its_work(tmp_path):
    def fail(folder):
        (folder / "half.txt").write_text("half")
        raise RuntimeError("boom")

    store = Store(tmp_path)
    with pytest.raises(RuntimeError):
        store.get("stage", "a", {}, fail)
    seen = []
    store.get("stage", "a", {}, lambda folder: seen.extend(p.name for p in folder.iterdir()))
    assert seen == ["half.txt"]


def test_atomic_write_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomic(path, "old")

    def full(_fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(DCRError, match="x.json.*No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_jsonl_survives_a_torn_last_line_only(tmp_path):
    path = tmp_path / "h.jsonl"
    append_jsonl(path, {"step": 1})
    with open(path, "a") as handle:
        handle.write('{"step": 2')
    assert read_jsonl(path) == [{"step": 1}]
    path.write_text('{"step": \n{"step": 2}\n')
    with pytest.raises(DCRError, match="line 1"):
        read_jsonl(path)


SLOW_BUILD = """
import sys, time
from pathlib import Path
from dcr.run.store import Store
def build(folder):
    log = Path(sys.argv[1]) / "builds.txt"
    log.open("a").write("x")
    time.sleep(float(sys.argv[2]))
Store(sys.argv[1]).get("stage", "a", {}, build)
"""


def test_two_processes_build_once(tmp_path):
    workers = [
        subprocess.Popen([sys.executable, "-c", SLOW_BUILD, str(tmp_path), "0.5"]) for _ in range(2)
    ]
    assert [w.wait(60) for w in workers] == [0, 0]
    assert (tmp_path / "builds.txt").read_text() == "x"


def test_a_killed_holder_does_not_block_the_next(tmp_path):
    worker = subprocess.Popen([sys.executable, "-c", SLOW_BUILD, str(tmp_path), "60"])
    while not (tmp_path / "builds.txt").exists():
        time.sleep(0.05)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait(10)
    artifact = Store(tmp_path).get("stage", "a", {}, lambda folder: None)
    assert json.loads((artifact.path / "manifest.json").read_text())["kind"] == "stage"
