"""A GPU in at most eight minutes: its tests, the profile quick, and each stage at real sizes.

    python benchmarks/gpu_check.py [--parts tests,quick,models] [--minutes 8]

Models of Qwen2.5-1.5B's and Llama-3-8B's shape get random weights on the card itself and a byte
tokenizer, so nothing is downloaded: one step of stage 1 and of stage 2 as their profiles say (128
rows a step by accumulation of micro-batches), 64 answers, a 2 × 2 kernel. Each row says tokens a
second, peak memory, and the share of the card's matrix rate (measured in the same run) that the
model's own products take: 2 operations a weight and token forward, 2 more back to the inputs; what
checkpointing computes twice is not counted. `--shape tiny --device cpu` tries the script itself.
Writes benchmarks/results/gpu_check.json, but for tiny shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pandas as pd
import torch

from dcr.analysis.kernel import entk
from dcr.config import load_config
from dcr.data.files import measured_peak, write_atomic
from dcr.data.sources import load_bundled
from dcr.lm.blocks import decoder_layers
from dcr.lm.device import autocast, resolve_precision
from dcr.lm.generate import generate
from dcr.run.store import environment
from dcr.train.align import align
from dcr.train.loop import StageTrainer
from dcr.train.refine import refine

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "gpu_check.json"
SHAPES: dict[str, dict] = {  # of the published config.json; the profile of the same name
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
TINY = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MADE = ("qwen2.5-1.5b", "llama-3-8b")  # on the card
STEPS = 2  # the first warms up
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


def model_of(shape: dict, device: str, dtype: torch.dtype = torch.bfloat16):
    """A model of random weights, made on its device."""
    import transformers

    options = {k: v for k, v in shape.items() if k != "model_type"}
    config = transformers.AutoConfig.for_model(
        shape["model_type"], **options, max_position_embeddings=4096, bos_token_id=1
    )
    config.eos_token_id, config.pad_token_id = 258, 256
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def byte_tokenizer():
    """One token a byte, and the tokens of a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<end>"}
    more = ["<user>", "<assistant>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, **special, additional_special_tokens=more
    )
    tokenizer.chat_template, tokenizer.padding_side = CHAT, "left"
    return tokenizer


def prompts(label: str, n: int) -> list[str]:
    """The first n bundled prompts of a label, over again where there are fewer."""
    rows = load_bundled("pairs")
    texts = rows[rows["label"] == label]["text"].tolist()
    return (texts * (n // len(texts) + 1))[:n]


def mix(n: int) -> pd.DataFrame:
    """n rows with answers of 50 to 600 bytes, as instruction data has them."""
    said = [
        "First of all, look at what there is and write it down. " * (1 + i % 11) for i in range(n)
    ]
    return pd.DataFrame({"text": prompts("seemingly_toxic", n), "response": said})


def synchronise(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matrix_rate(device: str, precision: str, size: int, seconds: float = 1.0) -> float:
    """Floating-point operations a second of square products."""
    a = torch.randn(size, size, device=device)
    with torch.no_grad(), autocast(device, precision):
        a @ a
        synchronise(device)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            for _ in range(4):
                a @ a
            synchronise(device)
            count += 4
    return 2 * size**3 * count / (time.perf_counter() - began)


@contextlib.contextmanager
def timed_steps(device: str) -> Iterator[list[float]]:
    """Seconds of every optimiser step's passes, the device waited for."""
    seconds: list[float] = []
    plain = StageTrainer.training_step

    def timed(self, *args, **options):
        synchronise(device)
        began = time.perf_counter()
        result = plain(self, *args, **options)
        synchronise(device)
        seconds.append(time.perf_counter() - began)
        return result

    with mock.patch.object(StageTrainer, "training_step", timed):
        yield seconds


@contextlib.contextmanager
def peak_memory(device: str) -> Iterator[dict[str, float]]:
    """{"peak_gib": ...} of the device, or of the process on a CPU, filled in at the end."""
    found: dict[str, float] = {}
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with measured_peak() as peak:
        yield found
    kib = peak.mib()["peak_memory_mib"] / 2**10
    cuda = device.startswith("cuda")
    found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30 if cuda else kib, 2)


def weights(modules) -> int:
    """Weights of linear layers: what a token is multiplied with."""
    return sum(
        p.numel()
        for m in modules
        for n, p in m.named_parameters()
        if p.dim() == 2 and "lora" not in n
    )


def trained_row(history: list[dict], seconds: list[float], operations: float) -> dict:
    """operations: a token."""
    tokens = history[-1]["tokens"] - history[-2]["tokens"]
    rate = tokens / seconds[-1]
    return {
        "tokens": tokens,
        "seconds": round(seconds[-1], 3),
        "tokens_a_second": round(rate, 1),
        "operations_a_second": rate * operations,
    }


def stage_one(model, tokenizer, options: argparse.Namespace, profile: str) -> dict:
    """A step of stage 1 as the profile has it."""
    config = load_config(profile).refine.replaced(max_steps=STEPS, eval_steps=STEPS)
    if options.shape == "tiny":
        config = config.replaced(batch_size=8, lora_rank=4)
    n = 2 * config.batch_size  # of each class
    texts = {label: prompts(label, n) for label in ("toxic", "seemingly_toxic")}
    with timed_steps(options.device) as seconds:
        result = refine(
            model, tokenizer, **texts, config=config, merge=False, precision=options.precision
        )
    below = weights(decoder_layers(result.model)[: result.layer])
    row = trained_row(result.history, seconds, 4 * below)
    result.model.unload()
    return row


def stage_two(model, tokenizer, options: argparse.Namespace, profile: str) -> dict:
    """A step of stage 2 as the profile has it: 128 rows, all tokens labelled."""
    config = load_config(profile).align.replaced(max_steps=STEPS, checkpoints="last")
    if options.shape == "tiny":
        config = config.replaced(batch_size=4, lora_rank=4, max_length=128)
    rows = mix(2 * config.batch_size)
    with timed_steps(options.device) as seconds:
        result = align(
            model, tokenizer, rows, config=config, merge=False, precision=options.precision
        )
    head = model.get_output_embeddings().weight.numel()
    used = weights(decoder_layers(result.model)) + head
    row = trained_row(result.history, seconds, 4 * used)
    result.model.unload()
    return row


def answering(model, tokenizer, options: argparse.Namespace, profile: str) -> dict:
    """64 answers; tokens are the new ones."""
    new = 64 if options.shape == "real" else 4
    texts = prompts("seemingly_toxic", 64)
    synchronise(options.device)
    began = time.perf_counter()
    rows = generate(model, tokenizer, texts, max_new_tokens=new, precision=options.precision)
    synchronise(options.device)
    seconds, tokens = time.perf_counter() - began, int(rows["n_tokens"].sum())
    read = sum(len(t) for t in tokenizer(texts)["input_ids"])
    used = weights(decoder_layers(model))
    return {
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_a_second": round(tokens / seconds, 1),
        "operations_a_second": 2 * used * (tokens + read) / seconds,
    }


def kernel(model, tokenizer, options: argparse.Namespace, profile: str) -> dict:
    """A 2 × 2 kernel on 10 tokens, the blocks' parameters."""
    began = time.perf_counter()
    k = 10 if options.shape == "real" else 3
    sides = prompts("toxic", 2), prompts("seemingly_toxic", 2)
    entk(model, tokenizer, *sides, k=k, parameters="blocks")
    synchronise(options.device)
    return {"tokens": 4, "seconds": round(time.perf_counter() - began, 3)}


PARTS = {
    "stage 1": stage_one,
    "stage 2": stage_two,
    "64 answers": answering,
    "2 x 2 kernel": kernel,
}


def of_models(options: argparse.Namespace, rate: float) -> Iterator[dict]:
    """A row for each part of each model; what fails is a row that says why."""
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    for name in MADE:
        shape = SHAPES[name] | (TINY if options.shape == "tiny" else {})
        torch.manual_seed(0)
        model, tokenizer = model_of(shape, options.device, dtype), byte_tokenizer()
        for part, measure in PARTS.items():
            row = {"model": f"{name}, {options.shape} shape", "part": part}
            if time.monotonic() > options.until:
                yield row | {"status": "not run: out of time"}
                continue
            try:
                with peak_memory(options.device) as peak:
                    row |= measure(model, tokenizer, options, name)
                row |= {**peak, "status": "ok"}
            except Exception as error:  # a row a fault: the others still count
                row["status"] = f"{type(error).__name__}: {str(error)[:200]}"
            if done := row.pop("operations_a_second", None):
                row["share_of_matrix_rate"] = round(done / rate, 4)
            yield row
        del model


def called(name: str, command: list[str], options: argparse.Namespace) -> dict:
    """A row for a command's end."""
    began, left = time.monotonic(), options.until - time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=max(1, left),
        )
        lines = (done.stdout if name == "tests" else done.stderr).strip().splitlines() or [""]
        said = "ok" if not done.returncode else f"failed ({done.returncode})"
        status = f"{said}: {lines[-1]}"
    except subprocess.TimeoutExpired:
        status = "not finished in time"
    return {"part": name, "seconds": round(time.monotonic() - began, 1), "status": status}


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Measure, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="tests,quick,models")
    parser.add_argument("--shape", default="real", choices=["real", "tiny"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here; --shape tiny --device cpu tries the script.")
    options.until = time.monotonic() + 60 * options.minutes
    options.precision = resolve_precision("auto", options.device)
    cuda, rows = options.device.startswith("cuda"), []
    card = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
    wanted = options.parts.split(",")

    def note(row: dict) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    if "tests" in wanted:
        note(
            called(
                "tests", ["pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"], options
            )
        )
    if "quick" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            quick = ["dcr.cli", "run", "--profile", "quick", "--no-tables", "--run-dir", folder]
            note(called("quick", quick, options))
    rate = 0.0
    if "models" in wanted:
        rate = matrix_rate(options.device, options.precision, 8192 if cuda else 512)
        for row in of_models(options, rate):
            note(row)
    table = pd.DataFrame(rows)
    print(f"\n{card}, {options.precision}, {rate / 1e12:.2f} TFLOP/s in matrix products")
    print(table.to_string(index=False, na_rep=""))
    if options.shape == "real":
        result = {
            "card": card,
            "precision": options.precision,
            "matrix_rate_tflops": round(rate / 1e12, 2),
            "rows": rows,
            "environment": environment(),
        }
        write_atomic(RESULT, json.dumps(result, indent=1) + "\n")
    return table


if __name__ == "__main__":
    main()
