"""Experiment: profile + seed + run directory → every stage, lazily, each result cached by what it depends on.

The only place that knows the whole line: data → pairs → representations → refine → align → generate → judge →
metrics. Notebooks call this class and the plots, nothing else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from dcr.config import methods_file
from dcr.data.files import content_key, read_jsonl, write_atomic
from dcr.errors import DCRError
from dcr.run.training import RULES, Training

log = logging.getLogger("dcr")


class Experiment(Training):
    """One configuration in one run directory: trained methods (see `Training`), their answers, verdicts and metrics."""

    # ---- answers, verdicts, metrics ----------------------------------------------------------------------

    def generations(self, method: str, step: int = -1) -> pd.DataFrame:
        """Answers of a method to all evaluation prompts (last step) or to the curve's subset (earlier steps)."""
        from dcr.data.sets import table_hash
        from dcr.lm.generate import generate, inference_dtype

        prompts = self.prompts if step < 0 else self.curve_prompts
        if step >= 0 and (same := self._answered_in_full(method, step)):
            rows = self.generations(same)
            return (
                rows[rows["prompt_id"].isin(prompts["id"])]
                .assign(method=method)
                .reset_index(drop=True)
            )
        dependencies = {
            "weights": self.weights_key(method, step),
            "prompts": table_hash(prompts),
            "generation": self.config.generation.model_dump(),
            "seed": self.config.seed,
        }
        name, steering = method if step < 0 else f"{method}@{step}", None
        if "steer" in self.stages(method):
            from dcr.run.steer import steering_of

            if step == 0:  # strength 0 is the model that is steered
                on = methods_file()[method]["steers"]
                return self.generations(on, self.steps(on)[-1]).assign(method=method)
            steering = steering_of(self, method, step)
            dependencies["steering"] = steering.settings

        def build(folder: Path) -> dict:
            options = self.config.generation
            if options.endpoint:  # one served model: its answers must not stand for several methods
                from dcr.lm.endpoint import generate_remote

                others = [m for m in self.methods if m not in RULES and m != method]
                if others or steering:
                    raise DCRError(
                        f"generation.endpoint={options.endpoint} serves one model, but the run has "
                        f"{', '.join(self.methods)}. Serve an exported model and name that method alone; steered "
                        "methods need the local model."
                    )
                rows = generate_remote(
                    prompts,
                    options.endpoint,
                    method=method,
                    seed=self.config.seed,
                    max_new_tokens=options.max_new_tokens,
                    temperature=options.temperature,
                    out=folder / "generations.jsonl",
                )
                return {
                    "prompts": len(rows),
                    "missing": len(prompts) - len(rows),
                    "endpoint": options.endpoint,
                }
            model, tokenizer = self.model(method, step)
            model = model.to(inference_dtype(self.config.model.precision, str(model.device)))
            rows = generate(
                model,
                tokenizer,
                prompts,
                method=method,
                seed=self.config.seed,
                max_new_tokens=options.max_new_tokens,
                batch_size=options.batch_size,
                temperature=options.temperature,
                out=folder / "generations.jsonl",
                steering=steering,
            )
            return {
                "prompts": len(rows),
                "truncated": int((rows["finish"] == "length").sum()),
                "dtype": str(model.dtype),
                "batch_size": options.batch_size,
                "new_tokens": int(rows["n_tokens"].sum()),
                **({"steering": steering.settings} if steering else {}),
                **self._facts(),
            }

        artifact = self.store.get("generate", name, dependencies, build)
        return pd.DataFrame(read_jsonl(artifact.path / "generations.jsonl"))

    def _answered_in_full(self, method: str, step: int) -> str:
        """The method whose answers to all prompts are those of this step: itself at its last one, base before any training."""
        if "steer" in self.stages(method):
            return method if step == 100 else ""  # the nominal strength
        if step == self.steps(method)[-1]:
            return method
        return (
            "base"
            if step == 0 and "refine" not in self.stages(method) and "base" in self.methods
            else ""
        )

    def verdicts(self, method: str, step: int = -1) -> pd.DataFrame:
        """Verdicts of the configured judge (the curve's judge at earlier steps)."""
        from dcr.evaluate.judges import identity, judge
        from dcr.evaluate.metrics import question_mark_rule

        prompts = self.prompts if step < 0 else self.curve_prompts
        if method in RULES:
            return question_mark_rule(prompts)
        name = self.config.evaluation.judge if step < 0 else self.config.evaluation.curve_judge
        answers = self.generations(method, step)
        dependencies = {"answers": content_key(answers.to_dict("records")), **identity(name)}

        def build(folder: Path) -> None:
            rows = judge(prompts, answers, name=name)
            write_atomic(
                folder / "verdicts.jsonl",
                rows.to_json(orient="records", lines=True, force_ascii=False),
            )

        artifact = self.store.get(
            "judge", method if step < 0 else f"{method}@{step}", dependencies, build
        )
        return pd.DataFrame(read_jsonl(artifact.path / "verdicts.jsonl"))

    def metric_rows(self, method: str, step: int = -1) -> pd.DataFrame:
        """Rates per benchmark and form with intervals (one method, one step) as metric rows."""
        from dcr.evaluate.metrics import rate_rows

        prompts = self.prompts if step < 0 else self.curve_prompts
        answers = None if method in RULES else self.generations(method, step)
        rows = rate_rows(
            prompts,
            self.verdicts(method, step),
            profile=self.config.profile,
            method=method,
            seed=self.config.seed,
            generations=answers,
        )
        trained = set() if method in RULES else self.in_distribution(method)
        origin = prompts.groupby("benchmark")["source"].first().to_dict()
        return rows.assign(
            step=step, in_distribution=[origin.get(b, b) in trained for b in rows["benchmark"]]
        )

    def metrics(self) -> pd.DataFrame:
        """Metric rows of all methods at the last step, the question-mark rule among them; written to metrics.csv."""
        rows = pd.concat(
            [self.metric_rows(m) for m in dict.fromkeys((*self.methods, *RULES))], ignore_index=True
        )
        self.write_table("metrics", rows)
        return rows

    def curve(self, method: str) -> pd.DataFrame:
        """Metric rows of a method at every recorded alignment step: its curve in the compliance-safety plane.

        A steering method's curve is its sweep of strengths: `step` is the strength in per cent of the nominal one, and
        `strength` (missing for the others) the multiple.
        """
        steers = "steer" in self.stages(method)
        return pd.concat(
            [
                self.metric_rows(method, step).assign(
                    strength=step / 100 if steers else float("nan")
                )
                for step in self.steps(method)
            ],
            ignore_index=True,
        )

    def curves(self) -> pd.DataFrame:
        """Curves of every method that aligns or steers; written to curves.csv."""
        rows = pd.concat(
            [self.curve(m) for m in self.methods if {"align", "steer"} & set(self.stages(m))],
            ignore_index=True,
        )
        self.write_table("curves", rows)
        return rows

    def matched_safety(self) -> pd.DataFrame:
        """Compliance at matched DSR and area of every method's curve (`dcr.tables.comparisons`); written to matched_safety.csv."""
        from dcr.tables.comparisons import matched_safety_table

        return matched_safety_table(self)

    def capabilities(self, method: str) -> pd.DataFrame:
        """Per-item general ability and held-out answer losses of a method, cached (`dcr.tables.ability`)."""
        from dcr.tables.ability import measure

        return measure(self, method)

    # ---- output ------------------------------------------------------------------------------------------

    def write_table(self, name: str, rows: pd.DataFrame) -> Path:
        """Write a tidy table to tables/<name>.csv of the run directory (figures are drawn from these)."""
        path = self.store.root / "tables" / f"{name}.csv"
        write_atomic(path, rows.to_csv(index=False))
        return path

    def read_table(self, name: str) -> pd.DataFrame:
        """Read back what `write_table` wrote. Raises DCRError naming the notebook that makes it."""
        path = self.store.root / "tables" / f"{name}.csv"
        if not path.exists():
            raise DCRError(
                f"{path} is missing: run the notebook that writes it first (04 for metrics and curves)."
            )
        return pd.read_csv(path, keep_default_na=True)

    def manifest(self) -> dict:
        """What this run is: configuration, environment, and every artifact with its time and memory."""
        from dcr.run.store import environment

        artifacts = []
        for path in sorted(self.store.root.glob("*/*/manifest.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            artifacts.append(
                {
                    k: content.get(k)
                    for k in ("kind", "name", "seconds", "peak_memory_mib", "started")
                }
            )
        whole = {
            "config": self.config.to_dict(),
            "methods": list(self.methods),
            "environment": environment(),
            "artifacts": artifacts,
            "data": self._data_facts(),
        }
        write_atomic(
            self.store.root / "manifest.json", json.dumps(whole, indent=1, ensure_ascii=False)
        )
        return whole

    def _data_facts(self) -> dict:
        from dcr.data.sets import table_hash

        facts = {
            n: {"rows": len(t), "hash": table_hash(t)} for n, t in self.sets.benchmarks.items()
        }
        return facts | {
            n: {"rows": len(t), "hash": table_hash(t)}
            for n, t in (
                ("toxic", self.sets.toxic),
                ("seemingly_toxic", self.sets.seemingly_toxic),
                ("mix", self.sets.mix),
            )
        }


def run_methods(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Run every stage of every method, cheapest first; yields (method, what was done)."""
    for method in experiment.methods:
        stages = experiment.stages(method)
        if "refine" in stages:
            experiment.refined(method)
            yield method, "refined"
        if "align" in stages:
            experiment.aligned(method)
            yield method, "aligned"
        if "steer" in stages:
            from dcr.run.steer import fitted

            fitted(experiment, method)
            yield method, "directions fitted"
        experiment.metric_rows(method)
        yield method, "judged"
