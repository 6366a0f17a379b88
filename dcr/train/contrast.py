"""Stage 1's view of the model: prompts in, pooled hidden states at ℓ out, and how they part."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from dcr.analysis.probes import fit_probe
from dcr.data.files import append_jsonl
from dcr.errors import DCRError
from dcr.lm.batches import common_prefix, padded, token_batches
from dcr.lm.blocks import pool, truncated_forward
from dcr.lm.chat import encode_prompts
from dcr.lm.device import autocast
from dcr.train.loop import StageTrainer
from dcr.train.losses import ContrastiveLoss, drift
from dcr.train.record import Plan

TOXIC, SEEMINGLY_TOXIC, GENERAL = 1, 0, 2
CLASS = {"toxic": TOXIC, "seemingly_toxic": SEEMINGLY_TOXIC, "general": GENERAL}
ROWS_AT_ONCE = 16  # on a CPU: rows of like length run together, so that less padding runs
PROBE_ROWS, HELD_ROWS = 16, 16  # prompts a class that the held-out probe is fitted and read on
READING, SHARE = 0.4, 0.05  # a row read costs this part of a row trained; readings, of the stage


class PromptRows:
    """Tokenised prompts with their class. Raises DCRError naming a prompt over the limit."""

    def __init__(self, table: pd.DataFrame, tokenizer, max_length: int) -> None:
        self.ids = encode_prompts(tokenizer, table["text"].tolist())
        self.lengths = [len(row) for row in self.ids]
        self.classes = torch.tensor([CLASS[label] for label in table["label"]])
        self.reference: Tensor | None = None  # [rows, hidden] of the frozen base, for retention
        for row, length in enumerate(self.lengths):
            if length > max_length:
                raise DCRError(
                    f"{table['label'].iloc[row]} prompt {table['id'].iloc[row]!r} has {length} "
                    f"tokens, the limit is {max_length}: {table['text'].iloc[row][:60]!r}... "
                    "Shorten it or raise refine.max_length."
                )


class StageOneModel(nn.Module):
    """The model up to hidden state ℓ: rows of token ids → pooled hidden states [rows, hidden]."""

    def __init__(self, model: Any, layer: int, pooling: str, layers_path: str = "") -> None:
        super().__init__()
        self.model, self.layer, self.pooling, self.layers_path = model, layer, pooling, layers_path

    def forward(self, rows: list[list[int]], max_tokens: int) -> Tensor:
        """Rows longer than `max_tokens` together run in parts, whose activations are made again in
        the backward pass: the loss sees all hidden states, the memory one part."""
        lengths = [len(row) for row in rows]
        device = next(self.model.parameters()).device
        size = ROWS_AT_ONCE if device.type == "cpu" else 0
        batches = token_batches(lengths, size, max_tokens)
        run = self._states
        if torch.is_grad_enabled() and len(rows) * max(lengths) > max_tokens:
            run = functools.partial(checkpoint, self._states, use_reentrant=False)
        parts = [run([rows[i] for i in batch], device) for batch in batches]
        place = torch.tensor([i for batch in batches for i in batch]).argsort()
        return torch.cat(parts)[place.to(device)]  # back in the order of `rows`

    def _states(self, rows: list[list[int]], device: torch.device) -> Tensor:
        ids, mask = padded(rows, "right", device)
        shared = common_prefix(rows)
        hidden = truncated_forward(self.model, ids, mask, self.layer, self.layers_path, shared)
        return pool(hidden, mask, self.pooling)


@torch.no_grad()
def pooled_states(
    stage: StageOneModel, rows: PromptRows, which: Sequence[int], max_tokens: int = 4096
) -> Tensor:
    """Pooled hidden states at ℓ of some rows, [len(which), hidden], fp32 on the CPU."""
    was_training = stage.training
    stage.eval()
    states = stage([rows.ids[i] for i in which], max_tokens).float().cpu()
    stage.train(was_training)
    return states


def reference_states(stage: StageOneModel, rows: PromptRows) -> Tensor:
    """[rows, hidden] states of the general prompts under the frozen base; other rows are 0.

    The adapter is disabled (all parameters: read before the first step): no second copy is kept.
    """
    general = rows.classes == GENERAL
    with getattr(stage.model, "disable_adapter", contextlib.nullcontext)():
        states = pooled_states(stage, rows, torch.nonzero(general)[:, 0].tolist())
    full = torch.zeros(len(rows.ids), states.shape[1])
    full[general] = states
    return full


class RefineTrainer(StageTrainer):
    """Contrastive loss at ℓ, plus retention of the general prompts' hidden states."""

    def __init__(self, stage: StageOneModel, rows: PromptRows, plan: Plan) -> None:
        super().__init__(stage, rows, plan)
        config, n = plan.config, self.args.world_size
        if len(plan.steps[0][0]) % n:
            raise DCRError(
                f"refine.batch_size gives batches of {len(plan.steps[0][0])} prompts, which {n} "
                "processes cannot share evenly; change it."
            )
        self.contrastive = ContrastiveLoss(config.loss, margin=config.margin, gamma=config.gamma)

    def parts(self, step: int) -> list[list[int]]:
        """The whole batches of a step: each is one loss."""
        return self.plan.steps[step - 1]

    def part_loss(self, model: nn.Module, part: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Every process runs its share of the rows and computes the loss of all hidden states.

        The gather's backward adds up the processes' gradients and DDP divides by their number: the
        gradient of one process with all the prompts.
        """
        config, rank, world = self.plan.config, self.args.process_index, self.args.world_size
        share = len(part) // world
        mine = part[rank * share : (rank + 1) * share]
        hidden = model([self.rows.ids[r] for r in mine], self.max_tokens)
        if world > 1:
            from torch.distributed.nn.functional import all_gather

            hidden = torch.cat(all_gather(hidden))
        classes = self.rows.classes[part]
        general = classes == GENERAL
        kind = torch.where(general, SEEMINGLY_TOXIC if config.general_share else -1, classes)
        loss = contrast = self.contrastive(hidden, kind.to(hidden.device))
        batches = len(self.plan.steps[0])
        metrics = {"loss": contrast, "contrastive_loss": contrast}
        if self.rows.reference is not None:
            kept = self.rows.reference[part][general].to(hidden.device)
            metrics["drift"] = drift(hidden[general.to(hidden.device)], kept)
            loss = metrics["loss"] = contrast + config.retention * metrics["drift"]
        return loss / batches, {k: v / batches for k, v in metrics.items()}


def held_out_measures(
    train: Tensor, train_toxic: np.ndarray, held: Tensor, held_toxic: np.ndarray
) -> dict[str, float]:
    """Cross- and within-class cosine of held-out states; AUROC and accuracy of a probe on them.

    train, held: states [n, hidden], the probe is fitted on the first; toxic [n] is 0 or 1.
    """
    unit, kind = nn.functional.normalize(held, dim=-1), torch.as_tensor(held_toxic)
    similarity, same = unit @ unit.T, kind[:, None] == kind[None]  # [n, n]
    off = ~torch.eye(len(held), dtype=torch.bool)
    score = fit_probe(train.numpy(), train_toxic).decision_function(held.numpy())
    return {
        "cross_similarity": similarity[~same].mean().item(),
        "within_similarity": similarity[same & off].mean().item(),
        "probe_auroc": float(roc_auc_score(held_toxic, score)),
        "probe_accuracy": float(((score > 0) == held_toxic).mean()),
    }


class HeldOutWatcher(TrainerCallback):
    """Held-out similarity and probe; stops training when the target is reached.

    Read at the start, the end, and every `refine.eval_steps` where there is a target; without one
    as often as takes 5 % of the stage. train, held: prompt tables under their TRUE labels, whatever
    labels training sees.
    """

    def __init__(self, trainer: RefineTrainer, tokenizer, train: pd.DataFrame, held: pd.DataFrame):
        self.trainer, self.config = trainer, trainer.plan.config
        table = pd.concat([_first(train, PROBE_ROWS), _first(held, HELD_ROWS)])
        self.prompts = PromptRows(table, tokenizer, self.config.max_length)
        self.toxic = (table["label"] == "toxic").to_numpy().astype(int)
        self.fitted = len(_first(train, PROBE_ROWS))
        self.path = trainer.plan.folder / "evaluations.jsonl"
        steps, rows = len(trainer.plan.steps), sum(len(b) for s in trainer.plan.steps for b in s)
        readings = max(2, int(SHARE * rows / (READING * len(table))))
        self.every = self.config.eval_steps
        if self.config.target <= -1:
            self.every = max(self.every, -(-steps // (readings - 1)))
        self.rows: list[dict] = []
        self.reason = "all steps done"

    def on_train_begin(self, args, state, control, **_) -> None:
        """Begin, or go on from what an interrupted training wrote."""
        self.rows = self.trainer.resumed(self.path)
        if not self.rows:
            self.measure(0)
        elif self.rows[-1]["step"] == state.global_step > 0:
            control.should_training_stop |= self.reached(self.rows[-1])

    def on_step_end(self, args, state, control, **_) -> None:
        """Do what is due behind this step."""
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        control.should_training_stop |= self.reached(self.measure(state.global_step))

    def reached(self, row: dict) -> bool:
        """Whether an evaluation meets the target, which is then the reason to stop."""
        met = -1 < self.config.target >= (cosine := row["cross_similarity"])
        if met:
            self.reason = f"held-out cross-class cosine {cosine:.3f} reached {self.config.target}"
        return met

    def measure(self, step: int) -> dict:
        """One row of evaluations, in the run's precision; written and returned."""
        trainer, n = self.trainer, self.fitted
        with autocast(trainer.args.device, trainer.plan.precision):
            states = pooled_states(trainer.stage, self.prompts, range(len(self.toxic)))
        if not states.isfinite().all():
            if not step:
                raise DCRError(
                    "refine: hidden states of the model as it was given are not finite. Look at "
                    'its weights, or load it in fp32 and pass precision="fp32".'
                )
            trainer.give_up("hidden states are no longer finite", step)
        measures = held_out_measures(states[:n], self.toxic[:n], states[n:], self.toxic[n:])
        self.rows.append({"step": step, **measures})
        if trainer.args.should_save:
            append_jsonl(self.path, self.rows[-1])
        return self.rows[-1]


def _first(table: pd.DataFrame, n: int) -> pd.DataFrame:
    """The first n prompts of each contrasted class."""
    return table[table["label"] != "general"].groupby("label").head(n)
