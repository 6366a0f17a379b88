"""What both training stages share: a Trainer over a fixed schedule of batches that keeps a history and resumes.

Checkpoints hold the trained parameters only (safetensors), with the library's optimiser, scheduler and random
state beside them; a run killed at any moment goes on from the last one and ends with the same weights.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import sort_checkpoints

from dcr.data.files import append_jsonl, peak_memory_mib, read_jsonl, write_atomic
from dcr.errors import DCRError
from dcr.train.sampling import FixedBatches

log = logging.getLogger("dcr")
WEIGHTS = "trained.safetensors"


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters that train, by name."""
    return {
        n: p.detach().clone().contiguous() for n, p in model.named_parameters() if p.requires_grad
    }


def load_trained_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put back what `trained_state` took."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


class StageTrainer(Trainer):
    """`Trainer` with our schedule, a history line per optimiser step, and small checkpoints."""

    def __init__(
        self,
        *,
        model: nn.Module,
        dataset,
        collate: Callable,
        batches: Sequence[Sequence[int]],
        args: TrainingArguments,
        history: Path | None,
        title: str,
    ) -> None:
        self.batches = FixedBatches(batches)
        self.metrics: dict[str, float] = {}
        self.tokens = 0
        super().__init__(model=model, args=args, train_dataset=dataset, data_collator=collate)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.recorder = HistoryCallback(self, history, title)
        self.add_callback(self.recorder)

    def get_train_dataloader(self) -> DataLoader:
        """The fixed schedule, shared among processes by splitting each batch."""
        return self.accelerator.prepare(
            DataLoader(
                self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator
            )
        )

    def check_finite(self, loss: torch.Tensor) -> None:
        """Stop at the first loss that is not finite; the last checkpoint stays good."""
        if not torch.isfinite(loss).all():
            step = self.state.global_step
            rows = self.batches.batches[
                min(step * self.args.gradient_accumulation_steps, len(self.batches) - 1)
            ]
            raise DCRError(
                f"the loss became {loss.item()} at step {step + 1} (rows {rows[:8]}...). The last good "
                f"checkpoint in {self.args.output_dir} is kept; lower the learning rate or use float32."
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:  # the library calls this in every process
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{WEIGHTS}.tmp"
        save_file(trained_state(self.accelerator.unwrap_model(self.model)), temporary)
        temporary.replace(folder / WEIGHTS)

    def _save_checkpoint(self, model, trial) -> None:
        """A resume point; on a full disk one clear error, and the points before it stay good."""
        try:
            super()._save_checkpoint(model, trial)
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch and safetensors wrap the system's error
            raise DCRError(
                f"{self.args.output_dir}: the resume point of step {self.state.global_step} could not be saved "
                f"({error}). Free space and call again; training goes on from "
                f"{(whole_checkpoints(Path(self.args.output_dir)) or [Path('the start')])[-1].name}."
            ) from error

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_trained_state(model or self.model, load_file(Path(resume_from_checkpoint) / WEIGHTS))


class HistoryCallback(TrainerCallback):
    """Writes the history (JSONL), draws the progress bar and logs counts with the time left."""

    def __init__(self, trainer: StageTrainer, path: Path | None, title: str) -> None:
        self.trainer, self.path, self.title = trainer, path, title
        self.rows: list[dict] = []
        self.bar = None
        self.started = 0.0

    def on_train_begin(self, args, state, control, **_) -> None:
        if self.path is not None:
            self.rows = [r for r in read_jsonl(self.path) if r["step"] <= state.global_step]
            if state.is_world_process_zero:
                write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in self.rows))
        self.trainer.tokens = self.rows[-1]["tokens"] if self.rows else 0
        self.started = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0.0)
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.title,
            unit="step",
            leave=False,
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args, state, control, **_) -> None:
        seconds = time.perf_counter() - self.started
        row = {
            "step": state.global_step,
            **self.trainer.metrics,
            "lr": self.trainer.lr_scheduler.get_last_lr()[0],
            "tokens": self.trainer.tokens,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(self.trainer.tokens / max(seconds, 1e-9), 1),
            "peak_memory_mib": peak_memory_mib(),
        }
        self.rows.append(row)
        if state.is_world_process_zero:
            if self.path is not None:
                append_jsonl(self.path, row)
            self.bar.update(1)
            if state.global_step % max(1, state.max_steps // 5) == 0:
                left = seconds / state.global_step * (state.max_steps - state.global_step)
                log.info(
                    "%s: step %d of %d, loss %.4f, %.0f s left",
                    self.title,
                    state.global_step,
                    state.max_steps,
                    row.get("loss", math.nan),
                    left,
                )

    def on_train_end(self, args, state, control, **_) -> None:
        if self.bar is not None:
            self.bar.close()


def training_arguments(
    folder: Path,
    *,
    steps: int,
    lr: float,
    warmup: float,
    schedule: str,
    accumulation: int,
    save_steps: int,
    bf16: bool,
    seed: int,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
) -> TrainingArguments:
    """The library's arguments for one stage; every number that matters is named here."""
    schedules = ("constant", "linear", "cosine")
    if schedule not in schedules:
        raise DCRError(f"schedule={schedule!r} is unknown; use one of {', '.join(schedules)}.")
    name = "constant_with_warmup" if schedule == "constant" else schedule
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=lr,
        warmup_steps=math.ceil(warmup * steps),
        lr_scheduler_type=name,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=1,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 1,
        save_total_limit=2,
        bf16=bf16,
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        seed=seed,
        data_seed=seed,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        optim="adamw_torch",
        report_to=[],
        logging_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        label_names=[],
        ddp_find_unused_parameters=False,
        ddp_backend="gloo"
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available()
        else None,
        accelerator_config={"split_batches": True, "use_seedable_sampler": True},
        dataloader_pin_memory=False,
    )


def whole_checkpoints(folder: Path) -> list[Path]:
    """The resume points that were written to their end, in the order of their steps."""
    return [
        p for p in map(Path, sort_checkpoints(str(folder))) if (p / TRAINER_STATE_NAME).exists()
    ]


def run(trainer: StageTrainer) -> None:
    """Train, from the last whole checkpoint in the folder if there is one; those cut off while saving are set aside."""
    folder = Path(trainer.args.output_dir)
    whole = whole_checkpoints(folder)
    trainer.accelerator.wait_for_everyone()  # all have read before one moves
    if trainer.args.should_save:
        for cut in {Path(p) for p in sort_checkpoints(str(folder))} - set(whole):
            shutil.rmtree(cut.with_name(f"broken-{cut.name}"), ignore_errors=True)
            cut.rename(cut.with_name(f"broken-{cut.name}"))
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=str(whole[-1]) if whole else None)
