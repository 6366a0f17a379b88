"""What a run trains: stage 1, stage 2 and steering fits, each an artifact keyed by all it depends
on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import nn

from dcr.config import Config, methods_file, near
from dcr.data.files import read_jsonl
from dcr.errors import DCRError
from dcr.run.models import TENSORS, Base, changed_by, put_on, shared_copy
from dcr.run.store import Artifact, Store, is_main


class Point(NamedTuple):
    """Where on its curve a method stands: alignment step (-1: the last), multiple of its
    steering."""

    step: int = -1
    strength: float = 1.0


class Training:
    """The training half of a run: one configuration with one seed in one run directory."""

    def __init__(self, config: Config, store: Store, base: Base, of: Sequence[Config] = ()) -> None:
        self.config, self.store, self.base_model, self.seed = config, store, base, config.seed
        self.of = list(of) or [config.replaced(seed=0)]  # what shares one ledger of prompts
        self._steering: dict[str, Any] = {}
        self._sets: dict[str, Any] = {}

    # ---- recipes and data ----------------------------------------------------------------------

    def entry(self, method: str) -> dict[str, Any]:
        """The method's entry in methods.yaml. Raises DCRError listing the known ones."""
        known = methods_file()
        if method not in known:
            raise DCRError(
                f"method {method!r} is unknown; known: {', '.join(known)}."
                + near(method, list(known))
            )
        return known[method]

    def recipe(self, method: str) -> Config:
        """The configuration of one method: the run's with the method's overrides on top."""
        return self.config.override(self.entry(method).get("overrides", {}))

    def stages(self, method: str) -> list[str]:
        """What a method runs, of refine, align, steer, edit, rule."""
        return list(self.entry(method).get("stages", []))

    def sets(self, method: str):
        """The `TrainingSets` of a method's recipe."""
        from dcr.data.sets import training_sets

        if method not in self._sets:
            self._sets[method] = training_sets(self.recipe(method), of=self.of)
        return self._sets[method]

    # ---- models --------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        from dcr.lm.blocks import decoder_layers

        return len(decoder_layers(self.base()[0], self.config.model.layers_path))

    def layer(self, method: str = "DCR") -> int:
        """ℓ of a method as a number of blocks: its stage 1's, else its recipe's."""
        from dcr.lm.blocks import resolve_layer

        if "refine" in self.stages(method):
            return self.refined(method).manifest["layer"]
        layer = self.recipe(method).refine.layer
        return self._best_layer(method) if layer == "auto" else resolve_layer(layer, self.depth)

    def _best_layer(self, method: str) -> int:
        from dcr.analysis.probes import best_layer
        from dcr.data.sets import table_hash
        from dcr.lm.states import hidden_states

        sets = self.sets(method)
        prompts = pd.concat([sets.toxic, sets.seemingly_toxic], ignore_index=True)
        key = {"base": self.base_model.key, "prompts": table_hash(prompts)}

        def build(folder: Path) -> dict:
            layer, _ = best_layer(hidden_states(*self.base(), prompts["text"].tolist()), prompts)
            return {"layer": int(layer)}

        return self.store.get("layer", "auto", key, build).manifest["layer"]

    def base(self) -> tuple[nn.Module, Any]:
        """(model, tokenizer) of the base model, shared: never write into its weights in place."""
        return self.base_model.loaded()

    def model(self, method: str, step: int = -1) -> tuple[nn.Module, Any]:
        """(model, tokenizer) of a method after alignment step `step` (-1: the last), adapters
        merged.

        It shares unchanged tensors with the base. Steering acts at generation, not here.
        """
        kept = self.weights(method, step)
        base, tokenizer = self.base()
        model = shared_copy(base, {n for path, _ in kept for n in changed_by(path)})
        for path, at in kept:
            model = put_on(model, path, at)
        return model.eval(), tokenizer

    def weights(self, method: str, step: int = -1) -> list[tuple[Path, int]]:
        """What is put on the base, in order: an artifact's folder and its recorded step (-1: the
        last)."""
        stages = self.stages(method)
        if on := self.entry(method).get("steers"):
            edit = [(self.fitted(method).path, -1)] if "edit" in stages else []
            return [*self.weights(on), *edit]
        kept = [(self.refined(method).path, -1)] if "refine" in stages else []
        if "align" in stages and step != 0:  # adapters change nothing before their first step
            path = self.aligned(method).path
            kept.append((path, -1 if step == self.steps(method)[-1] else step))
        return kept

    def weights_key(self, method: str, step: int = -1) -> dict[str, Any]:
        """What identifies a method's weights. The seed is in it only where an artifact's key holds
        it."""
        on = [f"{path.name}@{at}" for path, at in self.weights(method, step)]
        return {"base": self.base_model.key, "weights": on}

    # ---- stages --------------------------------------------------------------------------------

    def _facts(self, recipe: Config) -> dict[str, Any]:
        return {"config": recipe.to_dict(), "seed": self.seed, **self.base_model.facts()}

    def refined(self, method: str = "DCR") -> Artifact:
        """Stage 1: `model/` (adapter), `history.jsonl`, `evaluations.jsonl`; manifest: layer, why
        it stopped."""
        from dcr.data.sets import table_hash
        from dcr.train.refine import refine

        recipe, sets = self.recipe(method), self.sets(method)
        options = recipe.refine
        tables = {"toxic": sets.toxic, "seemingly_toxic": sets.seemingly_toxic}
        if options.general_share > 0 or options.retention > 0:
            tables["general"] = sets.general
        dependencies = {
            "base": self.base_model.key,
            "data": {name: table_hash(rows) for name, rows in tables.items()},
            "refine": options.model_dump(),
            "seed": self.seed,
        }

        def build(folder: Path) -> dict:
            base, tokenizer = self.base()
            result = refine(
                shared_copy(base, () if options.lora_rank else None),
                tokenizer,
                **tables,
                config=options,
                seed=self.seed,
                work_dir=folder,
                merge=False,
                precision=self.base_model.precision,
                layers_path=recipe.model.layers_path,
            )
            _keep(result.model, folder)
            facts = {"layer": result.layer, "stop_reason": result.stop_reason}
            return {**facts, "in_distribution": _sources(tables), **self._facts(recipe)}

        return self.store.get("refine", method, dependencies, build)

    def aligned(self, method: str = "STL") -> Artifact:
        """Stage 2: `model/` (adapter), `steps/` (weights at recorded steps), `history.jsonl`."""
        from dcr.data.sets import table_hash
        from dcr.train.align import align

        recipe, mix = self.recipe(method), self.sets(method).mix
        options = recipe.align
        first = self.refined(method) if "refine" in self.stages(method) else None
        layer = self.layer(method) if options.above_layer else None
        guide = self.entry(method).get(
            "guide"
        )  # the steered method whose score the token is tied to
        dependencies = {
            "base": self.base_model.key,
            "refine": first.path.name if first else "",
            "data": {"mix": table_hash(mix)},
            "align": options.model_dump(),
            "layer": layer,
            "guide": self.fitted(guide).path.name if guide else "",
            "seed": self.seed,
        }

        def build(folder: Path) -> dict:
            base, tokenizer = self.base()
            rows = mix
            if guide:
                score = self.steering(guide).score(*self.model(guide), mix["text"].tolist())
                rows = mix.assign(target=score)
            own = set(changed_by(first.path)) if first else set()
            model = shared_copy(base, own if options.lora_rank else None)
            result = align(
                put_on(model, first.path) if first else model,
                tokenizer,
                rows,
                config=options,
                seed=self.seed,
                work_dir=folder,
                merge=False,
                precision=self.base_model.precision,
                layer=layer,
                layers_path=recipe.model.layers_path,
            )
            _keep(result.model, folder)
            facts = {"recorded_steps": result.steps, "truncated": result.truncated}
            facts["dropped"] = result.dropped
            facts["mix"] = mix["part"].value_counts().to_dict()
            return {**facts, "in_distribution": _sources({"mix": mix}), **self._facts(recipe)}

        return self.store.get("align", method, dependencies, build)

    def fitted(self, method: str) -> Artifact:
        """A steering method's fit: `tensors.safetensors`; manifest `fit`: all that was chosen, and
        from what."""
        from safetensors.torch import save_file

        from dcr.data.sets import anchors, table_hash, validation_prompts
        from dcr.steering import KINDS

        entry, recipe = self.entry(method), self.recipe(method)
        if "steering" not in entry:
            steered = [m for m, e in methods_file().items() if "steering" in e]
            raise DCRError(f"{method} fits nothing; methods that do: {', '.join(steered)}.")
        kind, of = KINDS[entry["steering"]], self.of
        tables = {role: anchors(recipe, role, of=of) for role in kind.ANCHORS}
        validation = validation_prompts(recipe, of=of)
        options = recipe.steering.model_dump(exclude={"strengths"})
        on = entry.get("steers", method)
        dependencies = {
            "weights": self.weights_key(on),
            "steering": {"kind": entry["steering"], **options},
            "data": {role: table_hash(t) for role, t in tables.items()},
            "validation": table_hash(validation),
            "seed": self.seed if getattr(kind, "SEEDED", False) else None,
        }

        def build(folder: Path) -> dict:
            fit = kind.fit(
                *self.model(on),
                tables,
                validation,
                recipe.steering,
                seed=self.seed,
                layers_path=recipe.model.layers_path,
            )
            save_file({k: v.contiguous() for k, v in fit.tensors.items()}, folder / TENSORS)
            facts = {"fit": fit.facts, "in_distribution": _sources(tables)}
            return {**facts, **self._facts(recipe)}

        return self.store.get("fit", method, dependencies, build)

    def steering(self, method: str, strength: float = 1.0):
        """The method's steering object at a multiple of its strength, or None for a method that has
        none."""
        name = self.entry(method).get("steering", "")
        if not name or "edit" in self.stages(method):
            return None
        from safetensors.torch import load_file

        from dcr.steering import KINDS

        artifact = self.fitted(method)
        if artifact.path.name not in self._steering:  # one object, so that a prompt is read once
            self._steering[artifact.path.name] = KINDS[name].load(
                artifact.manifest["fit"],
                load_file(artifact.path / TENSORS),
                layers_path=self.config.model.layers_path,
            )
        steering = self._steering[artifact.path.name]
        return steering if strength == 1 else steering.at(strength)

    # ---- what was trained ----------------------------------------------------------------------

    def history(self, method: str, stage: str) -> pd.DataFrame:
        """The rows that a stage wrote while it ran ("refine", "evaluations" or "align")."""
        artifact = self.aligned(method) if stage == "align" else self.refined(method)
        name = "evaluations.jsonl" if stage == "evaluations" else "history.jsonl"
        rows = pd.DataFrame(read_jsonl(artifact.path / name))
        return rows.assign(method=method, seed=self.seed, stage=stage)

    def complete(self, method: str) -> Iterator[str]:
        """Train and fit all that a method needs; yields what was done."""
        entry, stages = self.entry(method), self.stages(method)
        if "steers" in entry:
            yield from self.complete(entry["steers"])
        if "refine" in stages:
            self.refined(method)
            yield "refined"
        if "align" in stages:
            self.aligned(method)
            yield "aligned"
        if "steering" in entry:
            self.fitted(method)
            yield "fitted"

    def steps(self, method: str) -> list[int]:
        """Alignment steps at which a method's weights are recorded; [0] for one that does not
        align."""
        if "align" not in self.stages(method):
            return [0]
        return self.aligned(method).manifest["recorded_steps"]

    def points(self, method: str) -> list[Point]:
        """A method's curve: its recorded steps, or the strengths of its steering (1.0 among
        them)."""
        if "steer" in self.stages(method):
            strengths = sorted({1.0, *self.config.steering.strengths})
            return [Point(strength=s) for s in strengths]
        return [Point(step) for step in self.steps(method)]

    def in_distribution(self, method: str) -> set[str]:
        """Names of the sources whose prompts a method trained on or took anchors from."""
        entry, stages = self.entry(method), self.stages(method)
        names = self.in_distribution(entry["steers"]) if "steers" in entry else set()
        found = [self.refined(method)] if "refine" in stages else []
        found += [self.aligned(method)] if "align" in stages else []
        found += [self.fitted(method)] if "steering" in entry else []
        return names.union(*(a.manifest["in_distribution"] for a in found))


def _sources(tables: dict[str, pd.DataFrame]) -> list[str]:
    return sorted({source for rows in tables.values() for source in rows["source"]})


def _keep(model: nn.Module, folder: Path) -> None:
    """Save what was trained; resume points are of no use once a stage is finished."""
    from dcr.train.adapters import save_trained

    if not is_main():
        return
    save_trained(model, folder / "model")
    for path in [*folder.glob("checkpoint-*"), *folder.glob("broken-*")]:
        shutil.rmtree(path, ignore_errors=True)
