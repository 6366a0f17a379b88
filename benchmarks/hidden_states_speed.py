"""Hidden states of all layers: `dcr.lm.states` against the naive loop, time and peak memory in one
run.

The naive loop is what one writes first: `output_hidden_states=True`, batches in the given order,
fp32, the last token
picked by the mask, results kept in a list. Same model, prompts, batch size, dtype, threads; each
side in processes of
its own (for peak memory), in turns, `--repeats` times. Writes
benchmarks/results/hidden_states_speed.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RESULT = Path(__file__).parent / "results" / "hidden_states_speed.json"


def peak_memory_mib() -> float:
    """This process's high-water mark (Linux); each side runs in a process of its own."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def texts(n: int) -> list[str]:
    """Bundled prompts of all classes in a fixed shuffled order, as many as asked for (or as there
    are)."""
    from dcr.data.sources import load_bundled

    tables = [load_bundled(name) for name in ("pairs", "general")]
    rows = [t for table in tables for t in table.loc[table["split"] != "train", "text"]]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:n]]


def ours(model, tokenizer, prompts: list[str], batch: int, out: str) -> np.ndarray:
    """[layers + 1, n, hidden] through the kit, streamed to a file."""
    from dcr.lm.states import hidden_states

    return hidden_states(model, tokenizer, prompts, batch_size=batch, out=out)


def naive(model, tokenizer, prompts: list[str], batch: int, out: str) -> np.ndarray:
    """[layers + 1, n, hidden] by the library's own flag, batch by batch in the given order."""
    import torch

    from dcr.lm.batches import position_ids
    from dcr.lm.chat import render

    parts, rendered = [], render(tokenizer, prompts)
    for start in range(0, len(rendered), batch):
        inputs = tokenizer(
            rendered[start : start + batch],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            states = model(
                **inputs,
                position_ids=position_ids(inputs["attention_mask"]),
                output_hidden_states=True,
            ).hidden_states
        parts.append(torch.stack([s[:, -1] for s in states]))  # padded on the left
    return torch.cat(parts, 1).numpy()


def worker(side: str, n: int, batch: int, answer: str) -> None:
    """Run one side; print seconds and peak memory as JSON."""
    import torch

    from dcr.lm.load import load

    model, tokenizer = load("embedded")
    prompts, run = texts(n), {"ours": ours, "naive": naive}[side]
    with tempfile.TemporaryDirectory() as scratch:
        run(model, tokenizer, prompts[:batch], batch, scratch + "/warm")
        before, start, busy = peak_memory_mib(), time.perf_counter(), time.process_time()
        values = run(model, tokenizer, prompts, batch, scratch + "/run")
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        np.save(answer, np.asarray(values))
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": busy,
                "peak_memory_mib": peak_memory_mib(),
                "memory_before_mib": before,
                "threads": torch.get_num_threads(),
                "prompts": len(prompts),
            }
        )
    )


def main() -> None:
    """Both sides in turns; ratio of medians; the largest difference between the two answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "ANSWER"))
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker[0], options.prompts, options.batch, options.worker[1])
    from dcr.run.store import environment, write_atomic

    runs: dict[str, list[dict]] = {"ours": [], "naive": []}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(options.repeats):
            for side in runs:
                command = [
                    sys.executable,
                    __file__,
                    "--prompts",
                    str(options.prompts),
                    "--batch",
                    str(options.batch),
                    "--worker",
                    side,
                    f"{scratch}/{side}.npy",
                ]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                runs[side].append(json.loads(done.stdout.strip().splitlines()[-1]))
        a, b = (np.load(f"{scratch}/{side}.npy") for side in runs)
    median = {
        side: {
            key: float(np.median([r[key] for r in rows]))
            for key in ("seconds", "cpu_seconds", "peak_memory_mib")
        }
        for side, rows in runs.items()
    }
    result = {
        "what": __doc__.splitlines()[0],
        "batch": options.batch,
        "dtype": "float32",
        "median": median,
        "runs": runs,
        "speedup": median["naive"]["seconds"] / median["ours"]["seconds"],
        "aim_speedup": 1.8,
        "memory_ratio": median["ours"]["peak_memory_mib"] / median["naive"]["peak_memory_mib"],
        "max_relative_difference": float(np.abs(a - b).max() / np.abs(b).max()),
        "environment": environment(),
    }
    write_atomic(RESULT, json.dumps(result, indent=1))
    print(
        json.dumps(
            {
                k: result[k]
                for k in ("median", "speedup", "memory_ratio", "max_relative_difference")
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
