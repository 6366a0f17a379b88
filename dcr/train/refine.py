"""Stage 1: contrastive refinement of the blocks below layer ℓ (paper section "Method", Proposition 1).

Toxic and seemingly toxic prompts are pulled apart at hidden state ℓ. Blocks from ℓ up and the LM head are not
executed at all, so they cannot move (τ_ℓ = 0) and cost nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import set_seed

from dcr.config import RefineConfig
from dcr.data.files import content_key, write_atomic
from dcr.data.forms import form_of
from dcr.data.pairs import leakage_report, normalised
from dcr.errors import DCRError
from dcr.lm.blocks import decoder_layers, resolve_layer
from dcr.lm.generate import inference_dtype
from dcr.train.adapters import merged, train_blocks
from dcr.train.contrast import PromptRows, RefineTrainer, StageOneModel, reference_states
from dcr.train.loop import run, training_arguments
from dcr.train.losses import ContrastiveLoss
from dcr.train.sampling import batch_plan, contrastive_batches, shuffled_labels
from dcr.train.watch import HeldOutWatcher

log = logging.getLogger("dcr")


@dataclass
class RefineResult:
    """The refined model and how it came about.

    history: a row per optimiser step; its last row carries `stop_reason` and `best_step`. evaluations: held-out
    rows. leakage: overlaps with the evaluation prompts. layer_sweep: one row a candidate when `layer="auto"`.
    """

    model: nn.Module
    history: list[dict]
    evaluations: list[dict]
    stop_reason: str
    layer: int
    leakage: pd.DataFrame = field(default_factory=pd.DataFrame)
    layer_sweep: list[dict] = field(default_factory=list)


def refine(
    model,
    tokenizer,
    *,
    toxic: Sequence[str] | pd.DataFrame,
    seemingly_toxic: Sequence[str] | pd.DataFrame,
    general: Sequence[str] | pd.DataFrame | None = None,
    config: RefineConfig | None = None,
    seed: int = 0,
    evaluation: Sequence[str] | pd.DataFrame | None = None,
    work_dir: str | Path | None = None,
    merge: bool = True,
    precision: str = "auto",
    layers_path: str = "",
) -> RefineResult:
    """Refine `model` so that toxic and seemingly toxic prompts part at hidden state ℓ.

    Prompts come as texts or as prompt tables (`pair_id` and `form` are used when there). With `work_dir`, history
    and checkpoints go there and an interrupted call goes on from them. `merge` folds the adapter into the weights,
    so that an ordinary transformers model comes back; otherwise the PEFT model does. `evaluation`: prompts to be
    judged later; what they share with the training prompts is reported before training.
    Raises DCRError for a class that is missing or too small, ℓ out of range, an unknown loss, identical prompts,
    a work folder of other settings, or a loss that is not finite.
    """
    config = config or RefineConfig()
    loss = ContrastiveLoss(config.loss, margin=config.margin, gamma=config.gamma)
    table = prompt_table(toxic, seemingly_toxic, general)
    overlaps = overlap_report(table, evaluation)
    trained_before = {n for n, p in model.named_parameters() if p.requires_grad}
    sweep: list[dict] = []
    if config.layer == "auto":
        from dcr.train.layer_choice import choose_layer

        choice = choose_layer(
            model,
            tokenizer,
            toxic=toxic,
            seemingly_toxic=seemingly_toxic,
            general=general,
            config=config,
            seed=seed,
            work_dir=work_dir,
            layers_path=layers_path,
        )
        config, sweep = config.replaced(layer=choice.layer), choice.table
    layer = resolve_layer(config.layer, len(decoder_layers(model, layers_path)))
    train, held_out = hold_out(table, config.eval_share, seed)
    if config.pairing == "sham":
        train = train.assign(label=shuffled_labels(train["label"], seed))
    plan = batch_plan(
        batch_size=config.batch_size,
        pairing=config.pairing,
        toxic_share=config.toxic_share,
        balance_forms=config.balance_forms,
        general_share=config.general_share,
        retention_rows=config.batch_size // 4
        if config.retention and not config.general_share
        else 0,
    )
    steps = config.max_steps or max(
        1, math.ceil(config.epochs * plan.per_epoch(train) / config.accumulation)
    )
    batches = contrastive_batches(train, plan, n_batches=steps * config.accumulation, seed=seed)
    with _work_folder(work_dir) as folder:
        _claim(folder, config, table, seed)
        args = training_arguments(
            folder,
            steps=steps,
            lr=config.lr,
            warmup=config.warmup,
            schedule="constant",
            accumulation=config.accumulation,
            save_steps=config.save_steps if work_dir else 0,
            bf16=inference_dtype(precision, str(model.device)) is torch.bfloat16,
            seed=seed,
        )
        if args.world_size > 1 and (work_dir is None or len(batches[0]) % args.world_size):
            raise DCRError(
                f"refinement in {args.world_size} processes needs a work_dir that all of them see, and batches "
                f"({len(batches[0])} prompts) that divide among them; set both."
            )
        set_seed(seed)  # before the adapter: LoRA's initialisation is random
        trainable = train_blocks(
            model,
            0,
            layer,
            rank=config.lora_rank,
            alpha=2 * config.lora_rank,
            targets=config.lora_targets,
            layers_path=layers_path,
        )
        stage = StageOneModel(trainable, layer, config.pooling, layers_path)
        dataset = PromptRows(train, tokenizer, config.max_length)
        if config.retention:
            dataset.reference = reference_states(stage, dataset, config.batch_size)
        if config.gradient_checkpointing:
            trainable.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        trainer = RefineTrainer(
            model=stage,
            dataset=dataset,
            collate=dataset.collate,
            batches=batches,
            args=args,
            history=folder / "history.jsonl",
            title="refine",
            loss=loss,
            config=config,
        )
        held_rows = PromptRows(held_out, tokenizer, config.max_length)
        watcher = HeldOutWatcher(trainer, stage, held_rows, dataset, config, folder)
        trainer.add_callback(watcher)
        run(trainer)
        watcher.finish()
        if config.gradient_checkpointing:
            trainable.gradient_checkpointing_disable()
        history = trainer.recorder.rows
    refined = merged(trainable) if merge else trainable.eval()
    for name, parameter in refined.named_parameters() if merge else ():
        parameter.requires_grad_(
            name in trained_before
        )  # as it came, so that any training can follow
    return RefineResult(refined, history, watcher.rows, watcher.reason, layer, overlaps, sweep)


@contextlib.contextmanager
def _work_folder(work_dir: str | Path | None) -> Iterator[Path]:
    if work_dir is not None:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        yield Path(work_dir)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def _claim(folder: Path, config: RefineConfig, table: pd.DataFrame, seed: int) -> None:
    """Note whose checkpoints the folder holds; refuse to go on from those of other settings or prompts."""
    key = content_key([str(config.model_dump()), seed, table.to_dict("records")])
    note = folder / "refine.json"
    held = json.loads(note.read_text(encoding="utf-8")).get("key") if note.exists() else key
    if held != key and any(folder.glob("checkpoint-*")):
        raise DCRError(
            f"{folder} holds checkpoints of a refinement with other settings, prompts or seed. Choose another "
            "work_dir, or delete it."
        )
    write_atomic(note, json.dumps({"key": key}))


def overlap_report(
    table: pd.DataFrame, evaluation: Sequence[str] | pd.DataFrame | None
) -> pd.DataFrame:
    """Training prompts met again, exactly or nearly, among the evaluation prompts (see `leakage_report`); logged."""
    if evaluation is None:
        return leakage_report(_with_ids(table.iloc[:0]), _with_ids(table.iloc[:0]))
    other = (
        evaluation
        if isinstance(evaluation, pd.DataFrame)
        else pd.DataFrame({"text": list(evaluation)})
    )
    report = leakage_report(_with_ids(table), _with_ids(other))
    log.log(
        logging.WARNING if len(report) else logging.INFO,
        "refine: %d of %d evaluation prompts overlap with training prompts (%d exactly)",
        report["test_id"].nunique(),
        len(other),
        (report["kind"] == "exact").sum(),
    )
    return report


def _with_ids(rows: pd.DataFrame) -> pd.DataFrame:
    return rows if "id" in rows else rows.assign(id=[f"row {i}" for i in range(len(rows))])


def prompt_table(toxic, seemingly_toxic, general=None) -> pd.DataFrame:
    """One table with columns text, label, form, pair_id from texts or prompt tables. Raises DCRError on bad classes."""
    parts = []
    for label, prompts in (
        ("toxic", toxic),
        ("seemingly_toxic", seemingly_toxic),
        ("general", general),
    ):
        part = (
            prompts.copy()
            if isinstance(prompts, pd.DataFrame)
            else pd.DataFrame({"text": list(prompts or [])})
        )
        part["label"] = label
        if "form" not in part:
            part["form"] = [form_of(t) for t in part["text"]]
        if "pair_id" not in part:
            part["pair_id"] = ""
        if label != "general" and len(part) < 2:
            raise DCRError(
                f"{label}: {len(part)} prompts given; refinement needs at least two of each class."
            )
        if label != "general" and part["text"].nunique() == 1:
            raise DCRError(
                f"{label}: all {len(part)} prompts are identical; there is nothing to contrast."
            )
        parts.append(part[["text", "label", "form", "pair_id"]])
    words = [{normalised(t): i for i, t in enumerate(part["text"])} for part in parts[:2]]
    for text in words[0].keys() & words[1].keys():
        raise DCRError(
            f"toxic prompt {words[0][text]} is also seemingly toxic prompt {words[1][text]}; a prompt has one "
            "label. Drop it from one of the two."
        )
    return pd.concat(parts, ignore_index=True)


def hold_out(table: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(train, held out): `share` of each class for the stop rule, minimal pairs kept on one side, general in train."""
    rng = np.random.default_rng([seed, 0xE7])
    group = np.where(table["pair_id"] != "", table["pair_id"], table.index.astype(str))
    held = np.zeros(len(table), dtype=bool)
    for label in ("toxic", "seemingly_toxic"):
        mine = (table["label"] == label).to_numpy() & ~held
        names = pd.unique(group[mine])
        want = max(2, round(share * (table["label"] == label).sum())) - int(
            (held & (table["label"] == label)).sum()
        )
        if want > 0:
            held |= (
                np.isin(group, rng.permutation(names)[:want])
                & (table["label"] != "general").to_numpy()
            )
    return table[~held].reset_index(drop=True), table[held].reset_index(drop=True)
