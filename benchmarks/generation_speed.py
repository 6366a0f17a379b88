"""Speed of `dcr.generate` beside transformers.pipeline("text-generation") on the embedded model,
same prompts, same limit.

Three comparisons, the two sides run alternately in one process after one warm-up each:
  equal       fp32 against fp32, same batch size, greedy: tokens must be the same, else the script
              fails
  continuous  the same against the library's continuous batching (`generate_batch`, as many rows
              and tokens at once as it likes)
  defaults    our defaults (precision auto, batches of 64) against the pipeline's (its dtype as
              given by from_pretrained, batch size 1)

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
from dcr.lm.chat import encode_prompts, render
from dcr.lm.device import resolve_precision
from dcr.lm.generate import generate
from dcr.lm.load import load
from dcr.run.store import write_atomic

PAGE = 32  # tokens of a page of the library's cache


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

    def continuous():
        other, _ = load("embedded", precision="fp32")  # it changes the model's attention for good
        rows = encode_prompts(tokenizer, texts)
        pages = len(rows) * (1 + (max(map(len, rows)) + args.max_new_tokens) // PAGE)
        how = transformers.ContinuousBatchingConfig(  # else its cache takes the whole memory
            page_size=PAGE, num_blocks=pages, max_batch_tokens=4096
        )
        greedy = transformers.GenerationConfig(
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            eos_token_id=other.generation_config.eos_token_id,
            pad_token_id=other.generation_config.pad_token_id,
        )

        def run() -> list[str]:
            found = other.generate_batch(
                rows, greedy, continuous_batching_config=how, progress_bar=False
            )
            answers = [found[f"req_{i}"].generated_tokens for i in range(len(rows))]
            return [tokenizer.decode(a, skip_special_tokens=True).strip() for a in answers]

        return run

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
    try:
        other = continuous()
        same = sum(a == b for a, b in zip(mine(), other(), strict=True))
        result["continuous"] = {
            "precision": "fp32",
            "our_batch_size": args.batch_size,
            "answers_equal": same,
            **side_by_side(mine, other, args.repeats, len(texts)),
        }
    except Exception as error:  # not every version runs it on a CPU
        result["continuous"] = {"does_not_run": f"{type(error).__name__}: {str(error)[:200]}"}
    print(json.dumps(result["continuous"]), flush=True)
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
