"""Stage 2 against TRL's SFTTrainer: same model, data, batches, LoRA, optimiser and dtype; tokens a
second and losses.

TRL is needed here only. Put it beside the environment, not into it:

    pip install --no-deps --target /tmp/trl trl
    PYTHONPATH=/tmp/trl python benchmarks/alignment_speed.py --steps 24

Three runs alternate, `--rounds` times, and the best rate of each counts: ours; TRL on our batches
(gradient checkpointing,
which TRL turns on, off for both); TRL with its own shuffled batches, as it ships. Writes
results/alignment_speed.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, set_seed

import dcr
from dcr.config import AlignConfig, load_config
from dcr.data.sets import training_sets
from dcr.lm.blocks import decoder_layers
from dcr.run.store import environment, write_atomic
from dcr.train.adapters import Lora, train_blocks
from dcr.train.align import align
from dcr.train.examples import Examples
from dcr.train.sampling import length_grouped_batches

WARMUP = 2  # steps that are not timed


def matrix_rate(seconds: float = 1.0) -> float:
    """Floating-point operations a second of a bf16 product of a small model's shapes."""
    a, b = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((1024, 576), (576, 1536)))
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        a @ b
        count += 1
    return 2 * 1024 * 576 * 1536 * count / (time.perf_counter() - began)


class Clock(TrainerCallback):
    """Time at the end of each step, and the losses TRL logs."""

    def __init__(self) -> None:
        self.times, self.losses = [], []

    def on_step_end(self, args, state, control, **_) -> None:
        self.times.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def ours(mix, config: AlignConfig, seed: int) -> dict:
    """{losses, tokens (of each step), seconds} of our trainer."""
    model, tokenizer = dcr.load_model("embedded", precision="fp32", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        history = align(
            model, tokenizer, mix, config=config, seed=seed, work_dir=folder, precision="bf16"
        ).history
    seconds, tokens = [r["seconds"] for r in history], [r["tokens"] for r in history]
    return {
        "losses": [r["loss"] for r in history],
        "tokens": tokens[-1] - tokens[WARMUP - 1],
        "seconds": seconds[-1] - seconds[WARMUP - 1],
    }


def theirs(mix, config: AlignConfig, seed: int, batches: list[list[int]] | None) -> dict:
    """The same of TRL's; `batches` fixes the rows of each step, None leaves them to TRL's own
    shuffling."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = dcr.load_model("embedded", precision="fp32", device="cpu")
    examples = Examples(mix, tokenizer, config)
    order = [r for b in batches for r in b] if batches else range(len(examples.ids))
    rows = [
        {
            "input_ids": examples.ids[r],
            "completion_mask": [int(i >= examples.starts[r]) for i in range(len(examples.ids[r]))],
        }
        for r in order
    ]
    set_seed(seed)
    model = train_blocks(
        model,
        0,
        len(model.model.layers),
        Lora(config.lora_rank, config.lora_alpha, config.lora_targets, config.lora_dropout),
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            max_steps=config.max_steps,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.lr,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch",
            bf16=True,
            gradient_checkpointing=False,
            use_cpu=True,
            seed=seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            completion_only_loss=True,
            max_length=config.max_length,
            dataloader_pin_memory=False,
            **({"train_sampling_strategy": "sequential"} if batches else {}),
        )
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        read = []
        collate = trainer.data_collator
        trainer.data_collator = lambda items: (
            read.append(sum(len(i["input_ids"]) for i in items)) or collate(items)
        )
        trainer.train()
    return {
        "losses": clock.losses[: config.max_steps],
        "tokens": sum(read[WARMUP : config.max_steps]),
        "seconds": clock.times[-1] - clock.times[WARMUP - 1],
    }


def main() -> None:
    """Run, compare, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--out", default=str(Path(__file__).parent / "results" / "alignment_speed.json")
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    profile = load_config("quick")
    mix = training_sets(profile).mix
    config = AlignConfig(
        batch_size=16,
        max_steps=options.steps,
        warmup=0.0,
        checkpoints="last",
    )
    model, tokenizer = dcr.load_model("embedded", precision="fp32", device="cpu")
    examples = Examples(mix, tokenizer, config)
    batches = length_grouped_batches(examples.lengths, config.batch_size, options.steps, 0)
    labelled = sum(examples.labels(b) for b in batches[WARMUP:])
    blocks = sum(p.numel() for p in decoder_layers(model).parameters())
    head = model.get_output_embeddings().weight.numel()
    del model
    rates, runs = [], {"ours": [], "trl": [], "trl_own_batches": []}
    for _ in range(options.rounds):
        rates.append(matrix_rate())
        runs["ours"].append(ours(mix, config, 0))
        runs["trl"].append(theirs(mix, config, 0, batches))
        runs["trl_own_batches"].append(theirs(mix, config, 0, None))
    speed = {name: max(r["tokens"] / r["seconds"] for r in each) for name, each in runs.items()}
    best = min(runs["ours"], key=lambda r: r["seconds"] / r["tokens"])
    flops = (
        4 * blocks * best["tokens"] + 4 * head * labelled
    )  # forward and gradients of activations
    gap = [
        abs(a - b) for a, b in zip(runs["ours"][0]["losses"], runs["trl"][0]["losses"], strict=True)
    ]
    result = {
        "model": "embedded",
        "steps": options.steps,
        "batch_size": config.batch_size,
        "lora_rank": config.lora_rank,
        "lora_targets": list(config.lora_targets),
        "dtype": "bfloat16 autocast",
        "threads": options.threads,
        "tokens_per_second": speed,
        "ratio_same_batches": speed["ours"] / speed["trl"],
        "ratio_trl_own_batches": speed["ours"] / speed["trl_own_batches"],
        "largest_loss_difference": max(gap),
        "mean_loss_difference": sum(gap) / len(gap),
        "losses": {n: runs[n][0]["losses"] for n in ("ours", "trl")},
        "matrix_rate_gflops": max(rates) / 1e9,
        "share_of_matrix_rate": flops / best["seconds"] / max(rates),
        "environment": environment(),
    }
    write_atomic(Path(options.out), json.dumps(result, indent=1) + "\n")
    print(
        json.dumps(
            {k: v for k, v in result.items() if k not in ("environment", "losses")}, indent=1
        )
    )


if __name__ == "__main__":
    main()
