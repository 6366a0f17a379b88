"""How one stage is trained, and what that leaves in its folder: history and resume points.

A training is stopped by a signal behind its running step, and goes on from the last point.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from dcr.data.files import Peak, append_jsonl, content_key, write_atomic
from dcr.errors import DCRError

log = logging.getLogger("dcr")
SAVE_SECONDS = 5.0  # between resume points at least,
SAVE_SHARE = 0.05  # and more where writing them would take a larger share of the time
FLUSH_SECONDS = 2.0  # between readings of the metrics of a GPU, which runs ahead of Python
LONG_STEP = 3.0  # seconds; SIGTERM and Ctrl-C wait for the end of a shorter step only


@dataclass(frozen=True)
class Plan:
    """How one stage is trained. steps: the batches of rows that each optimiser step works on."""

    title: str  # refine or align
    config: Any  # RefineConfig or AlignConfig
    steps: Sequence[list[list[int]]]
    folder: Path  # history and resume points
    keep: bool  # whether the folder stays: then resume points are written
    seed: int
    precision: str  # bf16 (autocast) or fp32

    def rows(self, step: int) -> list[int]:
        """All rows of one step (the first is step 1)."""
        return [row for batch in self.steps[step - 1] for row in batch]

    def arguments(self) -> TrainingArguments:
        """Every number of the library that matters, named here."""
        steps, decay = len(self.steps), getattr(self.config, "schedule", "constant")
        gloo = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available()
        return StageArguments(
            output_dir=str(self.folder),
            max_steps=steps,
            learning_rate=self.config.lr,
            warmup_steps=math.ceil(self.config.warmup * steps),
            lr_scheduler_type="constant_with_warmup" if decay == "constant" else decay,
            weight_decay=getattr(self.config, "weight_decay", 0.0),
            max_grad_norm=1.0,
            optim="adamw_torch_fused" if StageArguments.own.type == "cuda" else "adamw_torch",
            per_device_train_batch_size=1,  # a "batch" of the library is a whole step of ours,
            ignore_data_skip=True,  # found by its number: a resumed run has nothing to skip
            save_strategy="no",  # resume points go by time, see Recorder
            use_cpu=StageArguments.own.type == "cpu",
            ddp_backend="gloo" if gloo else None,
            ddp_find_unused_parameters=False,
            seed=self.seed,
            report_to=[],
            logging_strategy="no",
            logging_nan_inf_filter=False,  # it would wait for the device at every step
            disable_tqdm=True,
        )


class StageArguments(TrainingArguments):
    """The library's arguments, but one device a process: the model's own. Never DataParallel."""

    own = torch.device("cpu")
    n_gpu = property(lambda self: int(self.own.type == "cuda"))
    place_model_on_device = property(lambda self: self.world_size > 1)

    @property
    def device(self) -> torch.device:
        """The model's device; in several processes the one that the launcher gave this one."""
        launched = super().device
        return launched if self.world_size > 1 else self.own


@contextlib.contextmanager
def planned(work_dir: str | Path | None, made_from: dict, **fields) -> Iterator[Plan]:
    """The `Plan` of a training (its other `fields`) in its work folder, or in a temporary one.

    The folder notes what the training is made from, by names that a user knows. Raises DCRError
    naming what differs, where it holds a training of something else.
    """
    keep = work_dir is not None
    with contextlib.nullcontext(str(work_dir)) if keep else tempfile.TemporaryDirectory() as folder:
        plan = Plan(folder=Path(folder), keep=keep, **fields)
        facts = {"config": plan.config.model_dump(), "seed": plan.seed, "precision": plan.precision}
        facts = {"stage": plan.title, **made_from, **facts}
        keys = {name: content_key(value) for name, value in facts.items()}
        note = plan.folder / "made_from.json"
        held = json.loads(note.read_text(encoding="utf-8")) if note.exists() else keys
        changed = [name for name, key in keys.items() if held.get(name) != key]
        if changed:
            raise DCRError(
                f"{folder} holds a training of another {', '.join(changed)}. Choose another "
                "work_dir, or delete it."
            )
        write_atomic(note, json.dumps(keys))
        yield plan


class Recorder(TrainerCallback):
    """A JSON line a step, a log line now and then, resume points by time, at the end, at a signal.

    Metrics stay on the device until they are read, so that a GPU need not wait for Python.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.path = trainer, trainer.plan.folder / "history.jsonl"
        self.rows: list[dict] = []  # read and written
        self.waiting: list[dict] = []  # steps whose metrics have not been read yet
        self.metrics: dict[str, Tensor] = {}  # of the running step
        self.flushed = self.next_save = self.step_seconds = 0.0
        self.peak: Peak

    def on_train_begin(self, args, state, control, **_) -> None:
        """Begin, or go on from what an interrupted training wrote."""
        self.rows = self.trainer.resumed(self.path)
        last = self.rows[-1] if self.rows else {"tokens": 0, "seconds": 0.0}
        self.tokens, self.started = last["tokens"], time.perf_counter() - last["seconds"]
        self.next_save = self._clock() + SAVE_SECONDS

    def on_step_begin(self, args, state, control, **_) -> None:
        """Note the time, and the rate of this step: at its end the next one's is set."""
        self.begun, self.lr = time.perf_counter(), self.trainer.lr_scheduler.get_last_lr()[0]

    def on_step_end(self, args, state, control, **_) -> None:
        """Do what is due behind this step."""
        now, step = time.perf_counter(), state.global_step
        self.step_seconds = now - self.begun
        self.tokens += sum(self.trainer.rows.lengths[r] for r in self.trainer.plan.rows(step))
        row = {"step": step, **self.metrics, "lr": self.lr}
        row |= {"tokens": self.tokens, "seconds": round(now - self.started, 3)}
        self.waiting.append(row)
        control.should_training_stop |= self.trainer.stop_signal > 0 or step == state.max_steps
        due = control.should_training_stop or self._clock() > self.next_save
        if due or args.device.type == "cpu" or now - self.flushed > FLUSH_SECONDS:
            self.flush()
        control.should_save = due and self.trainer.plan.keep
        self.save_begun = time.perf_counter()

    def on_save(self, args, state, control, **_) -> None:
        """Set the time of the next point; the last two are kept."""
        took = time.perf_counter() - self.save_begun
        self.next_save = self._clock() + max(SAVE_SECONDS, took / SAVE_SHARE)
        if args.should_save:  # by step: the library's own rotation trusts the system's clock
            for old in whole_checkpoints(self.trainer.plan.folder)[:-2]:
                shutil.rmtree(old, ignore_errors=True)

    def flush(self) -> None:
        """Read the metrics that wait. Raises DCRError at the first loss that is not finite."""
        for waiting in self.waiting:
            row: Any = {k: v.item() if torch.is_tensor(v) else v for k, v in waiting.items()}
            row["tokens_per_second"] = round(row["tokens"] / max(row["seconds"], 1e-9), 1)
            if not math.isfinite(row["loss"]):
                self.trainer.give_up(f"the loss became {row['loss']}", row["step"])
            self.rows.append(row | self.peak.mib())
            if self.trainer.args.should_save:
                append_jsonl(self.path, self.rows[-1])
            step, steps = row["step"], len(self.trainer.plan.steps)
            if step % max(1, steps // 5) == 0:
                left = row["seconds"] / step * (steps - step)
                what = (self.trainer.plan.title, step, steps, row["loss"], left)
                log.info("%s: step %d of %d, loss %.4f, %.0f s left", *what)
        self.waiting, self.flushed = [], time.perf_counter()

    def _clock(self) -> float:
        """Seconds; the first process's clock in all of them, so that all save at the same step."""
        if self.trainer.args.world_size == 1:
            return time.monotonic()
        now = torch.tensor(time.monotonic() % 1e6, device=self.trainer.args.device)
        torch.distributed.broadcast(now, 0)
        return now.item()


@contextlib.contextmanager
def stopping(trainer: Any) -> Iterator[None]:
    """SIGTERM and Ctrl-C wait for a short step to end; a second one, or a long step, does not."""
    here = threading.current_thread() is threading.main_thread() and trainer.args.world_size == 1
    numbers = (signal.SIGTERM, signal.SIGINT) if here else ()
    before: dict[int, Any] = {s: signal.getsignal(s) or signal.SIG_DFL for s in numbers}

    def stop(number: int, _frame) -> None:
        if trainer.stop_signal or trainer.recorder.step_seconds > LONG_STEP:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        trainer.stop_signal = number

    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if trainer.stop_signal:
        log.warning("%s: stopped at step %d", trainer.plan.title, trainer.state.global_step)
        signal.raise_signal(trainer.stop_signal)
        raise KeyboardInterrupt


def whole_checkpoints(folder: Path) -> list[Path]:
    """The resume points that were written to their end, in the order of their steps."""
    found = []
    for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}"):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # cut off while it was written
            json.loads(path.read_bytes())["global_step"]
            found.append(path.parent)
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))
