"""The run directory: keys, reuse, damage, full disks, kills, two processes, moves, clocks."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dcr.data.files import content_key
from dcr.errors import DCRError
from dcr.run import store as store_module
from dcr.run.store import Store

BUILDER = """
import sys, time
from pathlib import Path
from dcr.run.store import Store

def build(folder):
    with open({log!r}, "a") as out:
        out.write("built ")
    (folder / "mark").write_text("x")
    Path({log!r}).with_name("inside").touch()
    time.sleep({sleep})

Store({root!r}).get("stage", "a", {{}}, build)
"""


def start(tmp_path, sleep):
    code = BUILDER.format(log=str(tmp_path / "log"), root=str(tmp_path / "run"), sleep=sleep)
    return subprocess.Popen([sys.executable, "-c", code])


def write(folder, text="hi"):
    (folder / "x.txt").write_text(text)
    return {"rows": 3}


def stray(root):
    return [p for p in root.rglob("*") if p.suffix in (".lock", ".partial", ".tmp")]


def test_key_ignores_order_and_sees_every_value():
    assert content_key({"a": 1, "b": [1, 2]}) == content_key({"b": [1, 2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    with pytest.raises(DCRError, match="plain values"):
        content_key({"a": object()})


def test_second_call_computes_nothing_and_says_so(tmp_path):
    calls = []

    def build(folder):
        calls.append(1)
        return write(folder)

    artifact = Store(tmp_path).get("stage", "a", {"p": 1}, build)
    again = Store(tmp_path)
    assert again.get("stage", "a", {"p": 1}, build).path == artifact.path
    assert len(calls) == 1 and (again.computed, len(again.reused)) == ([], 1)
    assert artifact.manifest["rows"] == 3 and "x.txt" in artifact.manifest["outputs"]
    assert artifact.manifest["environment"]["packages"]["torch"] and not stray(tmp_path)
    Store(tmp_path).get("stage", "a", {"p": 2}, build)
    assert len(calls) == 2
    with pytest.raises(DCRError, match="stage/a-.* is not in"):
        Store(tmp_path, complete=True).get("stage", "a", {"p": 3}, build)


def test_a_failed_build_leaves_no_artifact_but_keeps_its_work(tmp_path):
    def fail(folder):
        (folder / "half.txt").write_text("half")
        raise RuntimeError("boom")

    store = Store(tmp_path)
    with pytest.raises(RuntimeError):
        store.get("stage", "a", {}, fail)
    with pytest.raises(ZeroDivisionError):
        store.get("stage", "b", {}, lambda folder: 1 / 0)
    assert [p.suffix for p in (tmp_path / "stage").iterdir()] == [".partial"]
    seen = []
    store.get("stage", "a", {}, lambda folder: seen.extend(p.name for p in folder.iterdir()))
    assert seen == ["half.txt"] and not stray(tmp_path)


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "gone", "manifest", "no manifest text", "a list"]
)
def test_a_damaged_artifact_is_computed_again_with_a_warning(tmp_path, caplog, damage):
    artifact = Store(tmp_path).get("stage", "a", {}, lambda f: write(f, "sound weights"))
    path, manifest = artifact.path / "x.txt", artifact.path / "manifest.json"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    {
        "flip": lambda: path.write_bytes(bytes(content)),
        "cut": lambda: path.write_text("sound"),
        "gone": path.unlink,
        "manifest": lambda: manifest.write_text(
            manifest.read_text().replace('rows": 3', 'rows": 7')
        ),
        "no manifest text": lambda: manifest.write_text("{"),
        "a list": lambda: manifest.write_text("[1]"),
    }[damage]()
    calls = []
    again = Store(tmp_path).get(
        "stage", "a", {}, lambda f: (calls.append(1), write(f, "sound weights"))[1]
    )
    assert calls == [1] and again.path == artifact.path and not again.broken()
    assert path.read_text() == "sound weights" and "is computed again" in caplog.text
    assert not stray(tmp_path)


def test_what_is_finished_is_listed_and_what_cannot_be_read_is_named(tmp_path):
    one = Store(tmp_path).get("stage", "a", {}, write)
    killed = one.path.with_name(one.path.name + ".partial")  # just before its rename
    shutil.copytree(one.path, killed)
    assert Store(tmp_path).artifacts() == [one]
    (one.path / "manifest.json").write_text("{")
    with pytest.raises(DCRError, match="stage/a-.*manifest.json cannot be read.*Delete"):
        [artifact.manifest for artifact in Store(tmp_path).artifacts()]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("where", ["mkdir", "build", "behind another error", "rename"])
def test_a_disk_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch, code, where):
    def full(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    def build(folder):
        if where == "build":
            full()
        if where == "behind another error":
            try:
                full()
            except OSError as error:
                raise RuntimeError("unexpected pos 0 vs 4") from error
        return write(folder)

    with monkeypatch.context() as patch:
        if where == "mkdir":
            patch.setattr(store_module.Path, "mkdir", full)
        if where == "rename":
            patch.setattr(store_module.os, "replace", full)
        with pytest.raises(DCRError, match="could not be written.*[Ff]ree space"):
            Store(tmp_path).get("stage", "a", {}, build)
    assert Store(tmp_path).get("stage", "a", {}, write).manifest["rows"] == 3
    assert not stray(tmp_path)


def test_a_run_directory_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DCRError, match="Not a directory"):
        Store(tmp_path / "file" / "run").get("stage", "a", {}, write)


def test_an_error_about_another_file_stays_what_it_is(tmp_path):
    def build(folder):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/model.safetensors")

    with pytest.raises(PermissionError):
        Store(tmp_path).get("stage", "a", {}, build)


def test_two_processes_build_once(tmp_path):
    both = [start(tmp_path, 0.6), start(tmp_path, 0.6)]
    assert [p.wait() for p in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "built " and not stray(tmp_path)


def test_a_killed_holder_does_not_block_the_next(tmp_path):
    first = start(tmp_path, 60)
    while not (tmp_path / "inside").exists():
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    began = time.monotonic()
    assert start(tmp_path, 0).wait() == 0 and time.monotonic() - began < 20
    assert (tmp_path / "log").read_text() == "built built " and not stray(tmp_path)


def test_a_moved_or_copied_run_directory_is_reused(tmp_path):
    Store(tmp_path / "run").get("stage", "a", {}, write)
    shutil.copytree(tmp_path / "run", tmp_path / "a copy, ünïcode")
    (tmp_path / "run").rename(tmp_path / "moved")
    for name in ("moved", "a copy, ünïcode"):
        store = Store(tmp_path / name)
        store.get("stage", "a", {}, lambda folder: pytest.fail("computed again"))
        assert (store.computed, len(store.reused)) == ([], 1)


def test_a_clock_that_goes_backwards_is_harmless(tmp_path, monkeypatch):
    hours = iter(range(10**6, 0, -3600))
    monkeypatch.setattr(store_module.time, "time", lambda: next(hours))
    first = Store(tmp_path).get("stage", "a", {}, write)
    assert 0 <= first.manifest["seconds"] < 60
    Store(tmp_path).get("stage", "a", {}, lambda folder: pytest.fail("computed again"))


@pytest.mark.parametrize("tracked", [True, False])
def test_the_commit_is_that_of_the_kit_not_of_what_it_is_installed_in(
    tmp_path, monkeypatch, tracked
):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], capture_output=True)
        return done.stdout.decode().strip()

    file = tmp_path / ".venv" / "dcr" / "run" / "store.py"
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / ".gitignore").write_text("" if tracked else ".venv")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "theirs")
    monkeypatch.setattr(store_module, "__file__", str(file))
    store_module.environment.cache_clear()
    found = store_module.environment()["git_commit"]
    store_module.environment.cache_clear()
    assert found == (git("rev-parse", "HEAD") if tracked else "unknown") != ""
