"""Empirical NTK: `dcr.analysis.kernel.entk` against materialised per-token gradients, time and peak
memory in one run.

The materialised way takes one backward pass a prompt and token, keeps every gradient vector, and
multiplies them. It is run
at the largest number of prompts whose gradients fit `--budget` GiB; the kit on the same prompts,
tokens, parameters and
dtype, each in a process of its own. `--many A` also times A + A prompts with the kit alone. Writes
benchmarks/results/kernel_speed.json (parts not run this time are kept).
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

RESULT = Path(__file__).parent / "results" / "kernel_speed.json"


def peak_memory_mib() -> float:
    """This process's high-water mark (Linux); each side runs in a process of its own."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def texts(n: int) -> tuple[list[str], list[str]]:
    """(toxic, harmless): n prompts in all, dealt to both sides."""
    from dcr.data.sources import load_bundled

    rows = load_bundled("pairs").query("split == 'test'")
    sides = [rows.loc[rows["label"] == c, "text"].tolist() for c in ("toxic", "seemingly_toxic")]
    return sides[0][: n // 2], sides[1][: n - n // 2]


def parameters_of(model, which: str) -> list:
    """The parameters the kernel is over."""
    from dcr.lm.blocks import decoder_layers

    return list(model.parameters() if which == "all" else decoder_layers(model).parameters())


def materialised(
    model, tokenizer, a: list[str], b: list[str], which: str, tokens: list[int]
) -> np.ndarray:
    """‖K‖_F [n, n] from gradient vectors held in memory."""
    import torch

    from dcr.lm.chat import render

    wanted, rows = parameters_of(model, which), render(tokenizer, [*a, *b])
    size = sum(p.numel() for p in wanted)
    jacobian = torch.empty(len(rows) * len(tokens), size)
    for i, text in enumerate(rows):
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        for j, token in enumerate(tokens):
            grads = torch.autograd.grad(logits[token], wanted, retain_graph=j + 1 < len(tokens))
            torch.cat([g.flatten() for g in grads], out=jacobian[i * len(tokens) + j])
    # In one fp32 product sums over 10^8 entries are wrong by up to 3 %.
    parts = (part.double() for part in jacobian.split(2**18, dim=1))
    gram = sum(part @ part.T for part in parts).reshape(
        len(rows), len(tokens), len(rows), len(tokens)
    )
    return gram.pow(2).sum((1, 3)).sqrt().numpy()


def worker(side: str, n: int, which: str, answer: str) -> None:
    """Run one side; print seconds and peak memory as JSON. The token set is chosen before the clock
    starts."""
    import torch

    from dcr.analysis.kernel import entk
    from dcr.analysis.refusal import opening_tokens
    from dcr.lm.load import load

    model, tokenizer = load("embedded")
    a, b = texts(n)
    tokens = sorted({row[0] for row in opening_tokens(tokenizer)})
    start, busy = time.perf_counter(), time.process_time()
    if side == "ours":
        norms = entk(model, tokenizer, a, b, tokens="refusal", parameters=which).norms
    else:
        norms = materialised(model, tokenizer, a, b, which, tokens)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    np.save(answer, norms)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": busy,
                "peak_memory_mib": peak_memory_mib(),
                "threads": torch.get_num_threads(),
                "prompts": n,
                "tokens": len(tokens),
            }
        )
    )


def run(side: str, n: int, which: str, answer: str) -> dict:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--parameters", which, "--worker", side, str(n), answer]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Both sides at the budget's number of prompts, then the kit alone at many."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", choices=("all", "blocks"), default="blocks")
    parser.add_argument("--budget", type=float, default=16.0, help="GiB of gradients")
    parser.add_argument(
        "--many", type=int, default=0, help="prompts a class for the kit alone; 0 leaves this out"
    )
    parser.add_argument("--no-compare", action="store_true")
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "N", "ANSWER"))
    options = parser.parse_args()
    if options.worker:
        side, n, answer = options.worker
        return worker(side, int(n), options.parameters, answer)
    from dcr.analysis.refusal import opening_tokens
    from dcr.lm.load import load
    from dcr.run.store import environment, write_atomic

    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result |= {"what": __doc__.splitlines()[0], "environment": environment()}
    with tempfile.TemporaryDirectory() as scratch:
        if not options.no_compare:
            model, tokenizer = load("embedded")
            k = len({row[0] for row in opening_tokens(tokenizer)})
            each = 4 * k * sum(p.numel() for p in parameters_of(model, options.parameters)) / 2**30
            n = int(options.budget // each)
            del model
            sides = {
                side: run(side, n, options.parameters, f"{scratch}/{side}.npy")
                for side in ("ours", "materialised")
            }
            a, b = (np.load(f"{scratch}/{side}.npy") for side in sides)
            result["compared"] = {
                "parameters": options.parameters,
                "dtype": "float32",
                "budget_gib": options.budget,
                "prompts": n,
                "gib_of_gradients_a_prompt": each,
                **sides,
                "speedup": sides["materialised"]["seconds"] / sides["ours"]["seconds"],
                "aim_speedup": 3.0,
                "speedup_cpu": sides["materialised"]["cpu_seconds"]
                / sides["ours"]["cpu_seconds"],  # what a busy machine leaves comparable
                "memory_ratio": sides["ours"]["peak_memory_mib"]
                / sides["materialised"]["peak_memory_mib"],
                "aim_memory_ratio": 0.1,
                "max_relative_difference": float((np.abs(a - b) / b).max()),
            }
        if options.many:
            result["many"] = {
                "prompts_a_class": options.many,
                "parameters": options.parameters,
                "aim_seconds": 600,
                **run("ours", 2 * options.many, options.parameters, f"{scratch}/many.npy"),
            }
    write_atomic(RESULT, json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in result.items() if k in ("compared", "many")}, indent=1))


if __name__ == "__main__":
    main()
