"""A stage-1 step that runs only the blocks below ℓ, against the same step with the whole model and all hidden states.

Both train the same LoRA adapter below ℓ on the same padded batches in one dtype; only the forward pass differs.
Timings alternate between the two, so that a busy machine slows both. Peak memory is measured in a process of its own.

    python benchmarks/refinement_speed.py [--steps 6] [--dtype fp32]

Writes benchmarks/results/refinement_speed.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from dcr import load_model
from dcr.data.sets import training_sets
from dcr.lm.batches import position_ids
from dcr.lm.blocks import decoder_layers, pool, resolve_layer
from dcr.lm.load import DTYPES
from dcr.run.store import environment, write_atomic
from dcr.train.adapters import train_blocks
from dcr.train.contrast import PromptRows, StageOneModel
from dcr.train.losses import ContrastiveLoss
from dcr.train.refine import prompt_table
from dcr.train.sampling import batch_plan, contrastive_batches

OUT = Path(__file__).parent / "results" / "refinement_speed.json"


def setting(dtype: str, layer: float, batch: int, steps: int):
    from dcr.config import load_config

    torch.manual_seed(0)
    model, tokenizer = load_model("embedded", precision="fp32")
    model = model.to(DTYPES[dtype])
    index = resolve_layer(layer, len(decoder_layers(model)))
    sets = training_sets(load_config("embedded"))
    toxic, harmless = sets.toxic, sets.seemingly_toxic
    rows = PromptRows(prompt_table(toxic, harmless), tokenizer, 256)
    table = prompt_table(toxic, harmless)
    schedule = contrastive_batches(table, batch_plan(batch_size=batch), n_batches=steps, seed=0)
    trainable = train_blocks(model, 0, index, rank=16, alpha=32)
    return trainable, index, [rows.collate(b) for b in schedule]


def step(kind: str, stage: StageOneModel, inputs: dict, loss: ContrastiveLoss) -> float:
    """One forward and backward pass; the loss's value."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if kind == "truncated":
        hidden = stage(ids, mask)
    else:
        states = stage.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids(mask),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        hidden = pool(states[stage.layer], mask)
    value = loss(hidden, inputs["classes"])
    value.backward()
    stage.zero_grad(set_to_none=True)
    return float(value.detach())


def matrix_rate(dtype: torch.dtype, m: int, k: int, n: int, seconds: float = 1.0) -> float:
    """Floating-point operations a second of a matrix product of the model's own shapes."""
    a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    a @ b
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ b
        count += 1
    return 2 * m * k * n * count / (time.perf_counter() - started)


def operations(model, layer: int, tokens: int) -> float:
    """Matrix operations of a truncated step: forward and backward through frozen weights (2 + 2 a weight and token)."""
    weights = sum(
        p.numel()
        for b in list(decoder_layers(model))[:layer]
        for n, p in b.named_parameters()
        if "lora" not in n
    )
    adapters = sum(
        p.numel()
        for b in list(decoder_layers(model))[:layer]
        for n, p in b.named_parameters()
        if "lora" in n
    )
    return tokens * (4 * weights + 6 * adapters)


def resident(field: str) -> float:
    """MiB of this process, now (VmRSS) or at most (VmHWM); Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def peak(kind: str, args) -> float:
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        kind,
        "--dtype",
        args.dtype,
        "--layer",
        str(args.layer),
        "--batch",
        str(args.batch),
        "--steps",
        "1",
    ]
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    parser.add_argument("--layer", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--memory-of", default="")
    args = parser.parse_args()
    model, layer, batches = setting(args.dtype, args.layer, args.batch, args.steps)
    stage, loss = StageOneModel(model, layer, "last"), ContrastiveLoss()
    stage.train()
    if args.memory_of:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
        before = resident("VmRSS")
        step(args.memory_of, stage, batches[0], loss)
        print(round(resident("VmHWM") - before, 1))
        return
    seconds, values = {"truncated": [], "full": []}, {"truncated": [], "full": []}
    for kind in seconds:
        step(kind, stage, batches[0], loss)  # warm-up
    for inputs in batches:
        for kind in seconds:
            started = time.process_time(), time.perf_counter()
            values[kind].append(step(kind, stage, inputs, loss))
            seconds[kind].append(
                (time.process_time() - started[0], time.perf_counter() - started[1])
            )
    cpu, wall = ({k: sum(t[i] for t in v) for k, v in seconds.items()} for i in (0, 1))
    tokens = sum(b["input_ids"].numel() for b in batches)
    width, inner = model.config.hidden_size, model.config.intermediate_size
    rates = {
        d: matrix_rate(DTYPES[d], batches[0]["input_ids"].numel(), width, inner)
        for d in dict.fromkeys((args.dtype, "bf16"))
    }
    own = operations(model, layer, tokens) / wall["truncated"]
    result = {
        "what": "stage-1 step, blocks below ℓ only, against the whole model with output_hidden_states=True",
        "layer": layer,
        "blocks": len(decoder_layers(model)),
        "dtype": args.dtype,
        "batch": args.batch,
        "steps": args.steps,
        "padded_tokens": tokens,
        "cpu_ratio_full_over_truncated": round(cpu["full"] / cpu["truncated"], 3),
        "wall_ratio_full_over_truncated": round(wall["full"] / wall["truncated"], 3),
        "seconds_a_step": {k: round(v / args.steps, 3) for k, v in wall.items()},
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*values.values(), strict=True)),
        "peak_memory_of_a_step_mib": {k: peak(k, args) for k in seconds},
        "step_gflops": round(own / 1e9, 2),
        "matrix_rate_gflops": {k: round(v / 1e9, 2) for k, v in rates.items()},
        "share_of_matrix_rate": {k: round(own / v, 3) for k, v in rates.items()},
        "environment": environment(),
    }
    path = OUT if args.dtype == "fp32" else OUT.with_stem(f"{OUT.stem}_{args.dtype}")
    write_atomic(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(
        json.dumps(
            {k: v for k, v in result.items() if k != "environment"}, indent=1, ensure_ascii=False
        )
    )


if __name__ == "__main__":
    main()
