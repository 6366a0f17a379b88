"""How one stage is trained: its steps, its folder, and every number of the library that matters."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from dcr.data.files import content_key, write_atomic
from dcr.errors import DCRError


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
