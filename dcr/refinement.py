"""Stage 1: contrastive refinement of the blocks below layer ℓ (paper section "Method", Proposition 1).

Toxic and seemingly toxic prompts are pulled apart at hidden state ℓ. Blocks from ℓ up and the LM head are not
executed at all, so they cannot move (τ_ℓ = 0) and cost nothing.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import set_seed

from dcr.adapters import merged, train_blocks
from dcr.config import RefineConfig
from dcr.data.forms import form_of
from dcr.errors import DCRError
from dcr.losses import ContrastiveLoss, drift
from dcr.models import decoder_layers, resolve_layer
from dcr.sampling import GENERAL, SEEMINGLY_TOXIC, contrastive_batches, shuffled_labels
from dcr.stage_one import PromptRows, StageOneModel, reference_states
from dcr.stopping import HeldOutWatcher
from dcr.training import StageTrainer, run, training_arguments

log = logging.getLogger("dcr")


@dataclass
class RefineResult:
    """The refined model, a row per step, why training stopped, and the layer ℓ that was used."""

    model: nn.Module
    history: list[dict]
    evaluations: list[dict]
    stop_reason: str
    layer: int


def refine(model, tokenizer, *, toxic: Sequence[str] | pd.DataFrame, seemingly_toxic: Sequence[str] | pd.DataFrame,
           general: Sequence[str] | pd.DataFrame | None = None, config: RefineConfig | None = None, seed: int = 0,
           work_dir: str | Path | None = None, merge: bool = True, layers_path: str = "") -> RefineResult:
    """Refine `model` so that toxic and seemingly toxic prompts part at hidden state ℓ.

    Prompts come as texts or as prompt tables (`pair_id` and `form` are used when there). With `work_dir`, history
    and checkpoints go there and an interrupted call goes on from them. `merge` folds the adapter into the weights,
    so that an ordinary transformers model comes back; otherwise the PEFT model does.
    Raises DCRError for a class that is missing or too small, ℓ out of range, an unknown loss, identical prompts
    or a loss that is not finite.
    """
    config = config or RefineConfig()
    if config.layer == "auto":
        from dcr.layer_choice import choose_layer

        choice = choose_layer(model, tokenizer, toxic=toxic, seemingly_toxic=seemingly_toxic, general=general,
                              config=config, seed=seed, work_dir=work_dir)
        config = replace(config, layer=choice.layer)
    layer = resolve_layer(config.layer, len(decoder_layers(model, layers_path)))
    loss = ContrastiveLoss(config.loss, margin=config.margin, gamma=config.gamma)
    table = prompt_table(toxic, seemingly_toxic, general)
    train, held_out = hold_out(table, config.eval_share, seed)
    if config.pairing == "sham":
        train = train.assign(label=shuffled_labels(train["label"], seed))
    steps = config.max_steps or max(1, math.ceil(config.epochs * _larger_class(train) / _places(config)))
    retention_rows = config.batch_size // 4 if config.retention and not config.general_share else 0
    batches = contrastive_batches(
        train, batch_size=config.batch_size, n_batches=steps * config.accumulation, seed=seed, pairing=config.pairing,
        toxic_share=config.toxic_share, balance_forms=config.balance_forms, general_share=config.general_share,
        retention_rows=retention_rows)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(work_dir) if work_dir is not None else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        set_seed(seed)  # before the adapter: LoRA's initialisation is random
        trainable = train_blocks(model, 0, layer, rank=config.lora_rank, alpha=2 * config.lora_rank,
                                 targets=config.lora_targets, layers_path=layers_path)
        stage = StageOneModel(trainable, layer, config.pooling, layers_path)
        dataset = PromptRows(train, tokenizer, config.max_length)
        if config.retention:
            dataset.reference = reference_states(stage, dataset, config.batch_size)
        args = training_arguments(folder, steps=steps, lr=config.lr, warmup=config.warmup, schedule="constant",
                                  accumulation=config.accumulation, save_steps=config.save_steps if work_dir else 0,
                                  bf16=config.bf16, seed=seed)
        if config.gradient_checkpointing:
            trainable.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            trainable.enable_input_require_grads()
        trainer = RefineTrainer(model=stage, dataset=dataset, collate=dataset.collate, batches=batches, args=args,
                                history=folder / "history.jsonl", title="refine", loss=loss, config=config)
        held_rows = PromptRows(held_out, tokenizer, config.max_length)
        watcher = HeldOutWatcher(trainer, stage, held_rows, dataset, config, folder)
        trainer.add_callback(watcher)
        run(trainer)
        watcher.finish()
        if config.gradient_checkpointing:
            trainable.gradient_checkpointing_disable()
        history = trainer.recorder.rows
    refined = merged(trainable) if merge else trainable.eval().requires_grad_(False)
    return RefineResult(refined, history, watcher.rows, watcher.reason, layer)


def prompt_table(toxic, seemingly_toxic, general=None) -> pd.DataFrame:
    """One table with columns text, label, form, pair_id from texts or prompt tables. Raises DCRError on bad classes."""
    parts = []
    for label, prompts in (("toxic", toxic), ("seemingly_toxic", seemingly_toxic), ("general", general)):
        part = prompts.copy() if isinstance(prompts, pd.DataFrame) else pd.DataFrame({"text": list(prompts or [])})
        part["label"] = label
        if "form" not in part:
            part["form"] = [form_of(t) for t in part["text"]]
        if "pair_id" not in part:
            part["pair_id"] = ""
        if label != "general" and len(part) < 2:
            raise DCRError(f"{label}: {len(part)} prompts given; refinement needs at least two of each class.")
        if label != "general" and part["text"].nunique() == 1:
            raise DCRError(f"{label}: all {len(part)} prompts are identical; there is nothing to contrast.")
        parts.append(part[["text", "label", "form", "pair_id"]])
    return pd.concat(parts, ignore_index=True)


def hold_out(table: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(train, held out): `share` of each class for the stop rule, minimal pairs kept on one side, general in train."""
    rng = np.random.default_rng([seed, 0xE7])
    group = np.where(table["pair_id"] != "", table["pair_id"], table.index.astype(str))
    held = np.zeros(len(table), dtype=bool)
    for label in ("toxic", "seemingly_toxic"):
        mine = (table["label"] == label).to_numpy() & ~held
        names = pd.unique(group[mine])
        want = max(2, round(share * (table["label"] == label).sum())) - int((held & (table["label"] == label)).sum())
        if want > 0:
            held |= np.isin(group, rng.permutation(names)[:want]) & (table["label"] != "general").to_numpy()
    return table[~held].reset_index(drop=True), table[held].reset_index(drop=True)


def _larger_class(table: pd.DataFrame) -> int:
    return int(table.loc[table["label"] != "general", "label"].value_counts().max())


def _places(config: RefineConfig) -> int:
    return max(1, round(config.batch_size * max(config.toxic_share, 1 - config.toxic_share)) * config.accumulation)


class RefineTrainer(StageTrainer):
    """Contrastive loss at ℓ, plus retention of the general prompts' hidden states."""

    def __init__(self, *, loss: ContrastiveLoss, config: RefineConfig, **kwargs) -> None:
        super().__init__(**kwargs)
        self.contrastive, self.config = loss, config

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden = model(inputs["input_ids"], inputs["attention_mask"])
        self.tokens += int(inputs["attention_mask"].sum())
        classes, reference = inputs["classes"], inputs.get("reference")
        if self.accelerator.num_processes > 1:  # negatives from every process; gradients flow through the gather
            from torch.distributed.nn.functional import all_gather

            hidden, classes = torch.cat(all_gather(hidden)), torch.cat(all_gather(classes))
            reference = torch.cat(all_gather(reference)) if reference is not None else None
        kind = torch.where(classes == GENERAL, SEEMINGLY_TOXIC if self.config.general_share else -1, classes)
        loss = contrast = self.contrastive(hidden, kind)
        self.metrics = {"loss": float(loss.detach()), "contrastive_loss": float(contrast.detach())}
        if reference is not None:
            general = classes == GENERAL
            kept = drift(hidden[general], reference[general])
            loss = contrast + self.config.retention * kept
            self.metrics |= {"loss": float(loss.detach()), "drift": float(kept.detach())}
        self.check_finite(loss)
        return loss
