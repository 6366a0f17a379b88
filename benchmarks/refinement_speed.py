"""Training steps as they are, against the same steps without what makes them fast.

Stage 1: only the blocks below ℓ, the common prefix once a batch, rows of like length together
("ours"); the blocks below ℓ on whole padded rows ("unshared"); the whole model with all hidden
states ("full"). Stage 2 on short rows: with and without the shared prefix. All sides train the same
adapter on the same rows; sides alternate, so that a busy machine slows all; gradients are compared.
The share of held-out evaluation is that of the profile reference-135m, from seconds measured here.

    python benchmarks/refinement_speed.py [--steps 2] [--precision fp32]

Writes benchmarks/results/refinement_speed.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from dcr import load_model
from dcr.config import load_config
from dcr.data.sets import training_sets
from dcr.lm.batches import common_prefix, padded, position_ids
from dcr.lm.blocks import decoder_layers, pool, resolve_layer
from dcr.lm.device import autocast
from dcr.run.store import environment, write_atomic
from dcr.train import contrast
from dcr.train.adapters import Lora, train_blocks
from dcr.train.align import AnswerModel
from dcr.train.contrast import HELD_ROWS, PROBE_ROWS, PromptRows, StageOneModel
from dcr.train.examples import Examples
from dcr.train.losses import ContrastiveLoss
from dcr.train.refine import prompt_table
from dcr.train.sampling import batch_plan, contrastive_batches, length_grouped_batches

OUT = Path(__file__).parent / "results" / "refinement_speed.json"
LOSS = ContrastiveLoss()


def compare(sides: dict[str, Callable[[list], Tensor]], batches: list, stage: nn.Module) -> dict:
    """Seconds of CPU and clock a step of each side, ratios to "ours", and how far gradients
    differ."""
    cpu, wall = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0.0)
    apart = 0.0
    for number, batch in enumerate(batches):  # the first warms up
        found = {}
        for name, loss_of in sides.items():
            stage.zero_grad()
            began = time.process_time(), time.perf_counter()
            loss_of(batch).backward()
            if number:
                cpu[name] += time.process_time() - began[0]
                wall[name] += time.perf_counter() - began[1]
            found[name] = torch.cat(
                [p.grad.flatten() for p in stage.parameters() if p.requires_grad]
            )
        ours = found.pop("ours")
        apart = max(apart, *((ours - g).norm().item() / g.norm().item() for g in found.values()))
    n = len(batches) - 1
    return {
        "cpu_seconds_a_step": {k: round(v / n, 3) for k, v in cpu.items()},
        "seconds_a_step": {k: round(v / n, 3) for k, v in wall.items()},
        "cpu_ratio_to_ours": {k: round(v / cpu["ours"], 2) for k, v in cpu.items()},
        "largest_relative_gradient_difference": apart,
    }


def stage_one(options) -> dict:
    config = load_config(options.profile)
    model, tokenizer = load_model("embedded", precision="fp32", device="cpu")
    sets = training_sets(config)
    table = prompt_table(sets.toxic, sets.seemingly_toxic)
    rows = PromptRows(table, tokenizer, 256)
    plan = batch_plan(config.refine)
    batches = contrastive_batches(table, plan, n_batches=options.steps + 1, seed=0)
    layer = resolve_layer(config.refine.layer, len(decoder_layers(model)))
    stage = StageOneModel(train_blocks(model, 0, layer, Lora(16, 32)), layer, "last").train()

    def ours(batch: list) -> Tensor:
        with autocast("cpu", options.precision):
            return LOSS(stage([rows.ids[r] for r in batch], 10**9), rows.classes[batch])

    def unshared(batch: list) -> Tensor:
        off = mock.patch.object(contrast, "common_prefix", lambda rows: 0)
        with off, mock.patch.object(contrast, "ROWS_AT_ONCE", 0):
            return ours(batch)

    def full(batch: list) -> Tensor:
        ids, mask = padded([rows.ids[r] for r in batch], "right")
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
        with autocast("cpu", options.precision):
            states = stage.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
            return LOSS(pool(states[layer], mask), rows.classes[batch])

    sides = {"ours": ours, "unshared": unshared, "full": full}
    result = compare(sides, batches, stage)
    which = range(min(2 * (PROBE_ROWS + HELD_ROWS), len(rows.ids)))
    began = time.process_time()
    with autocast("cpu", options.precision):
        contrast.pooled_states(stage, rows, which)
    evaluation = time.process_time() - began
    paper = load_config("reference-135m").refine
    trained = paper.max_steps * paper.batch_size
    times = max(2, int(contrast.SHARE * trained / (contrast.READING * len(which))))
    train = paper.max_steps * result["cpu_seconds_a_step"]["ours"]
    share = times * evaluation / (times * evaluation + train)
    held_out = {"rows": len(which), "cpu_seconds": round(evaluation, 3), "share": round(share, 4)}
    return {"layer": layer, "batch": config.refine.batch_size, **result, "held_out": held_out}


def stage_two(options) -> dict:
    config = load_config(options.profile)
    model, tokenizer = load_model("embedded", precision="fp32", device="cpu")
    rows = Examples(training_sets(config).mix, tokenizer, config.align.replaced(max_length=96))
    size = config.align.batch_size
    batches = length_grouped_batches(rows.lengths, size, options.steps + 1, 0)
    targets = ("q_proj", "k_proj", "v_proj")
    model = train_blocks(model, 0, len(decoder_layers(model)), Lora(8, 16, targets))
    stage = AnswerModel(model).train()

    def loss_of(batch: list, share: bool) -> Tensor:
        shared = common_prefix([rows.ids[r][: rows.heads[r]] for r in batch]) if share else 0
        with autocast("cpu", options.precision):
            return stage(rows.collate(batch), shared)[0] / rows.labels(batch)

    sides = {"ours": lambda b: loss_of(b, True), "unshared": lambda b: loss_of(b, False)}
    lengths = sum(rows.lengths[r] for b in batches for r in b) / sum(map(len, batches))
    return {"batch": size, "tokens_a_row": round(lengths, 1), **compare(sides, batches, stage)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--profile", default="embedded")
    options = parser.parse_args()
    torch.manual_seed(0)
    result = {
        "profile": options.profile,
        "precision": options.precision,
        "steps": options.steps,
        "refine": stage_one(options),
        "align": stage_two(options),
        "environment": environment(),
    }
    write_atomic(OUT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    shown = {k: v for k, v in result.items() if k != "environment"}
    print(json.dumps(shown, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
