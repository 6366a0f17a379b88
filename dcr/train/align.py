"""Stage 2: safety alignment by supervised fine-tuning on general and refusal examples (paper section "Method").

L = -E Σ_t log π(y_t | x, y_<t). Logits are computed at labelled positions only: the LM head is the largest
matrix of a small model, and a prompt token needs no logits.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from dcr.config import AlignConfig
from dcr.errors import DCRError
from dcr.lm.blocks import decoder_layers, resolve_layer
from dcr.lm.chat import render
from dcr.lm.generate import inference_dtype
from dcr.train.adapters import merged, train_blocks
from dcr.train.loop import StageTrainer, load_trained_state, run, trained_state, training_arguments

log = logging.getLogger("dcr")
IGNORED = -100
STEPS_FOLDER = "steps"


@dataclass
class AlignResult:
    """The aligned model, a row per step, the recorded steps, and how many answers the length limit cut."""

    model: nn.Module
    history: list[dict]
    steps: list[int]
    truncated: int


def align(
    model,
    tokenizer,
    mix: pd.DataFrame,
    *,
    config: AlignConfig | None = None,
    seed: int = 0,
    work_dir: str | Path | None = None,
    merge: bool = True,
    layer: int | float | None = None,
    precision: str = "auto",
    layers_path: str = "",
) -> AlignResult:
    """Fine-tune `model` on `mix` (columns text, response).

    With `work_dir`, history, resume points and the trained weights at log-spaced steps go there; an interrupted
    call goes on from the last resume point. `layer` is ℓ, needed for `config.above_layer`.
    Raises DCRError for an empty mix, a row without answer, or labels other than completion and all.
    """
    config = config or AlignConfig()
    if mix.empty:
        raise DCRError(
            "the alignment mix is empty: set align.n_general, align.n_safe or align.n_augment above 0."
        )
    examples = Examples(mix, tokenizer, labels=config.labels, max_length=config.max_length)
    if examples.truncated:
        log.warning(
            "align: %d of %d examples are longer than align.max_length=%d tokens and were cut (they do not "
            "teach the stop token)",
            examples.truncated,
            len(examples),
            config.max_length,
        )
    per_step = config.batch_size * config.accumulation
    steps = config.max_steps or max(1, math.ceil(config.epochs * len(examples) / per_step))
    lengths = [len(ids) for ids in examples.ids]
    batches = length_grouped_batches(lengths, config.batch_size, steps * config.accumulation, seed)
    n_blocks = len(decoder_layers(model, layers_path))
    if config.above_layer and layer is None:
        raise DCRError(
            "align.above_layer is on but no layer ℓ was given; pass layer=... (refine.layer)."
        )
    first = resolve_layer(layer, n_blocks) if config.above_layer else 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(work_dir) if work_dir is not None else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        set_seed(seed)  # before the adapter: LoRA's initialisation is random
        trainable = train_blocks(
            model,
            first,
            n_blocks,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            targets=config.lora_targets,
            dropout=config.lora_dropout,
            layers_path=layers_path,
        )
        if config.gradient_checkpointing:
            trainable.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            trainable.enable_input_require_grads()
        args = training_arguments(
            folder,
            steps=steps,
            lr=config.lr,
            warmup=config.warmup,
            schedule=config.schedule,
            accumulation=config.accumulation,
            save_steps=config.save_steps if work_dir else 0,
            bf16=inference_dtype(precision, str(model.device)) is torch.bfloat16,
            seed=seed,
            weight_decay=config.weight_decay,
        )
        trainer = AlignTrainer(
            model=StageTwoModel(trainable),
            dataset=examples,
            collate=examples.collate,
            batches=batches,
            args=args,
            history=folder / "history.jsonl",
            title="align",
        )
        wanted = recorded_steps(config.checkpoints, steps)
        if work_dir is not None:
            trainer.add_callback(StepRecorder(trainer, folder / STEPS_FOLDER, wanted))
        run(trainer)
        if config.gradient_checkpointing:
            trainable.gradient_checkpointing_disable()
        history = trainer.recorder.rows
    done = merged(trainable) if merge else trainable.eval().requires_grad_(False)
    return AlignResult(done, history, wanted, examples.truncated)


def recorded_steps(rule: str | Sequence[int], steps: int) -> list[int]:
    """Steps whose weights are kept: "log" → 0, 1, 2, 4, ... and the last; "last"; or these."""
    if rule == "log":
        return sorted({0, steps, *(2**i for i in range(steps.bit_length()) if 2**i <= steps)})
    if rule == "last":
        return [steps]
    chosen = sorted({*rule, steps})
    if chosen[-1] > steps:
        raise DCRError(f"align.checkpoints={rule!r}: steps must lie in 0..{steps}.")
    return chosen


class StepRecorder(TrainerCallback):
    """Writes the trained weights at given steps. It only reads, so training is the same bit for bit without it."""

    def __init__(self, trainer: StageTrainer, folder: Path, steps: Sequence[int]) -> None:
        self.trainer, self.folder, self.steps = trainer, folder, set(steps)

    def _record(self, state) -> None:
        if state.global_step in self.steps and state.is_world_process_zero:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / f"{state.global_step:06d}.safetensors"
            weights = trained_state(self.trainer.accelerator.unwrap_model(self.trainer.model).model)
            try:
                save_file(weights, path.with_suffix(".tmp"))
            except (OSError, SafetensorError) as error:
                path.with_suffix(".tmp").unlink(missing_ok=True)
                raise DCRError(
                    f"{path}: could not be written ({error}). Free space and call again; training goes on from "
                    "the last resume point."
                ) from error
            path.with_suffix(".tmp").replace(path)

    def on_train_begin(self, args, state, control, **_) -> None:
        self._record(state)

    def on_step_end(self, args, state, control, **_) -> None:
        self._record(state)


def load_step(trainable: nn.Module, folder: Path, step: int) -> None:
    """Put the weights recorded at `step` into the (unmerged) trained model."""
    path = Path(folder) / STEPS_FOLDER / f"{step:06d}.safetensors"
    if not path.exists():
        known = sorted(int(p.stem) for p in path.parent.glob("*.safetensors"))
        raise DCRError(f"{path}: step {step} was not recorded; recorded: {known}.")
    load_trained_state(trainable, load_file(path))


class Examples(torch.utils.data.Dataset):
    """Tokenised (prompt, answer) rows with labels: the answer and its end token, or all tokens but the first."""

    def __init__(self, mix: pd.DataFrame, tokenizer, *, labels: str, max_length: int) -> None:
        if labels not in ("completion", "all"):
            raise DCRError(f"align.labels={labels!r} is unknown; use completion or all.")
        for number, (text, response) in enumerate(zip(mix["text"], mix["response"], strict=True)):
            if not str(text).strip() or not str(response).strip():
                raise DCRError(
                    f"alignment mix, row {number}: prompt or answer is empty ({str(text)[:60]!r})."
                )
        heads = render(tokenizer, mix["text"].tolist())
        wholes = render(tokenizer, mix["text"].tolist(), mix["response"].tolist())
        self.tokenizer, self.ids, self.starts, self.truncated = tokenizer, [], [], 0
        for head, whole in zip(heads, wholes, strict=True):
            prompt, answer = (
                tokenizer(t, add_special_tokens=False)["input_ids"]
                for t in (head, whole[len(head) :])
            )
            ids = (
                prompt + answer
            )  # tokenised apart, so that the border is the one generation will see
            self.truncated += len(ids) > max_length
            self.ids.append(ids[:max_length])
            self.starts.append(min(len(prompt), max_length) if labels == "completion" else 1)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> int:
        return row

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Right-padded input_ids, attention_mask and labels, each [batch, seq]; padding and prompt labelled -100."""
        width = max(len(self.ids[r]) for r in rows)
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            tokens = torch.tensor(self.ids[row])
            ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
            labels[i, self.starts[row] : len(tokens)] = tokens[self.starts[row] :]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def length_grouped_batches(
    lengths: Sequence[int], batch_size: int, n_batches: int, seed: int
) -> list[list[int]]:
    """Shuffled batches of similar length: rows are shuffled, sorted inside groups of 16 batches, batches shuffled.

    Every pass covers each row once; drawn from the seed alone.
    """
    rng = np.random.default_rng([seed, 0xA11])
    lengths, batches = np.asarray(lengths), []
    while len(batches) < n_batches:
        order = rng.permutation(len(lengths))
        chunk = 16 * batch_size
        order = np.concatenate(
            [
                c[np.argsort(-lengths[c], kind="stable")]
                for c in (order[i : i + chunk] for i in range(0, len(order), chunk))
            ]
        )
        fresh = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
        batches += [fresh[i] for i in rng.permutation(len(fresh))]
    return batches[:n_batches]


class StageTwoModel(nn.Module):
    """Causal LM → summed cross-entropy over labelled positions; logits are computed there and nowhere else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        targets = labels[:, 1:]
        wanted = targets != IGNORED
        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _m, args: (args[0][:, :-1][wanted],))
        try:
            logits = self.model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).logits
        finally:
            handle.remove()
        return nn.functional.cross_entropy(logits.float(), targets[wanted], reduction="sum")


class AlignTrainer(StageTrainer):
    """Mean loss over the labelled tokens of the global batch, whatever the accumulation and the processes."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # so the library counts the labels of the whole step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total = model(**inputs)
        count = (
            num_items_in_batch
            if num_items_in_batch is not None
            else (inputs["labels"] != IGNORED).sum()
        )
        loss = total / count
        seen = torch.stack([loss.detach(), inputs["attention_mask"].sum().to(loss)])
        if self.accelerator.num_processes > 1:  # each process holds its part of the batch
            seen = self.accelerator.reduce(seen, "sum")
        self.tokens += int(seen[1])
        step = self.state.global_step
        earlier = self.metrics["loss"] if self.metrics.get("_step") == step else 0.0
        self.metrics = {"loss": earlier + float(seen[0]), "_step": step}
        self.check_finite(loss)
        return (
            loss * self.accelerator.num_processes
        )  # DDP averages over processes; the count is global
