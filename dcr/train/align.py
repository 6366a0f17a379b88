"""Stage 2: safety alignment by supervised fine-tuning on general and refusal examples.

L = -E Σ_t log π(y_t | x, y_<t) (paper, "Method"). Logits are computed at labelled positions only.
With `align.decision` the first token of an answer says whether it refuses, and `align.routing` ties
its log odds to those of a frozen probe.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from dcr.config import AlignConfig
from dcr.data.files import write_atomic
from dcr.errors import DCRError
from dcr.lm.batches import common_prefix, shared_inputs, token_batches
from dcr.lm.blocks import decoder_layers, decoder_stack, fingerprint, head_logits, resolve_layer
from dcr.lm.device import resolve_precision
from dcr.train.adapters import Lora, load_trained_state, merged, train_blocks, trained_state
from dcr.train.examples import Examples
from dcr.train.loop import StageTrainer
from dcr.train.losses import SummedCrossEntropy, chunk_rows, routing
from dcr.train.record import planned
from dcr.train.sampling import length_grouped_batches, training_steps

STEPS_FOLDER = "steps"


@dataclass
class AlignResult:
    """The aligned model, a row per step, and answers cut or lost by length.

    steps: those whose weights stand in the work folder; without one, nothing is recorded.
    """

    model: nn.Module
    history: list[dict]
    steps: list[int]
    truncated: int
    dropped: int


def align(  # noqa: PLR0913
    model,
    tokenizer,
    mix,
    *,
    config: AlignConfig | None = None,
    seed: int = 0,
    work_dir: str | Path | None = None,
    merge: bool = True,
    layer: int | float | None = None,
    precision: str = "auto",
    layers_path: str = "",
) -> AlignResult:
    """Fine-tune `model` (in place) on `mix`: a table with text and response (see `Examples`).

    work_dir: history, resume points and the weights at `config.checkpoints` go there; an
        interrupted call goes on from the last resume point.
    merge: fold the adapter into the weights (in fp32); otherwise the PEFT model comes back.
    layer: ℓ, needed for `config.above_layer`.
    precision: "bf16" (autocast), "fp32", or "auto": bf16 where the hardware multiplies it natively.
    Raises DCRError for a row without an answer, a work folder of another training, or a loss that
    is not finite.
    """
    config, n_blocks = config or AlignConfig(), len(decoder_layers(model, layers_path))
    first = 0
    if config.above_layer:
        if layer is None:
            raise DCRError("align.above_layer is on but no layer ℓ was given; pass layer=...")
        first = resolve_layer(layer, n_blocks)
        if first == n_blocks:
            raise DCRError(f"align.above_layer: no block stands above layer {first}, the last.")
    precision = resolve_precision(precision, str(model.device))
    rows = Examples(mix, tokenizer, config)
    size = config.batch_size
    draw = partial(length_grouped_batches, rows.lengths, size, seed=seed)
    steps = training_steps(config, math.ceil(len(rows.ids) / size), draw)
    recorded = recorded_steps(config.checkpoints, len(steps))
    made_from = {"model": fingerprint(model, tokenizer), "layer": first, "mix": rows.facts()}
    made_from["layers_path"] = layers_path
    fields = {"title": "align", "config": config, "seed": seed, "precision": precision}
    with planned(work_dir, made_from, steps=steps, **fields) as plan:
        set_seed(seed)  # before the adapter: LoRA's initialisation is random
        lora = Lora(config.lora_rank, config.lora_alpha, config.lora_targets, config.lora_dropout)
        how = {"precision": precision, "layers_path": layers_path}
        trainable = train_blocks(model, first, n_blocks, lora, **how)
        trainer = AlignTrainer(AnswerModel(trainable, layers_path), rows, plan)
        if plan.keep:
            trainer.add_callback(StepRecorder(trainer, recorded))
        history = trainer.fit()
    done = merged(trainable) if merge else trainable.eval().requires_grad_(False)
    kept = recorded if plan.keep else []
    return AlignResult(done, history, kept, rows.truncated, rows.dropped)


class AnswerModel(nn.Module):
    """Causal LM → summed cross-entropy over labelled positions, and logits of the first one.

    The tokens that all prompts begin with run once a batch. Source: paper, "Method".
    """

    def __init__(self, model: Any, layers_path: str = "") -> None:
        super().__init__()
        self.model, self.layers_path = model, layers_path

    def forward(self, batch: dict[str, Tensor], shared: int, decide: bool = False):
        """batch: see `Examples.collate`; → (loss, logits [batch, vocabulary] or None)."""
        stack = decoder_stack(self.model, self.layers_path)
        hidden = stack(**shared_inputs(stack, batch["ids"], batch["mask"], shared))[0]
        left = batch["ids"].shape[1] - hidden.shape[1]  # [batch, seq - left, hidden]
        labelled = hidden[batch["row"], batch["column"] - left]  # [labels, hidden]
        rows = chunk_rows(self.model.get_output_embeddings().weight.shape[0])
        loss = SummedCrossEntropy.apply(labelled, batch["labels"], self._logits, rows)
        each = torch.arange(len(hidden), device=hidden.device)
        return loss, self._logits(hidden[each, batch["last"] - left]) if decide else None

    def _logits(self, hidden: Tensor) -> Tensor:
        return head_logits(self.model, hidden, self.layers_path)


class AlignTrainer(StageTrainer):
    """Mean loss over the labelled tokens of the step, however it is cut up and shared out."""

    metrics_add_up = True

    def parts(self, step: int) -> list[tuple[int, list[int]]]:
        """(step, rows) of this process's micro-batches; for none (-step, a row that counts 0)."""
        rows = self.plan.rows(step)
        mine = rows[self.args.process_index :: self.args.world_size]
        if not mine:
            return [(-step, rows[:1])]
        batches = token_batches([self.rows.lengths[r] for r in mine], 0, self.max_tokens)
        return [(step, [mine[i] for i in batch]) for batch in batches]

    def part_loss(self, model: nn.Module, part) -> tuple[Tensor, dict[str, Tensor]]:
        """The part's share of the step's mean; DDP averages over processes, so it is scaled up."""
        (step, mine), rows, weight = part, self.plan.rows(abs(part[0])), self.plan.config.routing
        batch = self.rows.collate(mine, self.args.device)
        shared = 0  # where all tokens are labels, the prompts' first ones are too
        if self.plan.config.labels == "completion":
            shared = common_prefix([self.rows.ids[r][: self.rows.heads[r]] for r in mine])
        loss, logits = model(batch, shared, weight > 0)
        metrics = {"loss": loss / self.rows.labels(rows)}
        if weight > 0:
            decision, known = self.rows.decision, ~batch["targets"].isnan()
            odds = logits[known, decision.refuse] - logits[known, decision.comply]
            count = max(1, int((~self.rows.targets[rows].isnan()).sum()))
            metrics["routing"] = routing(odds, batch["targets"][known]) / count
            metrics["loss"] = metrics["loss"] + weight * metrics["routing"]
        share = {name: value * (step > 0) for name, value in metrics.items()}
        return share["loss"] * self.args.world_size, share


def recorded_steps(rule: str | Sequence[int], steps: int) -> list[int]:
    """Steps whose weights are kept: "log" → 0, 1, 2, 4, ..., the last; "last"; or those given."""
    if rule == "log":
        return sorted({0, steps, *(2**i for i in range(steps.bit_length()) if 2**i <= steps)})
    chosen = sorted({steps} if rule == "last" else {*map(int, rule), steps})
    if chosen[0] < 0 or chosen[-1] > steps:
        raise DCRError(f"align.checkpoints={list(rule)}: steps must lie in 0..{steps}.")
    return chosen


class StepRecorder(TrainerCallback):
    """Writes the trained weights at given steps. It only reads: training is the same without it."""

    def __init__(self, trainer: StageTrainer, steps: Sequence[int]) -> None:
        self.trainer, self.steps = trainer, set(steps)
        self.folder = trainer.plan.folder / STEPS_FOLDER

    def on_step_end(self, args, state, control, **_) -> None:
        """Write the weights of this step, if it is one of those."""
        if state.global_step not in self.steps or not state.is_world_process_zero:
            return
        path = self.folder / f"{state.global_step:06d}.safetensors"
        write_atomic(path, save(trained_state(self.trainer.stage.model)))

    on_train_begin = on_step_end


def load_step(trainable: nn.Module, folder: Path, step: int) -> None:
    """Put the weights recorded at `step` into the (unmerged) trained model."""
    path = folder / STEPS_FOLDER / f"{step:06d}.safetensors"
    if not path.exists():
        known = sorted(int(p.stem) for p in path.parent.glob("*.safetensors"))
        raise DCRError(f"{path}: step {step} was not recorded; recorded: {known}.")
    load_trained_state(trainable, load_file(path))
