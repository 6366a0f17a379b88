"""CPU seconds of what a run does, natively and as on a machine with fewer instructions.

    python benchmarks/instruction_sets.py [--isa AVX2] [--rounds 2]

oneDNN is told what it may use (ONEDNN_MAX_CPU_ISA), one process a side, one thread, sides in turns;
`precision: auto` picks bf16 where the machine multiplies it and fp32 under AVX2. Parts are those of
the profile quick: a step of each stage, answers, hidden states and refusal scores of some prompts.
Writes benchmarks/results/instruction_sets.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "instruction_sets.json"
PROMPTS = 8


def worker() -> None:
    """Print CPU seconds of each part, behind one warm-up of each."""
    import torch

    from dcr.analysis.refusal import refusal_score
    from dcr.config import load_config
    from dcr.data.sets import training_sets
    from dcr.lm.blocks import in_precision
    from dcr.lm.device import resolve_precision
    from dcr.lm.generate import generate
    from dcr.lm.load import load
    from dcr.lm.states import hidden_states
    from dcr.train.align import align
    from dcr.train.loop import StageTrainer
    from dcr.train.refine import refine

    torch.set_num_threads(1)
    config, precision = load_config("quick"), resolve_precision("auto", "cpu")
    model, tokenizer = load("embedded", device="cpu")
    sets, found = training_sets(config), {"precision": precision}
    texts = sets.toxic["text"].tolist()[:PROMPTS]
    plain, seconds = StageTrainer.training_step, []

    def timed(self, *args, **options):
        began = time.process_time()
        result = plain(self, *args, **options)
        seconds.append(time.process_time() - began)
        return result

    def measured(run) -> float:
        run(texts[:1])
        began = time.process_time()
        run(texts)
        return time.process_time() - began

    reading = {"answers": lambda t: generate(model, tokenizer, t, max_new_tokens=12)}
    reading["hidden states"] = lambda t: hidden_states(model, tokenizer, t)
    reading["refusal scores"] = lambda t: refusal_score(model, tokenizer, t)
    with in_precision(model, precision):
        found |= {name: measured(run) for name, run in reading.items()}
    StageTrainer.training_step, two = timed, {"max_steps": 2}
    classes = {"toxic": sets.toxic, "seemingly_toxic": sets.seemingly_toxic}
    stage = config.refine.replaced(**two, eval_steps=2)
    model = refine(model, tokenizer, **classes, config=stage, precision=precision).model
    stage = config.align.replaced(**two, checkpoints="last")
    align(model, tokenizer, sets.mix, config=stage, precision=precision)
    found |= {"step of stage 1": seconds[1], "step of stage 2": seconds[3]}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", default="AVX2")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--worker", action="store_true")
    options = parser.parse_args()
    if options.worker:
        return worker()
    from dcr.data.files import write_atomic
    from dcr.run.store import environment

    load = os.getloadavg()[0]
    runs: dict[str, list[dict]] = {"native": [], options.isa: []}
    for _ in range(options.rounds):
        for name in runs:
            own = {k: v for k, v in os.environ.items() if k != "ONEDNN_MAX_CPU_ISA"}
            own |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
            own |= {"ONEDNN_MAX_CPU_ISA": name} if name != "native" else {}
            command = [sys.executable, "-W", "ignore", __file__, "--worker"]
            done = subprocess.run(command, env=own, stdout=subprocess.PIPE, text=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    precision = {name: [r.pop("precision") for r in rows][0] for name, rows in runs.items()}
    parts = list(runs["native"][0])
    median = {
        n: {p: statistics.median(r[p] for r in rows) for p in parts} for n, rows in runs.items()
    }
    result = {
        "what": __doc__.splitlines()[0],
        "prompts": PROMPTS,
        "load_before": round(load, 2),
        "precision": precision,
        "cpu_seconds": median,
        "ratio_to_native": {
            p: round(median[options.isa][p] / median["native"][p], 2) for p in parts
        },
        "runs": runs,
        "environment": environment(),
    }
    write_atomic(RESULT, json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=1))


if __name__ == "__main__":
    main()
