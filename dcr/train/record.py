"""What a training leaves: its history, resume points by time, a point where it is stopped."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from dcr.data.files import Peak, append_jsonl

log = logging.getLogger("dcr")
SAVE_SECONDS = 5.0  # between resume points at least,
SAVE_SHARE = 0.05  # and more where writing them would take a larger share of the time
FLUSH_SECONDS = 2.0  # between readings of the metrics of a GPU, which runs ahead of Python
LONG_STEP = 3.0  # seconds; SIGTERM and Ctrl-C wait for the end of a shorter step only


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
        """Note the time."""
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **_) -> None:
        """Do what is due behind this step."""
        now, step = time.perf_counter(), state.global_step
        self.step_seconds = now - self.begun
        self.tokens += sum(self.trainer.rows.lengths[r] for r in self.trainer.plan.rows(step))
        scheduler: Any = self.trainer.lr_scheduler
        row = {"step": step, **self.metrics, "lr": scheduler.get_last_lr()[0]}
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
