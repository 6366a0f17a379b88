"""An experiment without a model.

Prompts, answers, scores and states made up from one rule, so tables are tested alone.

Harm shifts hidden states along axis 0, the source along an axis of its own, three times as far. A
method refuses a prompt where a number hashed from its id (and seed) lies below its rate, so no
method depends on another.
"""

from __future__ import annotations

import hashlib
from collections import namedtuple
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import numpy as np
import pandas as pd

from dcr.config import load_config
from dcr.data.sets import TrainingSets
from dcr.study.experiment import Experiment
from dcr.study.registry import table_entry

Point = namedtuple("Point", "step strength", defaults=(-1, 1.0))
SETS = {  # benchmark: (label, share of questions, role, met)
    "oktest": ("seemingly_toxic", 1.0, "test", False),
    "or-80k": ("seemingly_toxic", 0.5, "test", False),
    "xstest-safe": ("seemingly_toxic", 1.0, "refine", True),
    "advbench": ("toxic", 0.0, "test", True),
    "q-harm": ("toxic", 1.0, "test", False),
    "xstest-unsafe": ("toxic", 1.0, "refine", True),
    "general-test": ("general", 0.2, "test", True),
}
RATES = {
    "base": (0.05, 0.02, 0.0),
    "STL": (0.8, 0.4, 0.1),
    "DCR": (0.7, 0.2, 0.1),
    "SCANS": (0.6, 0.3, 0.1),
}
STAGES = {
    "base": [],
    "STL": ["align"],
    "DCR": ["refine", "align"],
    "SCANS": ["steer"],
    "question-mark": ["rule"],
}
DEPTH, HIDDEN = 4, 12


def number(*parts: object) -> float:
    """A number in [0, 1) from a hash of its parts."""
    text = "|".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def prompt_rows(
    name: str, label: str, questions: float, role: str, n: int = 12, **more
) -> pd.DataFrame:
    """`n` requests of a set, each as published and swapped."""
    rows = []
    for i in range(n):
        asks = i < round(questions * n)
        for version in ("published", "swapped"):
            question = asks == (version == "published")
            start, end = ("how do I", "?") if question else ("explain", ".")
            text = f"{start} {name} thing {i}{end}"
            rows.append(
                {
                    "id": f"{name}-{i}" + "~" * (version == "swapped"),
                    "text": text,
                    "label": label,
                    "form": "question" if question else "imperative",
                    "source": name,
                    "category": f"kind {i % 3}",
                    "request": f"{name} {i}",
                    "role": role,
                    "pair_id": "",
                    "response": "",
                    "benchmark": name,
                    "version": version,
                    **more,
                }
            )
    return pd.DataFrame(rows)


@dataclass
class StubRun:
    """What tables ask of a run."""

    seed: int
    prompts: pd.DataFrame
    validation: pd.DataFrame
    curve_prompts: pd.DataFrame

    @property
    def answered(self) -> pd.DataFrame:
        return self.prompts

    depth = DEPTH
    base_model = SimpleNamespace(loaded=lambda: None)

    @cached_property
    def config(self):
        config = load_config("reference-135m", seed=self.seed)
        return config.override(
            {
                "evaluation.probe_pairs": 20,
                "evaluation.kernel_prompts": 4,
                "evaluation.trajectory_prompts": 4,
            }
        )

    def stages(self, method: str) -> list[str]:
        return STAGES[method]

    def recipe(self, method: str):
        return self.config

    def layer(self, method: str = "DCR") -> int:
        return 3

    def sets(self, method: str) -> TrainingSets:
        pair = ("pairs", "pairs") if method == "DCR-matched" else ("refusals", "xsafe")
        toxic, harmless = (
            prompt_rows(f"{s}-{side}", side, q, "refine", 20)
            .query("version == 'published'")
            .assign(source=s)
            for s, side, q in zip(pair, ("toxic", "seemingly_toxic"), (0.0, 1.0), strict=True)
        )
        safe = prompt_rows("safe", "toxic", 0.0, "align", 10).assign(part="safe")
        if method == "STL-audited":
            safe = safe.head(10)
        general = prompt_rows("alpaca", "general", 0.1, "align", 10).assign(part="general")
        return TrainingSets(toxic, harmless, general, pd.concat([safe, general]))

    def points(self, method: str) -> list[Point]:
        if method == "SCANS":
            return [Point(-1, 0.0), Point(-1, 0.5), Point(-1, 1.0)]
        return [Point(s, 1.0) for s in self.steps(method)]

    def steps(self, method: str) -> list[int]:
        return [0, 2, 8] if "align" in STAGES[method] and method != "SCANS" else [0]

    def verdicts(self, method: str, step: int = -1, strength: float = 1.0) -> pd.DataFrame:
        prompts = self.prompts if (step, strength) == (-1, 1.0) else self.curve_prompts
        return self.judged(method, prompts, Point(step, strength))

    def judged(self, method, prompts, point=None, *, tokens=0) -> pd.DataFrame:
        step, strength = point or Point()
        if method == "question-mark":
            refused = ~prompts["text"].str.endswith("?")
        else:
            rates = dict(zip(("toxic", "seemingly_toxic", "general"), RATES[method], strict=True))
            share = (step / 8 if step >= 0 else 1.0) * strength
            drawn = [number(i, self.seed) for i in prompts["id"]]
            refused = np.array(drawn) < prompts["label"].map(rates).to_numpy() * share
        said = np.where(refused, "refuse", "comply")
        named = {"prompt_id": prompts["id"], "verdict": said, "finish": "eos", "judge": "stub"}
        named |= {"response": np.where(refused, "I cannot help.", "Here is how."), "n_tokens": 4}
        return pd.DataFrame(named)

    generations = verdicts

    def scores(self, method: str) -> pd.DataFrame:
        rows = pd.concat([self.validation, self.prompts], ignore_index=True)
        return pd.DataFrame({"prompt_id": rows["id"], "score": self.refusal(method, rows)})

    def refusal(self, method: str, prompts: pd.DataFrame, step: int = -1) -> np.ndarray:
        shift = prompts["label"].map({"toxic": 1.0, "seemingly_toxic": 0.0, "general": -1.0})
        noise = np.array([number(i, method, self.seed) for i in prompts["id"]])
        return shift.to_numpy() * (1 + (method == "DCR")) + 2 * noise

    def refusal_probability(self, method, prompts, step=-1) -> np.ndarray:
        return 1 / (1 + np.exp(-self.refusal(method, prompts, step)))

    def states(self, method: str, prompts: pd.DataFrame, step: int = -1) -> np.ndarray:
        seed = [int(number(i) * 2**31) for i in prompts["id"]]
        noise = np.stack(
            [np.random.default_rng(s).standard_normal((DEPTH + 1, HIDDEN)) for s in seed], 1
        )
        moved = noise + 0.1 * (method == "DCR")
        moved[..., 0] += 0.5 * (prompts["label"] == "toxic").to_numpy()
        axis = [2 + int(number(s) * (HIDDEN - 2)) for s in prompts["source"]]
        moved[:, np.arange(len(axis)), axis] += 4.0
        return moved.astype("float32")

    def kernel(self, method, prompts, step=-1) -> np.ndarray:
        at = self.states(method, prompts, step)[3].astype(float)
        return np.abs(at @ at.T) + np.eye(len(at)) * (2 + self.seed)

    def history(self, method: str, stage: str) -> pd.DataFrame:
        if stage == "evaluations":
            rows = {"step": [0, 5], "cross_similarity": [0.9, 0.1], "within_similarity": [0.9, 0.8]}
            return pd.DataFrame(rows | {"probe_auroc": [0.6, 0.9]})
        return pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0 + self.seed]})

    def in_distribution(self, method: str) -> set[str]:
        return {"DCR": {"xstest-safe", "advbench"}, "SCANS": {"advbench"}}.get(method, set())

    def ability(self, method: str) -> pd.DataFrame:
        rows = [
            {"task": "piqa", "item": str(i), "metric": "acc", "hit": float(number(i, method) < 0.6)}
            for i in range(30)
        ]
        return pd.DataFrame(rows)

    def answer_losses(self, method: str, prompts: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"item": prompts["id"], "loss": 10.0, "tokens": 5})


class StubExperiment:
    """An experiment of made-up runs.

    `table(name)` goes through the registry as the real one does.
    """

    live = True
    runs_of = Experiment.runs_of

    def __init__(
        self, methods=("base", "STL", "DCR", "SCANS"), seeds=(0, 1), root=None, every_seed=()
    ) -> None:
        test = [
            prompt_rows(name, label, q, role, met=met)
            for name, (label, q, role, met) in SETS.items()
        ]
        held = [
            prompt_rows(f"validation-{label}", label, 0.5, "validation", met=True)
            for label in ("toxic", "seemingly_toxic", "general")
        ]
        self.methods, self.seeds, self.root = tuple(methods), tuple(seeds), root
        self.prompts = pd.concat(test, ignore_index=True)
        self.answered = self.prompts
        self.validation = pd.concat(held, ignore_index=True)
        few = self.prompts["request"].str.split().str[-1].astype(int) < 6
        self.curve_prompts = self.prompts[few].reset_index(drop=True)
        shared = (self.prompts, self.validation, self.curve_prompts)
        self.runs = tuple(StubRun(s, *shared) for s in seeds)
        self.config, self.made = self.runs[0].config.replaced(every_seed=every_seed), {}

    def table(self, name: str) -> pd.DataFrame:
        if name not in self.made:
            self.made[name] = table_entry(name).make(self)
        return self.made[name].copy()

    def artifacts(self, **_) -> list[dict]:
        return [
            {
                "kind": k,
                "name": m,
                "seed": s,
                "seconds": 10.0,
                "peak_memory_mib": 900.0,
                "started": "",
            }
            for m in self.methods
            for k in ("align", "generate")
            for s in self.seeds
        ]
