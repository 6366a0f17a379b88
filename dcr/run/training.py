"""What an experiment trains: configuration, prompt sets, models, stage 1 and stage 2, cached by what they depend on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import pandas as pd

from dcr.config import Config, load_config, methods_file
from dcr.data.files import read_jsonl, sha256_of
from dcr.errors import DCRError
from dcr.run.store import Artifact, Store

log = logging.getLogger("dcr")
RULES = ("question-mark",)


class Training:
    """The training half of an Experiment: one configuration in one run directory.

    overrides: "refine.layer=0.4,align.epochs=2" or a mapping. methods: which rows to compute (default: the profile's).
    """

    def __init__(
        self,
        profile: str = "quick",
        *,
        seed: int = 0,
        run_dir: str | Path = "",
        overrides: str | Mapping[str, object] = "",
        methods: tuple[str, ...] = (),
    ) -> None:
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
        return (
            *sets.contrastive_sets(recipe),
            sets.general_prompts(recipe),
            sets.alignment_mix(recipe),
        )

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
            raise DCRError(
                f"evaluation prompts: id {every.loc[repeated, 'id'].iloc[0]!r} occurs twice; benchmarks "
                "must not share prompts."
            )
        return every

    @cached_property
    def curve_prompts(self) -> pd.DataFrame:
        """The subset judged at every alignment checkpoint: the same number from each benchmark, stratified."""
        from dcr.data.loaders import stratified_subset

        groups = [rows for _, rows in self.prompts.groupby("benchmark", sort=False)]
        each = max(4, self.config.data.curve_limit // len(groups))
        return pd.concat(
            [stratified_subset(g, min(each, len(g)), self.config.seed) for g in groups],
            ignore_index=True,
        )

    # ---- models ------------------------------------------------------------------------------------------

    @cached_property
    def model_key(self) -> dict:
        """What identifies the base model: its name, revision, dtype, template and, for folders, a checksum."""
        from dcr.lm import embedded

        model = self.config.model.model_dump()
        if model["name"] == "embedded":
            receipt = json.loads((embedded.ensure() / "receipt.json").read_text())
            return {**model, "sha256": receipt["model_sha256"]}
        weights = (
            sorted(Path(model["name"]).glob("*.safetensors"))
            if Path(model["name"]).is_dir()
            else []
        )
        return {**model, **{p.name: sha256_of(p) for p in weights}}

    def base(self):
        """A fresh (model, tokenizer) of the base model."""
        from dcr.lm import load as models

        model = self.config.model
        return models.load(
            model.name,
            revision=model.revision,
            device=model.device,
            chat_template=model.chat_template,
        )

    def model(self, method: str, step: int = -1):
        """(model, tokenizer) of a method after alignment step `step` (-1: the last), adapters folded in.

        Steering methods give the model that they steer; `generations` steers it.
        """
        from dcr.train.adapters import apply_trained

        method, step = (
            (methods_file()[method]["steers"], -1)
            if "steer" in self.stages(method)
            else (method, step)
        )
        model, tokenizer = self.base()
        if "refine" in self.stages(method):
            model = apply_trained(model, self.refined(method).path / "model")
        if (
            "align" in self.stages(method) and step != 0
        ):  # adapters change nothing before their first step
            model = self._at_step(model, self.aligned(method).path, step)
        return model, tokenizer

    def layers(self, n: int) -> list[int]:
        """`n` layers spread over the base model's depth, the last one included."""
        return sorted({round(self._depth * (i + 1) / n) for i in range(n)})

    @cached_property
    def _depth(self) -> int:
        from dcr.lm.blocks import decoder_layers

        return len(decoder_layers(self.base()[0], self.config.model.layers_path))

    @staticmethod
    def _at_step(model, folder: Path, step: int):
        from dcr.train.adapters import apply_trained, merged, reopen
        from dcr.train.align import load_step

        if step < 0:
            return apply_trained(model, folder / "model")
        trained = reopen(model, folder / "model")
        load_step(trained, folder, step)
        return merged(trained)

    # ---- stage 1 and 2 -----------------------------------------------------------------------------------

    def refined(self, method: str = "DCR") -> Artifact:
        """Stage 1 of a method: `model/` (adapter), `history.jsonl`, `evaluations.jsonl`; manifest: why it stopped."""
        from dcr.data.sets import table_hash
        from dcr.train.adapters import save_trained
        from dcr.train.refine import refine

        recipe = self.recipe(method)
        toxic, seemingly, general, _ = self.training_sets(method)
        uses_general = (
            recipe.refine.general_share > 0
            or recipe.refine.retention > 0
            or recipe.refine.layer == "auto"
        )
        data = {"toxic": table_hash(toxic), "seemingly_toxic": table_hash(seemingly)}
        if uses_general:
            data["general"] = table_hash(general)
        dependencies = {
            "model": self.model_key,
            "data": data,
            "refine": recipe.refine.model_dump(),
            "seed": recipe.seed,
        }

        def build(folder: Path) -> dict:
            _ = self.leakage
            model, tokenizer = self.base()
            result = refine(
                model,
                tokenizer,
                toxic=toxic,
                seemingly_toxic=seemingly,
                general=general if uses_general else None,
                config=recipe.refine,
                seed=recipe.seed,
                work_dir=folder,
                merge=False,
                precision=recipe.model.precision,
                layers_path=recipe.model.layers_path,
            )
            save_trained(result.model, folder / "model")
            _drop_checkpoints(folder)
            return {
                "layer": result.layer,
                "layer_sweep": result.layer_sweep,
                "stop_reason": result.stop_reason,
                "steps": len(result.history),
                "leakage": _counts(self.leakage),
                "in_distribution": sorted({*toxic["source"], *seemingly["source"]}),
                **self._facts(),
            }

        return self.store.get("refine", method, dependencies, build)

    def aligned(self, method: str = "STL") -> Artifact:
        """Stage 2 of a method: `model/` (adapter), `steps/` (weights at log-spaced steps), `history.jsonl`."""
        from dcr.data.sets import table_hash
        from dcr.train.adapters import apply_trained, save_trained
        from dcr.train.align import align

        recipe = self.recipe(method)
        *_, mix = self.training_sets(method)
        first = self.refined(method) if "refine" in self.stages(method) else None
        dependencies = {
            "model": self.model_key,
            "refine": first.path.name if first else "",
            "mix": table_hash(mix),
            "align": recipe.align.model_dump(),
            "seed": recipe.seed,
        }
        layer = (
            first.manifest["layer"] if first else recipe.refine.layer
        )  # "auto" is settled by then
        if recipe.align.above_layer:
            dependencies["layer"] = layer

        def build(folder: Path) -> dict:
            _ = self.leakage
            model, tokenizer = self.base()
            if first:
                model = apply_trained(model, first.path / "model")
            result = align(
                model,
                tokenizer,
                mix,
                config=recipe.align,
                seed=recipe.seed,
                work_dir=folder,
                merge=False,
                precision=recipe.model.precision,
                layer=layer if recipe.align.above_layer else None,
                layers_path=recipe.model.layers_path,
            )
            save_trained(result.model, folder / "model")
            _drop_checkpoints(folder)
            return {
                "recorded_steps": result.steps,
                "truncated_answers": result.truncated,
                "mix": mix["role"].value_counts().to_dict(),
                "in_distribution": sorted(set(mix["source"])),
                **self._facts(),
            }

        return self.store.get("align", method, dependencies, build)

    def _facts(self) -> dict:
        """What every manifest carries beside the artifact's own facts."""
        from dcr.lm.chat import rendered_example

        if self._loaded is None:
            self._loaded = self.base()
        return {"config": self.config.to_dict(), "rendering": rendered_example(self._loaded[1])}

    def history(self, method: str, stage: str) -> pd.DataFrame:
        """The per-step history of a stage ("refine", "evaluations" or "align")."""
        artifact = (
            self.refined(method) if stage in ("refine", "evaluations") else self.aligned(method)
        )
        name = "evaluations.jsonl" if stage == "evaluations" else "history.jsonl"
        return pd.DataFrame(read_jsonl(artifact.path / name)).assign(method=method, stage=stage)

    def steps(self, method: str) -> list[int]:
        """Alignment steps at which a method's weights are recorded; for a steering method, its strengths in per cent."""
        if "steer" in self.stages(method):
            from dcr.run.steer import curve_points

            return curve_points(self.config)
        return (
            self.aligned(method).manifest["recorded_steps"]
            if "align" in self.stages(method)
            else [0]
        )

    def in_distribution(self, method: str) -> set[str]:
        """Registry names of the sources whose prompts a method trained on or took anchors from."""
        names: set[str] = set()
        if "steer" in self.stages(method):
            from dcr.run.steer import fitted

            names |= set(fitted(self, method).manifest["in_distribution"])
            method = methods_file()[method]["steers"]
        if "refine" in self.stages(method):
            names |= set(self.refined(method).manifest["in_distribution"])
        if "align" in self.stages(method):
            names |= set(self.aligned(method).manifest["in_distribution"])
        return names

    def weights_key(self, method: str, step: int) -> dict:
        """What identifies a method's weights after an alignment step: the artifacts they come from."""
        if method in RULES:
            return {"rule": method}
        if "steer" in self.stages(method):  # the weights are those of the model it steers
            method, step = methods_file()[method]["steers"], -1
        key = {"model": self.model_key, "step": step}
        if "refine" in self.stages(method):
            key["refine"] = self.refined(method).path.name
        if "align" in self.stages(method) and step != 0:
            key["align"] = self.aligned(method).path.name
        return key


def _counts(report: pd.DataFrame) -> list[dict]:
    """How many overlaps of each kind stand between which prompts, for manifests."""
    return report.groupby(["stage", "benchmark", "kind"], as_index=False).size().to_dict("records")


def _drop_checkpoints(folder: Path) -> None:
    """Resume points are of no use once a stage is finished."""
    for path in [*folder.glob("checkpoint-*"), *folder.glob("broken-*")]:
        shutil.rmtree(path, ignore_errors=True)
