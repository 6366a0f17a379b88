"""What a run trains: stage 1, stage 2, steering fits, each kept under all that it depends on."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import nn

from dcr.config import methods_file
from dcr.data.files import read_jsonl
from dcr.data.sets import table_hash, validation_prompts
from dcr.errors import DCRError
from dcr.run.models import TENSORS, changed_by, put_on, shared_copy
from dcr.run.recipes import Recipes
from dcr.run.store import Artifact, is_main


class Point(NamedTuple):
    """A place on a method's curve: alignment step (-1: the last), multiple of its steering."""

    step: int = -1
    strength: float = 1.0


class Training(Recipes):
    """The training half of a run: what methods train and fit, and the models that come of it."""

    def layer(self, method: str = "DCR") -> int:
        """ℓ of a method as a number of blocks: its stage 1's, else its recipe's."""
        from dcr.analysis.probes import best_layer
        from dcr.lm.blocks import resolve_layer
        from dcr.lm.states import hidden_states

        if "refine" in self.stages(method):
            return self.refined(method).manifest["layer"]
        layer = self.recipe(method).refine.layer
        if layer != "auto":
            return resolve_layer(layer, self.depth)
        sets = self.sets(method)
        prompts = pd.concat([sets.toxic, sets.seemingly_toxic], ignore_index=True)

        def build(folder: Path) -> dict:
            texts, path = prompts["text"].tolist(), self.config.model.layers_path
            best, _ = best_layer(hidden_states(*self.base(), texts, layers_path=path), prompts)
            return {"layer": int(best)}

        key = {"base": self.base_model.key, "prompts": table_hash(prompts)}
        return self.store.get("layer", "auto", key, build).manifest["layer"]

    def model(self, method: str, step: int = -1) -> tuple[nn.Module, Any]:
        """(model, tokenizer) of a method after alignment step `step`, adapters merged.

        It shares unchanged tensors with the base. Steering acts at generation, not here.
        """
        kept = self.weights(method, step)
        base, tokenizer = self.base()
        model = shared_copy(base, {n for path, _ in kept for n in changed_by(path)})
        for path, at in kept:
            model = put_on(model, path, at)
        return model.eval(), tokenizer

    def weights(self, method: str, step: int = -1) -> list[tuple[Path, int]]:
        """What is put on the base, in order: an artifact's folder and its recorded step."""
        stages = self.stages(method)
        if on := self.entry(method).get("steers"):
            edit = [(self.fitted(method).path, -1)] if "edit" in stages else []
            return [*self.weights(on), *edit]
        kept = [(self.refined(method).path, -1)] if "refine" in stages else []
        if "align" in stages and step != 0:  # adapters change nothing before their first step
            kept.append((self.aligned(method).path, -1 if step == self.steps(method)[-1] else step))
        return kept

    def weights_key(self, method: str, step: int = -1) -> dict[str, Any]:
        """What identifies a method's weights; its seed only where an artifact's key holds it."""
        on = [f"{path.name}@{at}" for path, at in self.weights(method, step)]
        return {"base": self.base_model.key, "weights": on}

    def _stage(
        self, stage: str, method: str, train: Callable[..., tuple[Any, dict]], **more: Any
    ) -> Artifact:
        """The artifact of `train(base model, tokenizer, options) -> (what to keep, facts)`."""
        recipe, tables = self.recipe(method), self.trained_on(method)[stage]
        config = getattr(recipe, stage)
        dependencies = {
            "base": self.base_model.key,
            "data": {name: table_hash(rows) for name, rows in tables.items()},
            stage: config.model_dump(),
            "seed": self.seed,
            **more,
        }

        def build(folder: Path) -> dict:
            options = {"config": config, "seed": self.seed, "work_dir": folder, "merge": False}
            options["precision"] = self.base_model.precision
            options["layers_path"] = recipe.model.layers_path
            model, facts = train(*self.base(), options)
            if is_main():
                model.save_pretrained(folder / "model")
                for path in (*folder.glob("checkpoint-*"), *folder.glob("broken-*")):
                    shutil.rmtree(path, ignore_errors=True)  # a finished stage resumes no more
            return {**facts, **self.facts(recipe)}

        return self.store.get(stage, method, dependencies, build)

    def refined(self, method: str = "DCR") -> Artifact:
        """Stage 1: `model/` (adapter), `history.jsonl`, `evaluations.jsonl`; manifest: its ℓ."""
        from dcr.train.refine import refine

        options, tables = self.recipe(method).refine, self.trained_on(method)["refine"]

        def train(base: nn.Module, tokenizer: Any, how: dict) -> tuple[nn.Module, dict]:
            model = shared_copy(base, () if options.lora_rank else None)
            done = refine(model, tokenizer, **{**tables, **how})
            return done.model, {"layer": done.layer, "stop_reason": done.stop_reason}

        return self._stage("refine", method, train)

    def aligned(self, method: str = "STL") -> Artifact:
        """Stage 2: `model/` (adapter), `steps/` (weights at recorded steps), `history.jsonl`."""
        from dcr.lm.blocks import in_precision
        from dcr.train.align import align

        options, mix = self.recipe(method).align, self.sets(method).mix
        first = self.refined(method) if "refine" in self.stages(method) else None
        layer = self.layer(method) if options.above_layer else None
        guide = self.entry(method).get("guide")  # the steered method whose score the token gets

        def train(base: nn.Module, tokenizer: Any, how: dict) -> tuple[nn.Module, dict]:
            rows = mix
            if guide:
                model, _ = self.model(guide)
                with in_precision(model, self.base_model.precision):  # as it decides
                    score = self.steering(guide).score(model, tokenizer, mix["text"].tolist())
                rows = mix.assign(target=score)
            own = set(changed_by(first.path)) if first else set()
            model = shared_copy(base, own if options.lora_rank else None)
            model = put_on(model, first.path) if first else model
            done = align(model, tokenizer, rows, layer=layer, **how)
            facts: dict[str, Any] = {"recorded_steps": done.steps, "truncated": done.truncated}
            facts |= {"dropped": done.dropped, "mix": mix["part"].value_counts().to_dict()}
            return done.model, facts

        return self._stage(
            "align",
            method,
            train,
            refine=first.path.name if first else "",
            layer=layer,
            guide=self.fitted(guide).path.name if guide else "",
        )

    def fitted(self, method: str) -> Artifact:
        """A steering method's fit: `tensors.safetensors`; manifest `fit`: what was chosen, why."""
        from safetensors.torch import save_file

        from dcr.lm.blocks import in_precision
        from dcr.lm.device import keeping
        from dcr.steering import KINDS

        method = self.decider(method)
        entry, recipe = self.entry(method), self.recipe(method)
        if "steering" not in entry:
            steered = [m for m, e in methods_file().items() if "steering" in e]
            raise DCRError(f"{method} fits nothing; methods that do: {', '.join(steered)}.")
        kind, on = KINDS[entry["steering"]], entry.get("steers", method)
        tables = self.trained_on(method)["fit"]
        validation = validation_prompts(self.config, of=self.of)  # for all alike
        options = recipe.steering.model_dump(exclude={"strengths"})
        dependencies = {
            "weights": self.weights_key(on),
            "precision": self.base_model.precision,
            "steering": {"kind": entry["steering"], **options},
            "data": {role: table_hash(t, "source") for role, t in tables.items()},
            "validation": table_hash(validation, "benchmark"),
            "seed": self.seed if getattr(kind, "SEEDED", False) else None,
        }

        def build(folder: Path) -> dict:
            how = {"seed": self.seed, "layers_path": recipe.model.layers_path}
            kept = keeping(folder) if getattr(kind, "LONG", False) else contextlib.nullcontext()
            model, tokenizer = self.model(on)
            with kept, in_precision(model, self.base_model.precision):  # as it will act
                fit = kind.fit(model, tokenizer, tables, validation, recipe.steering, **how)
            save_file({k: v.contiguous() for k, v in fit.tensors.items()}, folder / TENSORS)
            return {"fit": fit.facts, **self.facts(recipe)}

        return self.store.get("fit", method, dependencies, build)

    def steering(self, method: str, strength: float = 1.0) -> Any:
        """The method's steering object at a multiple of its strength; None where it has none."""
        name = self.entry(method).get("steering", "")
        if not name or "edit" in self.stages(method):
            return None
        from safetensors.torch import load_file

        from dcr.steering import KINDS

        fit = self.fitted(method)
        if fit.path not in self._steering:  # its tensors are read once
            facts, tensors = fit.manifest["fit"], load_file(fit.path / TENSORS)
            path = self.config.model.layers_path
            self._steering[fit.path] = KINDS[name].load(facts, tensors, layers_path=path)
        steering = self._steering[fit.path]
        return steering if strength == 1 else steering.at(strength)

    def in_distribution(self, method: str) -> set[str]:
        """Names of the sources whose prompts a method trained on or took anchors from."""
        tables = [t for stage in self.trained_on(method).values() for t in stage.values()]
        below = (self.in_distribution(on) for on in self.learns_from(method))
        return {source for rows in tables for source in rows["source"]}.union(*below)

    def history(self, method: str, stage: str) -> pd.DataFrame:
        """The rows that a stage wrote while it ran ("refine", "evaluations" or "align")."""
        artifact = self.aligned(method) if stage == "align" else self.refined(method)
        name = "evaluations.jsonl" if stage == "evaluations" else "history.jsonl"
        rows = pd.DataFrame(read_jsonl(artifact.path / name))
        return rows.assign(method=method, seed=self.seed, stage=stage)

    def steps(self, method: str) -> list[int]:
        """Alignment steps whose weights are recorded; [0] for a method that does not align."""
        if "align" not in self.stages(method):
            return [0]
        return self.aligned(method).manifest["recorded_steps"]

    def points(self, method: str) -> list[Point]:
        """A method's curve: its recorded steps, or its steering's strengths (1.0 among them)."""
        if "steer" in self.stages(method):
            return [Point(strength=s) for s in sorted({1.0, *self.config.steering.strengths})]
        return [Point(step) for step in self.steps(method)]
