"""What both stages share: transformers' Trainer over a fixed schedule.

The rows of every step are drawn before training. A step is cut into micro-batches that change its
memory and nothing else. Resume points go by time and hold the trained parameters (safetensors) with
the library's optimiser, scheduler and random state: a run killed at any moment goes on from the
last one and ends with the same weights.
"""

import contextlib
import gc
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from dcr.data.files import measured_peak, read_jsonl, write_atomic
from dcr.errors import DCRError
from dcr.lm.device import autocast, out_of_memory, tokens_that_fit
from dcr.train.adapters import load_trained_state, trained_state
from dcr.train.record import Plan, Recorder, StageArguments, stopping, whole_checkpoints

log = logging.getLogger("dcr")
WEIGHTS = "trained.safetensors"


class StageTrainer(Trainer):
    """`Trainer` with micro-batches and resume points; a stage gives its `parts` and `part_loss`.

    rows: the stage's tokenised prompts, with their `lengths`.
    """

    metrics_add_up = False  # over processes; else each of them has the whole value

    def __init__(self, stage: Any, rows: Any, plan: Plan) -> None:
        self.stage, self.plan, self.rows = stage, plan, rows
        self.halved, self.stop_signal = False, 0
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
        title, lengths = self.plan.title, self.rows.lengths
        if self.halved or self.args.world_size > 1:
            raise DCRError(
                f"{title}: out of memory with {self.max_tokens} tokens at a time ({reason}). Lower "
                f"{title}.max_tokens_per_batch or {title}.max_length, or set "
                f"{title}.gradient_checkpointing=true."
            )
        batches = self.plan.steps[step - 1]  # stage 1 runs them one by one
        padded = max(len(rows) * max(lengths[r] for r in rows) for rows in batches)
        self.halved, self.max_tokens = True, max(1, min(self.max_tokens, padded) // 2)
        log.warning("%s: out of memory; from now on %d tokens at a time", title, self.max_tokens)
        model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()

    def _run_epoch(self, *args, **kwargs) -> None:
        if not self.control.should_training_stop:  # else it had stopped at the resume point
            super()._run_epoch(*args, **kwargs)

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

    def resumed(self, path: Path) -> list[dict]:
        """JSON lines of an interrupted training, without what came after its resume point."""
        rows = [r for r in read_jsonl(path) if r["step"] <= self.state.global_step]
        self.accelerator.wait_for_everyone()  # all have read before one writes
        if self.args.should_save:
            write_atomic(path, "".join(json.dumps(r) + "\n" for r in rows))
        return rows

    def fit(self) -> list[dict]:
        """Train, from the last whole resume point in the folder if there is one; the history.

        Points that were cut off while saving are set aside. SIGTERM and Ctrl-C end training behind
        the running step, with a resume point.
        """
        self.add_callback(self.recorder)  # last: the stage's own callbacks may ask to stop
        whole = whole_checkpoints(self.plan.folder)
        self.accelerator.wait_for_everyone()  # all have read before one moves
        if self.args.should_save:
            for cut in set(self.plan.folder.glob("checkpoint-*")) - set(whole):
                broken = cut.with_name(f"broken-{cut.name}")
                shutil.rmtree(broken, ignore_errors=True)
                cut.rename(broken)
        self.accelerator.wait_for_everyone()
        with measured_peak() as self.recorder.peak, stopping(self):
            self.train(resume_from_checkpoint=str(whole[-1]) if whole else None)
        if self.plan.config.gradient_checkpointing:
            self.stage.model.gradient_checkpointing_disable()
        return self.recorder.rows
