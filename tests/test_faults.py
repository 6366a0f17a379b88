"""A run that is killed, stopped, starved of disk, shared or moved goes on to the same tables, byte
for byte."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

OVERRIDES = (
    "refine.layer=2,refine.max_steps=6,refine.batch_size=8,refine.lora_rank=2,align.max_steps=6,"
    "align.lora_rank=2,align.batch_size=8,align.checkpoints=[0,3],generation.max_new_tokens=2,"
    "model.precision=fp32,data.limit=3,data.curve_limit=12"
)
KILLS = int(os.environ.get("DCR_TEST_KILLS", "30"))
STOPS = 6
CONTEXT = multiprocessing.get_context("forkserver")  # runs begin with the libraries imported
CONTEXT.set_forkserver_preload(
    ["transformers", "dcr.cli", "dcr.study.experiment", "dcr.train.align", "dcr.train.refine"]
    + ["dcr.analysis.refusal", "dcr.data.sets", "dcr.lm.generate", "dcr.evaluate.judges"]
    + ["transformers.models.llama.modeling_llama", "peft", "dcr.tables", "dcr.plots"]
)


def run(log, arguments, environment, largest, slow, alone):
    """In a process of its own: `dcr` with two tables that read all answers and scores."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(2, 1)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent does with it
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    if alone:
        os.setsid()
    from dcr.cli import main
    from dcr.study import registry
    from dcr.train.loop import Recorder

    registry.load_all()
    registry.TABLES.clear()
    for name in ("verdicts", "scores"):
        registry.table(name)(
            lambda e, name=name: pd.concat([getattr(r, name)(m) for r in e.runs for m in e.methods])
        )
    if slow:
        begin = Recorder.on_step_begin
        Recorder.on_step_begin = lambda *a, **k: (time.sleep(0.5), begin(*a, **k))[1]
    sys.argv = ["dcr", *arguments]
    sys.stdout = sys.stderr = open(2, "w", closefd=False)
    main()


class Started:
    """A run in the background."""

    count = 0

    def __init__(self, folder, root, *more, overrides=OVERRIDES, cache="", **how):
        Started.count += 1
        self.log = Path(root).parent / f"log-{Started.count}"
        if Path(root).parent.is_mount():  # its disk is full
            self.log = Path(root).parent.with_suffix(f".log-{Started.count}")
        arguments = ["run", "--profile", "quick", "--run-dir", str(root), *more]
        arguments += ["--overrides", f"{overrides},model.name={folder}"]
        options = {"largest": 0, "slow": False, "alone": False, **how}
        environment = {"DCR_CACHE_DIR": str(cache)} if cache else {}
        given = (str(self.log), arguments, environment, *options.values())
        self.process = CONTEXT.Process(target=run, args=given)
        self.process.start()

    def wait(self, seconds=600.0):
        """Its exit status, or None where it goes on."""
        self.process.join(seconds)
        return self.process.exitcode

    def stop(self, number=signal.SIGKILL):
        os.kill(self.process.pid, number)
        return self.wait()

    def said(self):
        text = self.log.read_text()
        assert "Traceback" not in text, text[-3000:]
        return text.strip()


def tables(root):
    return {p.name: p.read_bytes() for p in (root / "tables").glob("*.csv")}


def stray(root):
    names = (".lock", ".partial", ".tmp")
    found = [p for p in root.rglob("*") if p.name.endswith(names) or p.name.startswith("part-")]
    return found + list(root.rglob("checkpoint-*")) + list(root.rglob("broken-*"))


def ends_as(whole, root, started):
    """The run ends well, with the tables of the undisturbed one and no file beside."""
    assert started.wait() == 0, started.said()
    assert set(tables(root)) == {"verdicts.csv", "scores.csv"}
    assert tables(root) == tables(whole[0]) and not stray(root)
    return started.said()


def patience():
    """The five seconds of a machine that has nothing else to do."""
    return 5 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The undisturbed run, and how long it takes."""
    root = tmp_path_factory.mktemp("whole") / "run"
    Started(folder, root.with_name("first"), "--methods", "base", "--no-tables").wait()
    began = time.monotonic()
    ends_as((root,), root, Started(folder, root))
    return root, time.monotonic() - began


def disturbed(folder, whole, tmp_path, times, disturb):
    """`disturb` a run at so many random moments; where it got to its end, the next begins anew."""
    draws, hit, ends = random.Random(0), 0, 0
    while hit < times or not ends:
        root = tmp_path / f"run {ends}"
        started = Started(folder, root)
        if hit < times and started.wait(draws.uniform(0.02, 1.0) * whole[1]) is None:
            disturb(started)
            hit += 1
        else:
            ends_as(whole, root, started)
            ends += 1
    print(f"{hit} times disturbed, {ends} runs to their end, {whole[1]:.0f} s the undisturbed one")


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_kills_at_random_moments(folder, whole, tmp_path):
    disturbed(folder, whole, tmp_path, KILLS, Started.stop)


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_stops_at_random_moments(folder, whole, tmp_path):
    numbers = [signal.SIGTERM, signal.SIGINT] * STOPS

    def stop(started):
        began = time.monotonic()
        status = started.stop(numbers.pop())
        assert status in (0, 130) and time.monotonic() - began < patience(), started.said()
        if status:
            assert started.said().endswith("dcr: stopped. The same command goes on where it was.")

    disturbed(folder, whole, tmp_path, STOPS, stop)


def training(started, root):
    """Wait until stage 2 has written a step."""
    while not list(root.glob("align/*.partial/history.jsonl")):
        time.sleep(0.1)
        assert started.process.is_alive(), started.said()


@pytest.mark.slow
def test_a_stop_takes_the_worker_processes_along(folder, tmp_path):
    overrides = OVERRIDES.replace("align.max_steps=6", "align.max_steps=100000")
    more, root = ("--jobs", "2", "--methods", "base,STL"), tmp_path / "run"
    started = Started(folder, root, *more, overrides=overrides, alone=True)
    training(started, root)
    began = time.monotonic()
    assert started.stop(signal.SIGTERM) == 130
    assert started.said().endswith("goes on where it was.")
    while time.monotonic() < began + 2 * patience():
        try:
            os.killpg(started.process.pid, 0)  # somebody of its session is alive
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(started.process.pid, signal.SIGKILL)
    pytest.fail("worker processes go on")


@pytest.mark.slow
def test_a_run_killed_every_few_seconds_gets_to_its_end(folder, tmp_path):
    """40 steps of half a second, killed eight seconds after training has begun or gone on."""
    overrides = OVERRIDES.replace("align.max_steps=6", "align.max_steps=40")
    root, kills = tmp_path / "run", 0

    def written():
        found = root.glob("align/STL-*.partial/history.jsonl")
        return max((p.stat().st_mtime_ns for p in found), default=0)

    while True:
        before = written()
        more = ("--methods", "STL", "--no-tables")
        started = Started(folder, root, *more, overrides=overrides, slow=True)
        while started.process.is_alive() and written() == before:
            time.sleep(0.2)
        if started.wait(8) is not None:
            break
        started.stop()
        kills += 1
        assert kills < 10, "no progress"
    assert started.wait() == 0 and kills and not stray(root)


@pytest.mark.slow
def test_twice_from_scratch_gives_the_same_bytes(folder, whole, tmp_path):
    """Not tables alone: weights, answers, verdicts and scores too."""
    ends_as(whole, tmp_path / "run", Started(folder, tmp_path / "run"))

    def made(root):
        found = {}
        for path in root.glob("*/*-*/manifest.json"):
            outputs = json.loads(path.read_text())["outputs"]
            timed = ("history.jsonl", "evaluations.jsonl")
            found[path.parent.name] = {
                n: s for n, s in outputs.items() if Path(n).name not in timed
            }
        return found

    assert len(made(tmp_path / "run")) > 10 and made(tmp_path / "run") == made(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("largest", [3_000, 6_150, 10_000])
def test_a_file_that_grows_no_further_is_one_line(folder, whole, tmp_path, largest):
    root = tmp_path / "run"
    started = Started(folder, root, largest=largest)
    assert started.wait() == 2 and "Free space" in started.said()
    assert started.said().splitlines()[-1].startswith("dcr: ")
    ends_as(whole, root, Started(folder, root))  # there is room again


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a small file system, or changes it: mount(options) -> its folder."""
    place = tmp_path / "a small disk"
    place.mkdir()

    def mount(options):
        again = "remount," if place.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_a_disk_that_fills_at_every_kind_of_write(folder, whole, small_disk):
    """The disk grows until the run fits: every time one line, at the end the same tables."""
    size, times = 16, 0  # KiB
    while True:
        root = small_disk(f"size={size}k,nr_inodes=0") / "run"
        started = Started(folder, root)
        if started.wait() == 0:
            break
        assert started.wait() == 2 and "Free space" in started.said(), (size, started.said())
        assert started.said().splitlines()[-1].startswith("dcr: ")
        times, size = times + 1, max(size, shutil.disk_usage(root.parent).used // 1024) + 24
    assert times > 5
    ends_as(whole, root, started)
    print(f"disk full {times} times, {size} KiB at the end")


@pytest.mark.slow
def test_a_read_only_run_directory_is_read_and_what_is_new_refused(folder, whole, small_disk):
    root = small_disk("size=50m") / "run"
    shutil.copytree(whole[0], root)
    small_disk("ro")
    ends_as(whole, root, Started(folder, root))
    started = Started(folder, root, "--seeds", "7")
    assert started.wait() == 2 and "Read-only file system" in started.said() and not stray(root)


@pytest.mark.slow
def test_a_cache_deleted_in_mid_run_is_made_again(folder, whole, tmp_path):
    root, cache = tmp_path / "run", tmp_path / "cache"
    started = Started(folder, root, cache=cache)
    training(started, root)
    assert (cache / "ledger").is_dir()
    shutil.rmtree(cache)
    ends_as(whole, root, started)


@pytest.mark.slow
def test_two_processes_on_one_run_directory(folder, whole, tmp_path):
    for started in [Started(folder, tmp_path / "run") for _ in range(2)]:
        assert started.wait() == 0 and started.said()
    assert tables(tmp_path / "run") == tables(whole[0]) and not stray(tmp_path)


@pytest.mark.slow
def test_a_cut_model_in_a_moved_run_directory_is_made_again(folder, whole, tmp_path):
    root = tmp_path / "moved run"
    shutil.copytree(whole[0], root)
    shutil.rmtree(root / "tables")
    adapter = next((root / "align").glob("STL-*")) / "model" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-40])
    said = ends_as(whole, root, Started(folder, root))
    assert "adapter_model.safetensors has changed" in said
