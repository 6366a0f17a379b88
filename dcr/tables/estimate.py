"""What a run costs: an estimate before it (`dcr info`), and the table of what it did cost, from its manifests.

The estimate counts parameters on the meta device (no weights are read), tokenises the real training sets, and divides the
arithmetic by a matrix rate measured here in half a second. It is good to a factor of about two; the cost table is exact.
"""

from __future__ import annotations

import json
import math
import time

import pandas as pd
import torch

from dcr.config import Config, methods_file
from dcr.errors import DCRError

# Share of the measured matrix rate that a stage reaches; attention, norms and small matrices take the rest.
SHARE = {"refine": 0.5, "align": 0.4, "generate": 0.15}
PROCESS_MIB = 700  # interpreter, torch, transformers and data before any weight
TENSORS_A_TOKEN = 18  # activations of hidden size kept for the backward pass, per block and token


def matrix_rate(
    dtype: torch.dtype = torch.float32, device: str = "cpu", seconds: float = 0.25
) -> float:
    """FLOP/s of this hardware for square matrices of 1024 in one dtype: the best of a short run."""
    a, b = (torch.randn(1024, 1024, device=device, dtype=dtype) for _ in range(2))
    best, end = math.inf, time.perf_counter() + seconds
    a @ b
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize() if device.startswith("cuda") else torch.mps.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def skeleton(config: Config):
    """The model without weights (meta device) and its tokenizer. Raises DCRError when they are not at hand."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from dcr.lm import embedded
    from dcr.lm.load import explain_load_error

    name = config.model.name
    source = str(embedded.ensure()) if name == "embedded" else name
    options = {"revision": config.model.revision} if config.model.revision else {}
    try:
        plan = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # one clear message for whatever the hub client raises
        raise DCRError(explain_load_error(name, error)) from error
    if not tokenizer.chat_template:
        from dcr.lm.chat import ALPACA_TEMPLATE

        tokenizer.chat_template = ALPACA_TEMPLATE
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(plan), tokenizer


def counts(
    model, first: int, last: int, *, rank: int, targets=(), layers_path: str = ""
) -> dict[str, int]:
    """Parameters: all, in blocks first..last-1 (`blocks`), of the LM head, and trainable by LoRA of `rank` (0: all of the blocks)."""
    from dcr.lm.blocks import decoder_layers, is_linear

    blocks = decoder_layers(model, layers_path)[first:last]
    inside = sum(p.numel() for p in blocks.parameters())
    linear = [
        m.weight.shape
        for b in blocks
        for n, m in b.named_modules()
        if is_linear(m) and (not targets or n.rsplit(".", 1)[-1] in targets)
    ]
    return {
        "all": sum(p.numel() for p in model.parameters()),
        "blocks": inside,
        "head": model.get_output_embeddings().weight.numel(),
        "trainable": sum(rank * sum(shape) for shape in linear) if rank else inside,
    }


def estimate(config: Config, methods: tuple[str, ...] = ()) -> pd.DataFrame:
    """One row a method and stage: parameters, trainable, tokens, memory (MiB), seconds on the hardware at hand."""
    from dcr.lm.blocks import decoder_layers
    from dcr.lm.load import pick_device

    model, tokenizer = skeleton(config)
    depth, device = (
        len(decoder_layers(model, config.model.layers_path)),
        pick_device(config.model.device),
    )
    rates = {d: matrix_rate(d, device) for d in (torch.float32, torch.bfloat16)}
    rows = []
    for method in methods or config.methods:
        recipe, stages = (
            config.override(methods_file()[method].get("overrides", {})),
            methods_file()[method]["stages"],
        )
        for stage in (s for s in ("refine", "align") if s in stages):
            rows.append(
                {"method": method, **_training(stage, recipe, model, tokenizer, depth, rates)}
            )
        if "rule" not in stages:
            rows.append({"method": method, **_generation(recipe, model, tokenizer, method, rates)})
    return pd.DataFrame(rows)


def _training(stage: str, config: Config, model, tokenizer, depth: int, rates: dict) -> dict:
    from dcr.data import sets
    from dcr.lm.blocks import resolve_layer
    from dcr.lm.chat import render
    from dcr.train.align import Examples

    layer = (
        config.refine.layer if not isinstance(config.refine.layer, str) else 0.75
    )  # "auto" is measured in the run
    options = config.refine if stage == "refine" else config.align
    if stage == "refine":
        first, last, head = 0, resolve_layer(layer, depth), 0.0
        toxic, seemingly = sets.contrastive_sets(config)
        texts = render(tokenizer, [*toxic["text"], *seemingly["text"]])
        lengths = [len(r) for r in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        examples = 2 * max(len(toxic), len(seemingly))
    else:
        first, last = resolve_layer(layer, depth) if config.align.above_layer else 0, depth
        mix = Examples(
            sets.alignment_mix(config),
            tokenizer,
            labels=options.labels,
            max_length=options.max_length,
        )
        lengths, examples = [len(r) for r in mix.ids], len(mix)
        head = sum(len(r) - s for r, s in zip(mix.ids, mix.starts, strict=True)) / sum(lengths)
    size = counts(
        model,
        first,
        last,
        rank=options.lora_rank,
        targets=options.lora_targets,
        layers_path=config.model.layers_path,
    )
    mean, batch = sum(lengths) / len(lengths), options.batch_size
    steps = options.max_steps or math.ceil(
        options.epochs * examples / (batch * options.accumulation)
    )
    tokens = steps * batch * options.accumulation * mean
    below = size["blocks"] + (counts(model, 0, first, rank=1)["blocks"] if first else 0)
    passes = (
        4 if options.lora_rank else 6
    )  # FLOP a parameter and token: forward 2, gradients of activations 2, of weights 2
    flops = tokens * (passes * below + 4 * head * size["head"])
    rate = (
        rates[torch.bfloat16 if config.model.precision != "fp32" else torch.float32] * SHARE[stage]
    )
    hidden, width = (
        model.config.get_text_config().hidden_size,
        2 if config.model.precision != "fp32" else 4,
    )
    activations = batch * max(lengths) * (last - first) * hidden * TENSORS_A_TOKEN * width
    logits = batch * max(lengths) * head * model.config.get_text_config().vocab_size * 12
    weights = size["all"] * 4 + size["trainable"] * 16
    return {
        "stage": stage,
        "parameters": size["all"],
        "trainable": size["trainable"],
        "tokens": round(tokens),
        "memory_mib": round(PROCESS_MIB + (weights + activations + logits) / 2**20),
        "seconds": float(f"{flops / rate:.2g}"),
    }


def _generation(config: Config, model, tokenizer, method: str, rates: dict) -> dict:
    from dcr.data import sets
    from dcr.lm.chat import render

    rows = pd.concat([sets.benchmark(n, config) for n in config.data.benchmarks], ignore_index=True)
    prompts = sum(len(b) for b in sets.benchmarks_of(config).values())
    some = rows["text"].iloc[:: max(1, len(rows) // 64)].tolist()
    mean = sum(
        len(r) for r in tokenizer(render(tokenizer, some), add_special_tokens=False)["input_ids"]
    ) / len(some)
    tokens = prompts * (mean + config.generation.max_new_tokens) * (2 if method == "SelfCD" else 1)
    size = sum(p.numel() for p in model.parameters())
    cache = (
        config.generation.batch_size
        * (mean + config.generation.max_new_tokens)
        * model.config.get_text_config().hidden_size
        * 240
    )
    return {
        "stage": "generate",
        "parameters": size,
        "trainable": 0,
        "tokens": round(tokens),
        "memory_mib": round(PROCESS_MIB + (size * 4 + cache) / 2**20),
        "seconds": float(f"{2 * size * tokens / (max(rates.values()) * SHARE['generate']):.2g}"),
    }


def cost_table(experiment, against: str = "STL") -> pd.DataFrame:
    """What each method did cost, from manifests alone: seconds a stage, training tokens, peak memory (MiB), inference.

    `ms_per_token` is wall time a generated token over all benchmarks; `inference_vs_STL` its ratio to `against` (SelfCD
    runs two branches, SCANS classifies each prompt first). Raises DCRError when nothing has been run.
    """
    last: dict[tuple[str, str], dict] = {}
    for path in sorted(experiment.store.root.glob("*/*/manifest.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        key = (content["name"], content["kind"])
        if (
            content["kind"] in ("refine", "align", "steer", "generate")
            and content["name"] in experiment.methods
            and (key not in last or content["started"] > last[key]["started"])
        ):
            last[key] = content | {"path": path.parent}
    if not last:
        raise DCRError(
            "cost table: nothing has been run in this directory yet; run notebook 03 or 04."
        )
    rows = []
    for method in experiment.methods:
        mine = {kind: m for (name, kind), m in last.items() if name == method}
        if not mine:
            continue
        history = [
            json.loads((m["path"] / "history.jsonl").read_text().splitlines()[-1])
            for k, m in mine.items()
            if k in ("refine", "align")
        ]
        answered = mine.get("generate", {})
        rows.append(
            {
                "method": method,
                **{
                    f"{k}_seconds": mine[k]["seconds"] if k in mine else 0.0
                    for k in ("refine", "align", "steer")
                },
                "training_tokens": sum(h["tokens"] for h in history),
                "peak_memory_mib": max(m["peak_memory_mib"] for m in mine.values()),
                "generate_seconds": answered.get("seconds", float("nan")),
                "prompts": answered.get("prompts", 0),
                "ms_per_token": 1000 * answered["seconds"] / max(1, answered["new_tokens"])
                if "new_tokens" in answered
                else float("nan"),
            }
        )
    table = pd.DataFrame(rows)
    base = table.loc[table["method"] == against, "ms_per_token"]
    return table.assign(
        **{
            f"inference_vs_{against}": table["ms_per_token"]
            / (base.iloc[0] if len(base) else float("nan"))
        }
    )
