"""What both stages share: micro-batches, memory, faults and resume, work folders, processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file
from tiny_training import ALIGN, GENERAL, LAUNCH, REFINE, aligned, mix, refined, texts, weights

from dcr.data.files import measured_peak, read_jsonl
from dcr.errors import DCRError
from dcr.train import align as alignment
from dcr.train import loop, record
from dcr.train.adapters import Lora, train_blocks
from dcr.train.align import AlignTrainer, AnswerModel
from dcr.train.examples import Examples
from dcr.train.losses import ContrastiveLoss

TRAJECTORY = Path(__file__).parent / "data" / "trajectory.json"
STAGES = {"refine": refined, "align": aligned}
SETTINGS = {"refine": REFINE, "align": ALIGN}


# ---- one step, however it is cut up ----


def step_of(batches: list[list[int]], max_tokens: int, folder: Path, accumulate=None) -> dict:
    """History of one optimiser step of stage 2 over given batches, with its gradient norm."""
    rows = Examples(mix(), make_tokenizer(), ALIGN)
    config = ALIGN.replaced(max_tokens_per_batch=max_tokens, lr=0.0)
    model = train_blocks(make_model(), 0, 4, Lora(0, 1))
    plan = loop.Plan("align", config, [batches], folder, False, 0, "fp32")
    return AlignTrainer(AnswerModel(model), rows, plan).fit()[0]


def test_one_of_eight_is_eight_of_one_and_any_cut_between(tmp_path):
    rows = [3, 8, 1, 14, 5, 6, 11, 0]
    whole, *others = (
        step_of(batches, tokens, tmp_path / str(i))
        for i, (batches, tokens) in enumerate(
            [
                ([rows], 0),
                ([[r] for r in rows], 0),
                ([rows[:3], rows[3:]], 0),
                ([rows], 1),
                ([rows], 45),
            ]
        )
    )
    for other in others:
        assert other["tokens"] == whole["tokens"]
        assert other["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_the_reference_trajectory(stage):
    """Loss and gradient norm a step of a tiny model, as committed (write_trajectory makes it)."""
    for row, wanted in zip(
        STAGES[stage]().history, json.loads(TRAJECTORY.read_text())[stage], strict=True
    ):
        assert {k: row[k] for k in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-9), row["step"]


def test_the_history_tells_the_rate_that_a_step_was_taken_at(tmp_path):
    config = ALIGN.replaced(max_steps=4, lr=1e-2, schedule="linear")
    rates = [row["lr"] for row in aligned(config=config, work_dir=tmp_path).history]
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    warm = aligned(config=config.replaced(warmup=0.5, schedule="constant")).history
    assert [row["lr"] for row in warm] == pytest.approx([0.0, 5e-3, 1e-2, 1e-2])


def write_trajectory() -> None:
    """`PYTHONPATH=tests python -c "from test_training_loop import *; write_trajectory()"`."""
    names = ("loss", "grad_norm")
    rows = {s: [{k: r[k] for k in names} for r in train().history] for s, train in STAGES.items()}
    TRAJECTORY.write_text(json.dumps(rows, indent=1) + "\n")


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_without_memory_the_batch_is_halved_once_then_one_clear_error(
    stage, accumulation, monkeypatch, caplog
):
    room = {"tokens": 60}
    forward = torch.nn.Embedding.forward

    def scarce(self, ids):
        if ids.numel() > room["tokens"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, ids)

    config = (
        SETTINGS[stage].replaced(batch_size=8, max_steps=2, eval_steps=2)
        if stage == "refine"
        else ALIGN
    ).replaced(accumulation=accumulation)
    whole = STAGES[stage](config=config).history
    monkeypatch.setattr(torch.nn.Embedding, "forward", scarce)
    monkeypatch.setattr(
        "dcr.train.contrast.HeldOutWatcher.measure", lambda self, step: {"cross_similarity": 1.0}
    )
    cut = STAGES[stage](config=config).history
    assert caplog.text.count("out of memory; from now on") == 1
    assert [r["loss"] for r in cut] == pytest.approx([r["loss"] for r in whole], rel=1e-4)
    room["tokens"] = 5
    with pytest.raises(
        DCRError, match=rf"{stage}: out of memory with .*Lower {stage}.max_tokens_per_batch"
    ):
        STAGES[stage](config=config)


def test_training_stays_on_the_models_device_with_one_gpu_a_process(tmp_path, monkeypatch):
    """Two visible GPUs do not become DataParallel, and cuda:1 is not moved to cuda:0."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(loop.StageArguments, "own", torch.device("cuda:1"))
    args = loop.Plan("align", ALIGN, [[[0]]], tmp_path, False, 0, "fp32").arguments()
    assert (
        args.device == torch.device("cuda:1") and args.n_gpu == 1 and not args.place_model_on_device
    )
    assert args.optim == "adamw_torch_fused"


def test_a_small_stage_behind_a_big_one_needs_less_memory():
    with measured_peak() as big:
        block = np.ones(60_000_000)  # 458 MiB
        time.sleep(0.1)
    del block
    with measured_peak() as small:
        time.sleep(0.1)
    assert small.mib()["peak_memory_mib"] < big.mib()["peak_memory_mib"] - 300
    with measured_peak() as outer, measured_peak() as inner:
        block = np.ones(60_000_000)
        time.sleep(0.1)
    del block
    assert min(p.mib()["peak_memory_mib"] for p in (outer, inner)) > small.largest + 300


# ---- faults ----


@pytest.fixture
def every_step(monkeypatch):
    """A resume point behind every step."""
    monkeypatch.setattr(record, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(record, "SAVE_SHARE", float("inf"))


def test_nan_stops_with_its_step_and_names_the_last_good_point(tmp_path, monkeypatch, every_step):
    loss, calls = ContrastiveLoss.forward, []

    def poisoned(self, hidden, labels):
        calls.append(1)
        return loss(self, hidden, labels) * (float("nan") if len(calls) == 10 else 1.0)

    monkeypatch.setattr(ContrastiveLoss, "forward", poisoned)
    config = REFINE.replaced(max_steps=8, accumulation=2)
    with pytest.raises(DCRError) as caught:
        refined(config=config, work_dir=tmp_path)
    point = tmp_path / "checkpoint-4"
    assert "refine: the loss became nan at step 5 of 8 (rows [" in str(caught.value)
    assert f"The resume point {point} is good. Lower refine.lr." in str(caught.value)
    assert all(torch.isfinite(v).all() for v in load_file(point / loop.WEIGHTS).values())
    with pytest.raises(DCRError) as caught:
        calls.clear()
        refined(config=config, precision="bf16")  # nothing is kept: no path that does not exist
    assert "resume point" not in str(caught.value)
    assert str(caught.value).endswith('Lower refine.lr, or pass precision="fp32".')


def test_weights_that_are_not_finite_never_become_a_resume_point(tmp_path, monkeypatch, every_step):
    monkeypatch.setattr(loop, "trained_state", lambda model: {"w": torch.tensor([1.0, np.nan])})
    with pytest.raises(DCRError, match="weights are no longer finite at step 1 of 6"):
        refined(work_dir=tmp_path)
    assert not list(tmp_path.glob(f"checkpoint-*/{loop.WEIGHTS}"))


@pytest.mark.parametrize("what", ["weights", "optimiser"])
def test_a_full_disk_keeps_the_last_resume_point(what, tmp_path, monkeypatch, every_step):
    """Saving fails at step 4: step 3 survives, and going on from it ends at the same weights."""
    whole = weights(aligned(work_dir=tmp_path / "whole").model)

    def full(save):
        def fails(value, path, *args, **kwargs):
            if "checkpoint-4" in str(path):
                Path(path).write_bytes(b"half")
                raise OSError(28, "No space left on device")
            return save(value, path, *args, **kwargs)

        return fails

    target = (loop, "save_file") if what == "weights" else (torch, "save")
    monkeypatch.setattr(*target, full(getattr(*target)))
    with pytest.raises(DCRError, match="step 4 could not be saved.*No space.*from checkpoint-3"):
        aligned(work_dir=tmp_path / "cut")
    monkeypatch.undo()
    again = weights(aligned(work_dir=tmp_path / "cut").model)
    assert all(torch.equal(whole[n], w) for n, w in again.items())


SLOW = """
import sys, time
sys.path.insert(0, {tests!r})
from test_training_loop import *
begin = loop.Recorder.on_step_begin
loop.Recorder.on_step_begin = lambda self, *a, **k: (time.sleep(0.15), begin(self, *a, **k))[1]
record.SAVE_SECONDS = 0.3
print("ready", flush=True)
long_stage({stage!r}, {folder!r})
"""


def long_stage(stage: str, folder):
    """12 steps with what has a random state: dropout, retention, a schedule."""
    if stage == "refine":
        config = REFINE.replaced(max_steps=12, retention=0.5)
        return refined(config=config, work_dir=folder, general=GENERAL)
    config = ALIGN.replaced(max_steps=12, lora_dropout=0.1, schedule="cosine", checkpoints="last")
    return aligned(config=config, work_dir=folder)


STOPS = [(s, n) for s in STAGES for n in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize(
    "stage, number",
    [STOPS[0], *(pytest.param(*s, marks=pytest.mark.slow) for s in STOPS[1:])],
)
def test_a_stopped_stage_goes_on_to_the_same_weights(stage, number, tmp_path):
    """Points go by time, so that a short stage survives too; a polite signal leaves one at once."""
    script = SLOW.format(tests=os.path.dirname(__file__), stage=stage, folder=str(tmp_path / "cut"))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    history, deadline = tmp_path / "cut" / "history.jsonl", time.time() + 100
    while len(read_jsonl(history)) < 5 and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    asked = time.time()
    _, errors = process.communicate(timeout=60)
    done = len(read_jsonl(history))
    points = [int(p.name.split("-")[1]) for p in loop.whole_checkpoints(tmp_path / "cut")]
    assert 5 <= done < 12 and 0 < len(points) <= 2 and points[-1] >= done - 3, errors[-2000:]
    if number != signal.SIGKILL:
        assert time.time() - asked < 5 and points[-1] == done
        assert process.returncode in (-number, 1, 130) and f"stopped at step {done}" in errors
    resumed, whole = long_stage(stage, tmp_path / "cut"), long_stage(stage, tmp_path / "whole")
    first, second = weights(resumed.model), weights(whole.model)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert [r["step"] for r in read_jsonl(history)] == list(range(1, 13))
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in whole.history]


@pytest.mark.parametrize("left", [None, b"", b"{", b"null"])
def test_a_resume_point_cut_off_while_saving_is_set_aside(left, tmp_path, every_step):
    config = REFINE.replaced(max_steps=2)
    whole = weights(refined(config=config, work_dir=tmp_path).model)
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    state.unlink()
    if left is not None:
        state.write_bytes(left)
    again = weights(refined(config=config, work_dir=tmp_path).model)
    assert (tmp_path / "broken-checkpoint-2").is_dir()
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()
    assert all(torch.equal(whole[n], again[n]) for n in whole)


def test_a_clock_that_goes_backwards_loses_no_resume_point(tmp_path, monkeypatch, every_step):
    aligned(work_dir=tmp_path)
    kept = [p.name for p in loop.whole_checkpoints(tmp_path)]
    assert kept == ["checkpoint-5", "checkpoint-6"]  # by number, whatever their times


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model": make_model(seed=5)}, "model"),
        ({"seed": 2}, "seed"),
        ({"precision": "bf16"}, "precision"),
        ({"config": {"lr": 1e-3}}, "config"),
        ({"data": True}, "(mix|prompts)"),
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_work_folder_of_another_training_is_refused(stage, change, named, tmp_path):
    short = SETTINGS[stage].replaced(max_steps=1)
    STAGES[stage](config=short, work_dir=tmp_path)
    other = {**change, "config": short.replaced(**change.get("config", {}))}
    if other.pop("data", False):
        other |= {"rows": mix(14)} if stage == "align" else texts(18)
    with pytest.raises(
        DCRError, match=f"holds a training of another {named}. Choose another work_dir"
    ):
        STAGES[stage](**other, work_dir=tmp_path)


def test_a_work_folder_of_the_other_stage_is_refused(tmp_path):
    refined(config=REFINE.replaced(max_steps=1), work_dir=tmp_path)
    with pytest.raises(DCRError, match="holds a training of another stage"):
        aligned(config=ALIGN.replaced(max_steps=1), work_dir=tmp_path)


def test_a_work_folder_of_another_list_of_blocks_is_refused(tmp_path):
    aligned(config=ALIGN.replaced(max_steps=1), work_dir=tmp_path)
    with pytest.raises(DCRError, match="another layers_path"):
        aligned(config=ALIGN.replaced(max_steps=1), work_dir=tmp_path, layers_path="model.layers")


def test_a_tokenizer_with_another_template_is_another_model(tmp_path):
    aligned(config=ALIGN.replaced(max_steps=1), work_dir=tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|end|> ")
    with pytest.raises(DCRError, match="another model"):
        alignment.align(
            make_model(),
            tokenizer,
            mix(),
            config=ALIGN.replaced(max_steps=1),
            seed=1,
            precision="fp32",
            work_dir=tmp_path,
        )


# ---- several processes ----


TWO = """
import sys
sys.path.insert(0, {tests!r})
from test_training_loop import *
from test_training_loop import in_processes
in_processes(Path(sys.argv[1]))
"""
WIDE = REFINE.replaced(batch_size=32, max_steps=3, eval_steps=1)
CASES = {
    "general": (
        refined,
        dict(config=WIDE.replaced(general_share=0.25), general=GENERAL, **texts(40)),
    ),
    "retention": (
        refined,
        dict(config=WIDE.replaced(loss="supcon", retention=0.5), general=GENERAL, **texts(40)),
    ),
    "whole": (refined, dict(config=WIDE.replaced(lora_rank=0), **texts(40))),
    # 11 rows in batches of 8: short batches of 3 in mid-schedule, and steps with one row for two
    "ragged": (aligned, dict(config=ALIGN.replaced(batch_size=8, max_steps=5), rows=mix(11))),
    "lonely": (aligned, dict(config=ALIGN.replaced(batch_size=1, max_steps=3), rows=mix(4))),
    "accumulated": (
        aligned,
        dict(config=ALIGN.replaced(batch_size=4, accumulation=2, max_steps=3), rows=mix(11)),
    ),
}


def in_processes(folder: Path) -> None:
    """Each case in a folder of its own; the first process keeps weights and history."""
    for name, (train, options) in CASES.items():
        result = train(**options, work_dir=folder / name)
        if int(os.environ.get("RANK", 0)) == 0:
            size = int(os.environ.get("WORLD_SIZE", 1))
            torch.save([weights(result.model), result.history, size], folder / name / "out.pt")


@pytest.mark.slow
def test_two_processes_equal_one_at_the_same_global_batch(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO.format(tests=os.path.dirname(__file__)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for name, command in (("one", [sys.executable]), ("two", LAUNCH)):
        done = subprocess.run(
            [*command, str(script), str(tmp_path / name)],
            capture_output=True,
            text=True,
            timeout=400,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    for name in CASES:
        (one, history, alone), (two, history2, together) = (
            torch.load(tmp_path / n / name / "out.pt", weights_only=True) for n in ("one", "two")
        )
        assert (alone, together) == (1, 2)
        assert [r["tokens"] for r in history] == [r["tokens"] for r in history2], name
        for key in ("loss", "grad_norm"):
            assert [r[key] for r in history2] == pytest.approx(
                [r[key] for r in history], rel=1e-3
            ), name
        for parameter, value in one.items():
            torch.testing.assert_close(
                two[parameter], value, rtol=1e-3, atol=1e-3, msg=f"{name} {parameter}"
            )
