"""Speed of `dcr.generate` beside transformers.pipeline("text-generation") on the embedded model,
same prompts, same limit.

Two comparisons, the two sides run alternately in one process after one warm-up each:
  equal     fp32 against fp32, same batch size, greedy: tokens must be the same, else the script
  fails
  defaults  our defaults (precision auto, batches of 64) against the pipeline's (its dtype as given
  by from_pretrained, batch size 1)

Usage: python benchmarks/generation_speed.py [--prompts 128] [--repeats 3] [--batch-size 32]
Writes benchmarks/results/generation_speed.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import pandas as pd
import torch
import transformers

from dcr.data.sources import load_bundled
from dcr.lm.chat import render
from dcr.lm.generate import generate
from dcr.lm.load import load, resolve_precision
from dcr.run.store import write_atomic


def timed(run) -> tuple[float, list]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def side_by_side(ours, theirs, repeats: int, n: int) -> dict:
    """Prompts per second of both, and the median of the ratios of runs that stood next to each
    other."""
    ours(), theirs()
    pairs = [(timed(ours)[0], timed(theirs)[0]) for _ in range(repeats)]
    return {
        "ours_prompts_per_second": round(n / statistics.median(a for a, _ in pairs), 3),
        "theirs_prompts_per_second": round(n / statistics.median(b for _, b in pairs), 3),
        "ratio": round(statistics.median(b / a for a, b in pairs), 3),
        "ratios": [round(b / a, 3) for a, b in pairs],
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--prompts", type=int, default=128)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--max-new-tokens", type=int, default=24)
    args = options.parse_args()
    model, tokenizer = load("embedded")
    rows = load_bundled("pairs")
    texts = rows[rows["label"] == "seemingly_toxic"]["text"].tolist()
    texts = (texts * (args.prompts // len(texts) + 1))[: args.prompts]
    table = pd.DataFrame({"id": [str(i) for i in range(len(texts))], "text": texts})
    rendered = render(tokenizer, texts)
    model.generation_config.max_length = None
    greedy = dict(max_new_tokens=args.max_new_tokens, do_sample=False, return_full_text=False)

    def pipe(of_model, size):
        maker = transformers.pipeline("text-generation", model=of_model, tokenizer=tokenizer)
        return lambda: [
            row[0]["generated_text"].strip()
            for row in maker(rendered, batch_size=size, add_special_tokens=False, **greedy)
        ]

    def ours(size, precision):
        options = {"max_new_tokens": args.max_new_tokens, "precision": precision}
        return lambda: generate(model, tokenizer, table, batch_size=size, **options)[
            "response"
        ].tolist()

    result = {
        "model": "SmolLM2-135M-Instruct (embedded)",
        "prompts": len(texts),
        "max_new_tokens": args.max_new_tokens,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    mine, library = ours(args.batch_size, "fp32"), pipe(model, args.batch_size)
    differing = [i for i, (a, b) in enumerate(zip(mine(), library(), strict=True)) if a != b]
    if differing:
        raise SystemExit(
            f"{len(differing)} of {len(texts)} fp32 answers differ from the pipeline's, first at "
            f"prompt {differing[0]}"
        )
    result["equal"] = {
        "precision": "fp32",
        "batch_size": args.batch_size,
        "answers_equal": True,
        **side_by_side(mine, library, args.repeats, len(texts)),
    }
    print(json.dumps(result["equal"]), flush=True)
    theirs = pipe(model, 1)
    precision = resolve_precision("auto", "cpu")
    result["defaults"] = {
        "our_precision": precision,
        "our_batch_size": 64,
        "their_batch_size": 1,
        **side_by_side(ours(64, precision), theirs, max(1, args.repeats // 3), len(texts)),
    }
    print(json.dumps(result["defaults"]), flush=True)
    write_atomic(
        Path(__file__).parent / "results" / "generation_speed.json",
        json.dumps(result, indent=1) + "\n",
    )


if __name__ == "__main__":
    main()
