"""Stage 1: contrastive refinement of the blocks below layer ℓ (paper, "Method", Proposition 1).

Toxic and seemingly toxic prompts are pulled apart at hidden state ℓ. Blocks from ℓ up and the LM
head are not executed at all, so they cannot move (τ_ℓ = 0) and cost nothing.
"""

import logging
from collections.abc import Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn
from transformers import set_seed

from dcr.analysis.probes import best_layer
from dcr.config import RefineConfig
from dcr.data.pairs import leakage_report, normalised, requests_of
from dcr.data.read import prompts_of
from dcr.errors import DCRError
from dcr.lm.blocks import decoder_layers, fingerprint, resolve_layer
from dcr.lm.device import resolve_precision
from dcr.lm.states import hidden_states
from dcr.train.adapters import Lora, merged, train_blocks
from dcr.train.contrast import (
    HeldOutWatcher,
    PromptRows,
    RefineTrainer,
    StageOneModel,
    reference_states,
)
from dcr.train.record import planned
from dcr.train.sampling import (
    batch_plan,
    batches_per_epoch,
    contrastive_batches,
    shuffled_labels,
    training_steps,
)

log = logging.getLogger("dcr")


@dataclass
class RefineResult:
    """The refined model and how it came about.

    history: a row per optimiser step. evaluations: held-out rows. leakage: overlaps with the
    evaluation prompts. layers: layer, auroc, log_loss of the probe when `layer="auto"`.
    """

    model: nn.Module
    history: list[dict]
    evaluations: list[dict]
    stop_reason: str
    layer: int
    leakage: pd.DataFrame = field(default_factory=pd.DataFrame)
    layers: pd.DataFrame = field(default_factory=pd.DataFrame)


def refine(  # noqa: PLR0913
    model,
    tokenizer,
    *,
    toxic,
    seemingly_toxic,
    general=None,
    config: RefineConfig | None = None,
    seed: int = 0,
    evaluation=None,
    work_dir: str | Path | None = None,
    merge: bool = True,
    precision: str = "auto",
    layers_path: str = "",
) -> RefineResult:
    """Refine `model` (in place) so that toxic and seemingly toxic prompts part at hidden state ℓ.

    toxic, seemingly_toxic, general: whatever holds prompts (lists, Series, frames, paths; see
        `dcr.data.read.prompts_of`); `form` and `pair_id` are used when there.
    evaluation: prompts to be judged later; what they share with training is reported before it.
    work_dir: history and resume points go there; an interrupted call goes on from them.
    merge: fold the adapter into the weights (in fp32) and return an ordinary transformers model;
        otherwise the PEFT model.
    precision: "bf16" (autocast), "fp32", or "auto": bf16 where the hardware multiplies it natively.
    Raises DCRError for a class that is missing or too small, ℓ out of range, identical prompts, a
    work folder of another training, or a loss that is not finite.
    """
    config = config or RefineConfig()
    table = prompt_table(toxic, seemingly_toxic, general)
    overlaps = overlap_report(table, evaluation)
    train, held_out = hold_out(table, config.eval_share, seed)
    precision = resolve_precision(precision, str(model.device))
    layers = pd.DataFrame()
    if config.layer == "auto":
        contrast = train[train["label"] != "general"]
        texts = contrast["text"].tolist()
        states = hidden_states(
            model, tokenizer, texts, pooling=config.pooling, layers_path=layers_path
        )
        layer, layers = best_layer(states, contrast, seed=seed)
        log.info("refine: layer=auto chose layer %d", layer)
    else:
        layer = resolve_layer(config.layer, len(decoder_layers(model, layers_path)))
    seen = train  # under the labels that training sees
    if config.pairing == "sham":
        seen = train.assign(label=shuffled_labels(train["label"], seed))
    batches = batch_plan(config)
    draw = partial(contrastive_batches, seen, batches, seed=seed)
    steps = training_steps(config, batches_per_epoch(seen, batches), draw)
    made_from = {"model": fingerprint(model, tokenizer), "prompts": table.to_dict("records")}
    made_from["layers_path"] = layers_path
    fields = {"title": "refine", "config": config, "seed": seed, "precision": precision}
    with planned(work_dir, made_from, steps=steps, **fields) as plan:
        set_seed(seed)  # before the adapter: LoRA's initialisation is random
        lora = Lora(config.lora_rank, 2 * config.lora_rank, config.lora_targets)
        how = {"precision": precision, "layers_path": layers_path}
        trainable = train_blocks(model, 0, layer, lora, **how)
        stage = StageOneModel(trainable, layer, config.pooling, layers_path)
        rows = PromptRows(seen, tokenizer, config.max_length)
        if config.retention:
            rows.reference = reference_states(stage, rows)
        trainer = RefineTrainer(stage, rows, plan)
        watcher = HeldOutWatcher(trainer, tokenizer, train, held_out)
        trainer.add_callback(watcher)
        history = trainer.fit()
    log.info("refine: stopped at step %d: %s", len(history), watcher.reason)
    refined = merged(trainable) if merge else trainable.eval()
    return RefineResult(refined, history, watcher.rows, watcher.reason, layer, overlaps, layers)


def prompt_table(toxic, seemingly_toxic, general=None) -> pd.DataFrame:
    """One prompt table of all that is given, `request` joined across the classes.

    Raises DCRError for a class that is missing or all one prompt, or a prompt in both classes.
    """
    given = {"toxic": toxic, "seemingly_toxic": seemingly_toxic, "general": general}
    parts = []
    for label, prompts in given.items():
        if prompts is None or (isinstance(prompts, Sized) and not len(prompts)):
            part = pd.DataFrame({"text": []})
        else:
            part = prompts_of(prompts, what=label, label=label)
        if label != "general" and part["text"].nunique() < 2:
            raise DCRError(
                f"{label}: {len(part)} prompts given, {part['text'].nunique()} of them different; "
                "refinement contrasts at least two of each class."
            )
        parts.append(part)
    words = [{normalised(t): i for i, t in enumerate(part["text"])} for part in parts[:2]]
    for text in words[0].keys() & words[1].keys():
        raise DCRError(
            f"toxic prompt {words[0][text]} is also seemingly toxic prompt {words[1][text]} "
            f"({text[:60]!r}); a prompt has one label. Drop it from one of the two."
        )
    table = pd.concat([p for p in parts if len(p)], ignore_index=True)
    table = table[["id", "text", "label", "form", "source", "pair_id"]]
    # the two members of a pair come from two sources, and one id may stand in both
    return table.assign(
        request=requests_of(table.assign(id=table["label"] + table["id"], source=""))
    )


def overlap_report(table: pd.DataFrame, evaluation) -> pd.DataFrame:
    """Training prompts met again, exactly or nearly, among the evaluation prompts; logged."""
    if evaluation is None:
        return leakage_report(table.iloc[:0], table.iloc[:0])
    other = prompts_of(evaluation, what="evaluation")
    report = leakage_report(table, other)
    exact = report.loc[report["kind"] == "exact", "test_id"].nunique()
    log.log(
        logging.WARNING if len(report) else logging.INFO,
        "refine: %d of %d evaluation prompts overlap with training prompts (%d exactly)",
        *(report["test_id"].nunique(), len(other), exact),
    )
    return report


def hold_out(table: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(train, held out): whole requests until `share` of each class is held out; general in train.

    A request is on one side with both its forms and both members of its minimal pairs. Raises
    DCRError where that leaves a class nothing to train on.
    """
    contrast = table["label"] != "general"
    order = np.random.default_rng([seed, 0xE7]).permutation(
        table["request"][contrast].unique().tolist()
    )
    held = pd.Series(False, index=table.index)
    for label in ("toxic", "seemingly_toxic"):
        mine = table["label"] == label
        want = max(2, round(share * mine.sum()))
        for request in order:
            if (held & mine).sum() >= want:
                break
            if (mine & (table["request"] == request)).any():
                held |= contrast & (table["request"] == request)
    if table["label"][contrast & ~held].nunique() < 2:
        counts = table[contrast].groupby("label", sort=False)["request"].nunique()
        found = " and ".join(f"{n} {label}" for label, n in counts.items())
        raise DCRError(
            f"refine: the prompts make {found} requests in all, and those held out whole "
            "(refine.eval_share) leave one class nothing to train on. Give prompts that ask for "
            "more different things."
        )
    return table[~held].reset_index(drop=True), table[held].reset_index(drop=True)
