"""What OMP_WAIT_POLICY=PASSIVE, the kit's choice, costs on a free machine and saves on a busy one.

    python benchmarks/wait_policy.py [--seconds 3] [--rounds 3]

Every core multiplies matrices of a small model's shapes, in a process of its own for each policy
(OpenMP reads it once); "competitor" lets one more process take a core meanwhile. Policies and
conditions alternate. `load_before` says what else ran: on a machine that others use, "alone" is not
alone. Writes benchmarks/results/wait_policy.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from dcr.data.files import write_atomic
from dcr.run.store import environment

RESULT = Path(__file__).parent / "results" / "wait_policy.json"
POLICIES = {"default": None, "passive": "PASSIVE", "active": "ACTIVE"}
CONDITIONS = {"alone": 0, "competitor": 1}
SPIN = "while True: pass"
WORK = """
import sys, time, torch
x, up, down = torch.randn(192, 576), torch.randn(576, 1536), torch.randn(1536, 576)
def step():
    for _ in range(30):
        x + torch.nn.functional.silu(x @ up) @ down
step()
began, steps = time.perf_counter(), 0
while time.perf_counter() - began < float(sys.argv[1]):
    step()
    steps += 1
print(steps / (time.perf_counter() - began))
"""


def rate(policy: str | None, competitors: int, seconds: float) -> float:
    """Steps a second of one process."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    own |= {"OMP_WAIT_POLICY": policy} if policy else {}
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(competitors)]
    try:
        command = [sys.executable, "-c", WORK, str(seconds)]
        done = subprocess.run(command, env=own, capture_output=True, text=True, check=True)
        return float(done.stdout)
    finally:
        for other in others:
            other.kill()
            other.wait()


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of the ratios of runs that stood next to each other."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    runs: dict[str, dict[str, list[float]]] = {c: {p: [] for p in POLICIES} for c in CONDITIONS}
    for _ in range(options.rounds):
        for condition, competitors in CONDITIONS.items():
            for name, policy in POLICIES.items():
                runs[condition][name].append(rate(policy, competitors, options.seconds))
    result = {
        "what": __doc__.splitlines()[0],
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
        "steps_a_second": runs,
        "passive_to_default": {c: ratio(r["passive"], r["default"]) for c, r in runs.items()},
        "passive_to_active": {c: ratio(r["passive"], r["active"]) for c, r in runs.items()},
        "environment": environment(),
    }
    write_atomic(RESULT, json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=1))


if __name__ == "__main__":
    main()
