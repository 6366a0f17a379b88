"""What a method is in a run: its entry in methods.yaml, its recipe, its sets, its base model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from dcr.config import Config, methods_file, near
from dcr.data.sets import TrainingSets, anchors, training_sets
from dcr.errors import DCRError
from dcr.run.models import Base
from dcr.run.store import Store


class Recipes:
    """One configuration with one seed in one run directory, and every method's recipe in it."""

    def __init__(self, config: Config, store: Store, base: Base, of: Sequence[Config] = ()) -> None:
        self.config, self.store, self.base_model, self.seed = config, store, base, config.seed
        self.of = list(of) or [config.replaced(seed=0)]  # what shares one ledger of prompts
        self._sets: dict[str, TrainingSets] = {}
        self._steering: dict[Path, Any] = {}  # loaded, by the folder of their fit

    def entry(self, method: str) -> dict[str, Any]:
        """The method's entry in methods.yaml. Raises DCRError listing the known ones."""
        known = methods_file()
        if method not in known:
            listed = ", ".join(known)
            raise DCRError(f"method {method!r} is unknown; known: {listed}." + near(method, known))
        return known[method]

    def relies_on(self, method: str) -> list[str]:
        """The methods whose models a method acts on, and lets answer."""
        entry = self.entry(method)
        return [entry[role] for role in ("steers", "answers") if role in entry]

    def learns_from(self, method: str) -> list[str]:
        """The methods whose training a method's holds: those, and whose score it is taught."""
        guide = self.entry(method).get("guide")
        return [*self.relies_on(method), *([guide] if guide else [])]

    def decider(self, method: str) -> str:
        """The method whose fit and score a method has: itself, where its entry names no other."""
        return self.entry(method).get("decides", method)

    def recipe(self, method: str) -> Config:
        """The configuration of one method: the run's with the method's overrides on top."""
        return self.config.override(self.entry(method).get("overrides", {}))

    def stages(self, method: str) -> list[str]:
        """What a method runs, of refine, align, steer, edit, rule."""
        return list(self.entry(method).get("stages", []))

    def sets(self, method: str) -> TrainingSets:
        """The training sets of a method's recipe."""
        if method not in self._sets:
            self._sets[method] = training_sets(self.recipe(method), of=self.of)
        return self._sets[method]

    def trained_on(self, method: str) -> dict[str, dict[str, pd.DataFrame]]:
        """Stage (refine, align, fit) → role → prompts, of what a method makes itself."""
        method, found = self.decider(method), {}
        recipe, stages = self.recipe(method), self.stages(method)
        if "refine" in stages:
            sets = self.sets(method)
            found["refine"] = {"toxic": sets.toxic, "seemingly_toxic": sets.seemingly_toxic}
            if recipe.refine.general_share > 0 or recipe.refine.retention > 0:
                found["refine"]["general"] = sets.general
        if "align" in stages:
            found["align"] = {"mix": self.sets(method).mix}
        if kind := self.entry(method).get("steering"):
            from dcr.steering import KINDS

            found["fit"] = {r: anchors(recipe, r, of=self.of) for r in KINDS[kind].ANCHORS}
        return found

    def base(self) -> tuple[nn.Module, Any]:
        """(model, tokenizer) of the base model, shared: never write into its weights in place."""
        return self.base_model.loaded()

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return self.base_model.depth

    def facts(self, config: Config) -> dict:
        """What a manifest says beside the dependencies."""
        return {"config": config.to_dict(), "seed": self.seed, **self.base_model.facts()}
