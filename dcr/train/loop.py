"""What both stages share: transformers' Trainer over a fixed schedule, history, resume points.

The rows of every step are drawn before training. A step is cut into micro-batches that change its
memory and nothing else. Resume points go by time and hold the trained parameters (safetensors) with
the library's optimiser, scheduler and random state: a run killed at any moment goes on from the
last one and ends with the same weights.
"""

from __future__ import annotations

import contextlib
import gc
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import sort_checkpoints

from dcr.data.files import Peak, append_jsonl, content_key, measured_peak, read_jsonl, write_atomic
from dcr.errors import DCRError
from dcr.lm.load import autocast
from dcr.lm.memory import out_of_memory, tokens_that_fit
from dcr.train.adapters import load_trained_state, trained_state

log = logging.getLogger("dcr")
WEIGHTS = "trained.safetensors"
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
            data_seed=self.seed,
            report_to=[],
            logging_strategy="no",
            logging_nan_inf_filter=False,  # it would wait for the device at every step
            remove_unused_columns=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
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


class StageTrainer(Trainer):
    """`Trainer` with micro-batches and resume points; a stage gives its `parts` and `part_loss`.

    rows: the stage's tokenised prompts, with their `lengths`.
    """

    metrics_add_up = False  # over processes; else each of them has the whole value

    def __init__(self, stage: Any, rows: Any, plan: Plan) -> None:
        self.stage = stage
        self.plan, self.rows, self.halved, self.stop_signal = plan, rows, False, 0
        StageArguments.own = next(stage.parameters()).device
        super().__init__(model=stage, args=plan.arguments())
        self.accelerator.device_placement = self.args.world_size > 1
        checkpointing = plan.config.gradient_checkpointing
        self.max_tokens = plan.config.max_tokens_per_batch or tokens_that_fit(
            stage.model, training=True, checkpointing=checkpointing
        )
        if checkpointing:
            stage.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.remove_callback(PrinterCallback)
        self.recorder = Recorder(self)

    def parts(self, step: int) -> list:
        """What this process runs forward and backward, one by one, in a step."""
        raise NotImplementedError

    def part_loss(self, model: nn.Module, part) -> tuple[Tensor, dict[str, Tensor]]:
        """(a part's share of the step's loss, its share of the metrics): parts add up."""
        raise NotImplementedError

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Numbers of steps: every process looks up its own part of them.

        With a generator of its own, else its start would draw from the state that dropout uses.
        """
        numbers: Any = [{"step": i} for i in range(len(self.plan.steps))]
        return torch.utils.data.DataLoader(numbers, generator=torch.Generator())

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """All micro-batches of one step; cut in half, once, when the memory does not hold them."""
        model.train()
        step = self.state.global_step + 1
        for _ in range(2):
            try:
                self.recorder.metrics = self._forward_backward(model, step)
                return self.recorder.metrics["loss"]
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).split("\n")[0][:200]
            self._halve(model, step, reason)  # outside: the handler keeps the step's tensors alive
        raise AssertionError("unreachable")

    def _forward_backward(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        parts, device = self.parts(step), self.args.device
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with autocast(device, self.plan.precision):
                    loss, metrics = self.part_loss(model, part)
                self.accelerator.backward(loss)
            totals = {k: totals.get(k, 0) + v.detach() for k, v in metrics.items()}
        if self.metrics_add_up and self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        return totals

    def _halve(self, model: nn.Module, step: int, reason: str) -> None:
        title, rows = self.plan.title, self.plan.rows(step)
        if self.halved or self.args.world_size > 1:
            raise DCRError(
                f"{title}: out of memory with {self.max_tokens} tokens at a time ({reason}). Lower "
                f"{title}.max_tokens_per_batch or {title}.max_length, or set "
                f"{title}.gradient_checkpointing=true."
            )
        padded = len(rows) * max(self.rows.lengths[r] for r in rows)
        self.halved, self.max_tokens = True, max(1, min(self.max_tokens, padded) // 2)
        log.warning("%s: out of memory; from now on %d tokens at a time", title, self.max_tokens)
        model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        self.recorder.metrics["grad_norm"] = norm
        return norm

    def give_up(self, what: str, step: int) -> None:
        """The one error of a training that ran away: where, what is left of it, what may help."""
        whole = whole_checkpoints(self.plan.folder) if self.plan.keep else []
        kept = f" The resume point {whole[-1]} is good." if whole else ""
        other = ', or pass precision="fp32"' if self.plan.precision == "bf16" else ""
        raise DCRError(
            f"{self.plan.title}: {what} at step {step} of {len(self.plan.steps)} (rows "
            f"{self.plan.rows(step)[:8]}...).{kept} Lower {self.plan.title}.lr{other}."
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:  # the library calls this in every process
            state = trained_state(self.stage)
            if not all(p.isfinite().all() for p in state.values()):
                self.give_up("weights are no longer finite", self.state.global_step)
            folder = Path(output_dir or self.plan.folder)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / WEIGHTS)

    def _save_checkpoint(self, model, trial) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' names
            whole = whole_checkpoints(self.plan.folder)
            raise DCRError(
                f"{self.plan.folder}: the resume point of step {self.state.global_step} could not "
                f"be saved ({error}). Free space and call again; training goes on from "
                f"{whole[-1].name if whole else 'the start'}."
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_trained_state(self.stage, load_file(Path(resume_from_checkpoint) / WEIGHTS))

    def fit(self) -> list[dict]:
        """Train, from the last whole resume point in the folder if there is one; the history.

        Points that were cut off while saving are set aside. SIGTERM and Ctrl-C end training behind
        the running step, with a resume point.
        """
        self.add_callback(self.recorder)  # last: the stage's own callbacks may ask to stop
        whole = whole_checkpoints(self.plan.folder)
        self.accelerator.wait_for_everyone()  # all have read before one moves
        if self.args.should_save:
            for cut in set(map(Path, sort_checkpoints(str(self.plan.folder)))) - set(whole):
                shutil.rmtree(cut.with_name(f"broken-{cut.name}"), ignore_errors=True)
                cut.rename(cut.with_name(f"broken-{cut.name}"))
        self.accelerator.wait_for_everyone()
        with measured_peak() as self.recorder.peak, stopping(self):
            self.train(resume_from_checkpoint=str(whole[-1]) if whole else None)
        if self.plan.config.gradient_checkpointing:
            self.stage.model.gradient_checkpointing_disable()
        return self.recorder.rows


class Recorder(TrainerCallback):
    """A JSON line a step, a log line now and then, resume points by time, at the end, at a signal.

    Metrics stay on the device until they are read, so that a GPU need not wait for Python.
    """

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer, self.path = trainer, trainer.plan.folder / "history.jsonl"
        self.rows: list[dict] = []  # read and written
        self.waiting: list[dict] = []  # steps whose metrics have not been read yet
        self.metrics: dict[str, Tensor] = {}  # of the running step
        self.flushed = self.next_save = self.step_seconds = 0.0
        self.peak: Peak

    def on_train_begin(self, args, state, control, **_) -> None:
        """Begin, or go on from what an interrupted training wrote."""
        self.rows = [r for r in read_jsonl(self.path) if r["step"] <= state.global_step]
        self.trainer.accelerator.wait_for_everyone()  # all have read before one writes
        if args.should_save:
            write_lines(self.path, self.rows)
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
        rate = scheduler.get_last_lr()[0]
        self.waiting.append(
            {"step": step, **self.metrics, "lr": rate, "tokens": self.tokens}
            | {"seconds": round(now - self.started, 3)}
        )
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
            row: dict[str, Any] = {
                k: v.item() if torch.is_tensor(v) else v for k, v in waiting.items()
            }
            row["tokens_per_second"] = round(row["tokens"] / max(row["seconds"], 1e-9), 1)
            if not math.isfinite(row["loss"]):
                self.trainer.give_up(f"the loss became {row['loss']}", row["step"])
            self.rows.append(row | self.peak.mib())
            if self.trainer.args.should_save:
                append_jsonl(self.path, self.rows[-1])
            steps = len(self.trainer.plan.steps)
            if row["step"] % max(1, steps // 5) == 0:
                left = row["seconds"] / row["step"] * (steps - row["step"])
                what = (self.trainer.plan.title, row["step"], steps, row["loss"], left)
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
def stopping(trainer: StageTrainer) -> Iterator[None]:
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
    found = map(Path, sort_checkpoints(str(folder)))
    return [p for p in found if (p / TRAINER_STATE_NAME).exists()]


@contextlib.contextmanager
def planned(work_dir: str | Path | None, made_from: dict, **fields) -> Iterator[Plan]:
    """The `Plan` of a training (its other `fields`) in its work folder, or in a temporary one.

    The folder notes what the training is made from, by names that a user knows. Raises DCRError
    naming what differs, where it holds a training of something else.
    """
    scratch = (
        tempfile.TemporaryDirectory() if work_dir is None else contextlib.nullcontext(work_dir)
    )
    with scratch as folder:
        plan = Plan(folder=Path(folder), keep=work_dir is not None, **fields)
        facts = {"config": plan.config.model_dump(), "seed": plan.seed, "precision": plan.precision}
        keys = {name: content_key(value) for name, value in {**made_from, **facts}.items()}
        note = plan.folder / f"{plan.title}.json"
        held = json.loads(note.read_text(encoding="utf-8")) if note.exists() else keys
        changed = [name for name, key in keys.items() if held.get(name) != key]
        if changed:
            raise DCRError(
                f"{folder} holds a training of another {', '.join(changed)}. Choose another "
                "work_dir, or delete it."
            )
        write_atomic(note, json.dumps(keys))
        yield plan


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    """Rows as JSON lines, in one atomic write."""
    write_atomic(path, "".join(json.dumps(r) + "\n" for r in rows))
