"""Experiment: profile + seed + run directory → every stage, lazily, each result cached by what it depends on.

The only place that knows the whole line: data → pairs → representations → refine → align → generate → judge →
metrics. Notebooks call this class and the plots, nothing else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import pandas as pd

from dcr.config import Config, load_config, methods_file
from dcr.errors import DCRError
from dcr.store import Artifact, Store, content_key, read_jsonl, write_atomic

log = logging.getLogger("dcr")
RULES = ("question-mark",)


class Experiment:
    """One configuration in one run directory.

    overrides: "refine.layer=0.4,align.epochs=2" or a mapping. methods: which rows to compute (default: the profile's).
    """

    def __init__(self, profile: str = "quick", *, seed: int = 0, run_dir: str | Path = "",
                 overrides: str | Mapping[str, object] = "", methods: tuple[str, ...] = ()) -> None:
        self.config = load_config(profile, seed=seed, overrides=overrides)
        self.methods = tuple(methods) or self.config.methods
        known = methods_file()
        for method in self.methods:
            if method not in known:
                raise DCRError(f"method {method!r} is unknown; known: {', '.join(known)}.")
        self.store = Store(run_dir or Path("runs") / profile)
        self._loaded: tuple | None = None

    # ---- configuration and data -------------------------------------------------------------------------

    def recipe(self, method: str) -> Config:
        """The configuration of one method: the profile's with the method's overrides on top."""
        return self.config.override(methods_file()[method].get("overrides", {}))

    def stages(self, method: str) -> list[str]:
        """The stages a method runs, of refine, align, steer, rule."""
        return methods_file()[method].get("stages", [])

    @cached_property
    def sets(self):
        """Prompt tables of the profile (methods may train on others: see `training_sets`)."""
        from dcr.data.sets import load_sets

        return load_sets(self.config)

    def training_sets(self, method: str):
        """(toxic, seemingly toxic, general, mix) that one method trains on."""
        from dcr.data import sets

        recipe = self.recipe(method)
        return *sets.contrastive_sets(recipe), sets.general_prompts(recipe), sets.alignment_mix(recipe)

    @cached_property
    def leakage(self) -> pd.DataFrame:
        """Overlaps between training and evaluation prompts, checked before any training."""
        from dcr.data.sets import leakage

        report = leakage(self.sets)
        log.info("leakage check: %d overlapping pairs of prompts", len(report))
        return report

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """All evaluation prompts, with `benchmark`; ids unique. Prompts that overlap the alignment mix are dropped."""
        every = pd.concat(self.sets.benchmarks.values(), ignore_index=True)
        repeated = every["id"].duplicated()
        if repeated.any():
            raise DCRError(f"evaluation prompts: id {every.loc[repeated, 'id'].iloc[0]!r} occurs twice; benchmarks "
                           "must not share prompts.")
        return every

    @cached_property
    def curve_prompts(self) -> pd.DataFrame:
        """The subset judged at every alignment checkpoint: the same number from each benchmark, stratified."""
        from dcr.data.loaders import stratified_subset

        groups = [rows for _, rows in self.prompts.groupby("benchmark", sort=False)]
        each = max(4, self.config.data.curve_limit // len(groups))
        return pd.concat([stratified_subset(g, min(each, len(g)), self.config.seed) for g in groups], ignore_index=True)

    # ---- models ------------------------------------------------------------------------------------------

    @cached_property
    def model_key(self) -> dict:
        """What identifies the base model: its name, revision, dtype, template and, for folders, a checksum."""
        from dcr import embedded

        model = asdict(self.config.model)
        if model["name"] == "embedded":
            receipt = json.loads((embedded.ensure() / "receipt.json").read_text())
            return {**model, "sha256": receipt["model_sha256"]}
        weights = sorted(Path(model["name"]).glob("*.safetensors")) if Path(model["name"]).is_dir() else []
        return {**model, **{p.name: embedded.sha256_of(p) for p in weights}}

    def base(self):
        """A fresh (model, tokenizer) of the base model."""
        from dcr import models

        model = self.config.model
        return models.load(model.name, revision=model.revision, dtype=model.dtype, device=model.device,
                           chat_template=model.chat_template)

    def model(self, method: str, step: int = -1):
        """(model, tokenizer) of a method after alignment step `step` (-1: the last), adapters folded in.

        Steering methods give the model that they steer; `generations` steers it.
        """
        from dcr.adapters import apply_trained

        method = methods_file()[method].get("on", method)
        model, tokenizer = self.base()
        if "refine" in self.stages(method):
            model = apply_trained(model, self.refined(method).path / "model")
        if "align" in self.stages(method) and step != 0:  # adapters change nothing before their first step
            model = self._at_step(model, self.aligned(method).path, step)
        return model, tokenizer

    def layers(self, n: int) -> list[int]:
        """`n` layers spread over the base model's depth, the last one included."""
        return sorted({round(self._depth * (i + 1) / n) for i in range(n)})

    @cached_property
    def _depth(self) -> int:
        from dcr.models import decoder_layers

        return len(decoder_layers(self.base()[0], self.config.model.layers_path))

    @staticmethod
    def _at_step(model, folder: Path, step: int):
        from dcr.adapters import apply_trained, merged, reopen
        from dcr.alignment import load_step

        if step < 0:
            return apply_trained(model, folder / "model")
        trained = reopen(model, folder / "model")
        load_step(trained, folder, step)
        return merged(trained)

    # ---- stage 1 and 2 -----------------------------------------------------------------------------------

    def refined(self, method: str = "DCR") -> Artifact:
        """Stage 1 of a method: `model/` (adapter), `history.jsonl`, `evaluations.jsonl`; manifest: why it stopped."""
        from dcr.adapters import save_trained
        from dcr.data.sets import table_hash
        from dcr.refinement import refine

        recipe = self.recipe(method)
        toxic, seemingly, general, _ = self.training_sets(method)
        uses_general = recipe.refine.general_share > 0 or recipe.refine.retention > 0
        data = {"toxic": table_hash(toxic), "seemingly_toxic": table_hash(seemingly)}
        if uses_general:
            data["general"] = table_hash(general)
        dependencies = {"model": self.model_key, "data": data, "refine": asdict(recipe.refine), "seed": recipe.seed}

        def build(folder: Path) -> dict:
            _ = self.leakage
            model, tokenizer = self.base()
            result = refine(model, tokenizer, toxic=toxic, seemingly_toxic=seemingly,
                            general=general if uses_general else None, config=recipe.refine, seed=recipe.seed,
                            work_dir=folder, merge=False, layers_path=recipe.model.layers_path)
            save_trained(result.model, folder / "model")
            _drop_checkpoints(folder)
            return {"layer": result.layer, "stop_reason": result.stop_reason, "steps": len(result.history),
                    "in_distribution": sorted({*toxic["source"], *seemingly["source"]}), **self._facts()}

        return self.store.get("refine", method, dependencies, build)

    def aligned(self, method: str = "STL") -> Artifact:
        """Stage 2 of a method: `model/` (adapter), `steps/` (weights at log-spaced steps), `history.jsonl`."""
        from dcr.adapters import apply_trained, save_trained
        from dcr.alignment import align
        from dcr.data.sets import table_hash

        recipe = self.recipe(method)
        *_, mix = self.training_sets(method)
        first = self.refined(method) if "refine" in self.stages(method) else None
        dependencies = {"model": self.model_key, "refine": first.path.name if first else "", "mix": table_hash(mix),
                        "align": asdict(recipe.align), "seed": recipe.seed}
        if recipe.align.above_layer:
            dependencies["layer"] = recipe.refine.layer

        def build(folder: Path) -> dict:
            _ = self.leakage
            model, tokenizer = self.base()
            if first:
                model = apply_trained(model, first.path / "model")
            result = align(model, tokenizer, mix, config=recipe.align, seed=recipe.seed, work_dir=folder, merge=False,
                           layer=recipe.refine.layer if recipe.align.above_layer else None,
                           layers_path=recipe.model.layers_path)
            save_trained(result.model, folder / "model")
            _drop_checkpoints(folder)
            return {"recorded_steps": result.steps, "truncated_answers": result.truncated,
                    "mix": mix["role"].value_counts().to_dict(), "in_distribution": sorted(set(mix["source"])),
                    **self._facts()}

        return self.store.get("align", method, dependencies, build)

    def _facts(self) -> dict:
        """What every manifest carries beside the artifact's own facts."""
        from dcr.models import rendered_example

        if self._loaded is None:
            self._loaded = self.base()
        return {"config": self.config.to_dict(), "rendering": rendered_example(self._loaded[1])}

    def history(self, method: str, stage: str) -> pd.DataFrame:
        """The per-step history of a stage ("refine", "evaluations" or "align")."""
        artifact = self.refined(method) if stage in ("refine", "evaluations") else self.aligned(method)
        name = "evaluations.jsonl" if stage == "evaluations" else "history.jsonl"
        return pd.DataFrame(read_jsonl(artifact.path / name)).assign(method=method, stage=stage)

    def steps(self, method: str) -> list[int]:
        """Alignment steps at which a method's weights are recorded."""
        return self.aligned(method).manifest["recorded_steps"] if "align" in self.stages(method) else [0]

    def in_distribution(self, method: str) -> set[str]:
        """Registry names of the sources whose prompts a method trained on or took anchors from."""
        names: set[str] = set()
        method = methods_file()[method].get("on", method)
        if "refine" in self.stages(method):
            names |= set(self.refined(method).manifest["in_distribution"])
        if "align" in self.stages(method):
            names |= set(self.aligned(method).manifest["in_distribution"])
        return names

    # ---- answers, verdicts, metrics ----------------------------------------------------------------------

    def _weights_key(self, method: str, step: int) -> dict:
        if method in RULES:
            return {"rule": method}
        key = {"model": self.model_key, "step": step}
        if "refine" in self.stages(method):
            key["refine"] = self.refined(method).path.name
        if "align" in self.stages(method) and step != 0:
            key["align"] = self.aligned(method).path.name
        return key

    def generations(self, method: str, step: int = -1) -> pd.DataFrame:
        """Answers of a method to all evaluation prompts (last step) or to the curve's subset (earlier steps)."""
        from dcr.data.sets import table_hash
        from dcr.generation import generate, inference_dtype

        prompts = self.prompts if step < 0 else self.curve_prompts
        dependencies = {"weights": self._weights_key(method, step), "prompts": table_hash(prompts),
                        "generation": asdict(self.config.generation), "seed": self.config.seed}
        name = method if step < 0 else f"{method}@{step}"

        def build(folder: Path) -> dict:
            model, tokenizer = self.model(method, step)
            options = self.config.generation
            model = model.to(inference_dtype(options.dtype, str(model.device)))
            rows = generate(model, tokenizer, prompts, method=method, seed=self.config.seed,
                            max_new_tokens=options.max_new_tokens, batch_size=options.batch_size,
                            temperature=options.temperature, out=folder / "generations.jsonl")
            return {"prompts": len(rows), "truncated": int((rows["finish"] == "length").sum()),
                    "dtype": str(model.dtype), "batch_size": options.batch_size, **self._facts()}

        artifact = self.store.get("generate", name, dependencies, build)
        return pd.DataFrame(read_jsonl(artifact.path / "generations.jsonl"))

    def verdicts(self, method: str, step: int = -1) -> pd.DataFrame:
        """Verdicts of the configured judge (the curve's judge at earlier steps)."""
        from dcr.judges import judge
        from dcr.metrics import question_mark_rule

        prompts = self.prompts if step < 0 else self.curve_prompts
        if method in RULES:
            return question_mark_rule(prompts)
        name = self.config.evaluation.judge if step < 0 else self.config.evaluation.curve_judge
        answers = self.generations(method, step)
        dependencies = {"answers": content_key(answers.to_dict("records")), "judge": name}

        def build(folder: Path) -> None:
            rows = judge(prompts, answers, name=name)
            write_atomic(folder / "verdicts.jsonl", rows.to_json(orient="records", lines=True, force_ascii=False))

        artifact = self.store.get("judge", method if step < 0 else f"{method}@{step}", dependencies, build)
        return pd.DataFrame(read_jsonl(artifact.path / "verdicts.jsonl"))

    def metric_rows(self, method: str, step: int = -1) -> pd.DataFrame:
        """Rates per benchmark and form with intervals (one method, one step) as metric rows."""
        from dcr.metrics import rate_rows

        prompts = self.prompts if step < 0 else self.curve_prompts
        answers = None if method in RULES else self.generations(method, step)
        rows = rate_rows(prompts, self.verdicts(method, step), profile=self.config.profile, method=method,
                         seed=self.config.seed, generations=answers)
        trained = set() if method in RULES else self.in_distribution(method)
        origin = prompts.groupby("benchmark")["source"].first().to_dict()
        return rows.assign(step=step, in_distribution=[origin.get(b, b) in trained for b in rows["benchmark"]])

    def metrics(self) -> pd.DataFrame:
        """Metric rows of all methods at the last step, the question-mark rule among them; written to metrics.csv."""
        rows = pd.concat([self.metric_rows(m) for m in (*self.methods, *RULES) if m in RULES or m in self.methods],
                         ignore_index=True)
        self.write_table("metrics", rows)
        return rows

    def curve(self, method: str) -> pd.DataFrame:
        """Metric rows of a method at every recorded alignment step: its curve in the compliance-safety plane."""
        return pd.concat([self.metric_rows(method, step) for step in self.steps(method)], ignore_index=True)

    def curves(self) -> pd.DataFrame:
        """Curves of every method that aligns; written to curves.csv."""
        rows = pd.concat([self.curve(m) for m in self.methods if "align" in self.stages(m)], ignore_index=True)
        self.write_table("curves", rows)
        return rows

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
            raise DCRError(f"{path} is missing: run the notebook that writes it first (04 for metrics and curves).")
        return pd.read_csv(path, keep_default_na=True)

    def manifest(self) -> dict:
        """What this run is: configuration, environment, and every artifact with its time and memory."""
        from dcr.store import environment

        artifacts = []
        for path in sorted(self.store.root.glob("*/*/manifest.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            artifacts.append({k: content.get(k) for k in ("kind", "name", "seconds", "peak_memory_mib", "started")})
        whole = {"config": self.config.to_dict(), "methods": list(self.methods), "environment": environment(),
                 "artifacts": artifacts, "data": self._data_facts()}
        write_atomic(self.store.root / "manifest.json", json.dumps(whole, indent=1, ensure_ascii=False))
        return whole

    def _data_facts(self) -> dict:
        from dcr.data.sets import table_hash

        facts = {n: {"rows": len(t), "hash": table_hash(t)} for n, t in self.sets.benchmarks.items()}
        return facts | {n: {"rows": len(t), "hash": table_hash(t)} for n, t in
                        (("toxic", self.sets.toxic), ("seemingly_toxic", self.sets.seemingly_toxic),
                         ("mix", self.sets.mix))}


def _drop_checkpoints(folder: Path) -> None:
    """Resume points are of no use once a stage is finished."""
    import shutil

    for path in [*folder.glob("checkpoint-*"), *folder.glob("broken-*")]:
        shutil.rmtree(path, ignore_errors=True)


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
        experiment.metric_rows(method)
        yield method, "judged"
