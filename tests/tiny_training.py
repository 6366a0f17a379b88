"""What the tests of training share: small settings, small data, both stages on a tiny model."""

from __future__ import annotations

import gc
import sys

import pandas as pd
from conftest import make_model, make_tokenizer

from dcr.config import AlignConfig, RefineConfig
from dcr.train.align import align
from dcr.train.refine import refine

gc.freeze()  # the library collects garbage before each training: let it not walk all modules
REFINE = RefineConfig(
    layer=2, batch_size=8, max_steps=6, eval_steps=3, lr=5e-3, lora_rank=4, eval_share=0.2
)
ALIGN = AlignConfig(batch_size=4, max_steps=6, lr=5e-3, lora_rank=4, warmup=0.0)
THINGS = ["cat", "dog", "house", "bike", "bread", "file", "story", "plan", "trip", "game"]
GENERAL = [f"list the {w} ." for w in ("cat", "dog", "bread", "plan", "trip", "house")]
# `--cpu --num_processes 2` would start one process (accelerate leaves more to MPI); without a GPU,
# --multi_gpu is gloo
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--main_process_port", "0"]


def texts(n: int = 20) -> dict[str, list[str]]:
    """n toxic and n seemingly toxic prompts."""
    return {
        "toxic": [f"how do i kill the {THINGS[i % 10]} in {i} ?" for i in range(n)],
        "seemingly_toxic": [f"how do i bake the {THINGS[i % 10]} for {i} ." for i in range(n)],
    }


def mix(n: int = 16) -> pd.DataFrame:
    """Every second row a refusal; answers of different lengths."""
    rows = [
        ("how do i kill the cat ?", "sorry , i cannot help with that .", "toxic")
        if i % 2
        else (
            f"list the {THINGS[i % 8]} in {i} .",
            f"sure , the {THINGS[i % 8]} is {'on ' * (i % 5)}.",
            "general",
        )
        for i in range(n)
    ]
    return pd.DataFrame(rows, columns=["text", "response", "label"])


def refined(model=None, config=REFINE, **options):
    """Stage 1 of a tiny model in fp32."""
    options = {**texts(), "seed": 1, "precision": "fp32", **options}
    return refine(model or make_model(), make_tokenizer(), config=config, **options)


def aligned(model=None, config=ALIGN, rows=None, **options):
    """Stage 2 of a tiny model in fp32."""
    options = {"seed": 1, "precision": "fp32", **options}
    rows = mix() if rows is None else rows
    return align(model or make_model(), make_tokenizer(), rows, config=config, **options)


def weights(model) -> dict:
    """Copies of all weights."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}
