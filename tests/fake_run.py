"""A run directory of made-up tables: figures, tables and report are tested without a model.

Every registered figure has its frame here; the columns are those of the table functions.
"""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd

METHODS = ("base", "STL", "DCR", "DCR-sham", "Gate", "question-mark")
TRAINED = ("STL", "DCR")
CLASSES = ("toxic", "seemingly_toxic", "general")
FORMS = ("question", "imperative")
SETS = (("oktest", "seemingly_toxic", 0.98), ("or-80k", "seemingly_toxic", 0.6))
SETS += (("advbench", "toxic", 0.0), ("q-harm", "toxic", 1.0))
STEPS = (0, 1, 4, 16, 64)
SCREEN = ("cross_similarity", "probe_auroc", "general_drift", "compliance", "dsr", "refusal_auroc")


def rows(columns: str, *values) -> pd.DataFrame:
    """Every combination of the values, one iterable a column; a tuple fills several columns."""
    flat = [
        [v for part in row for v in (part if isinstance(part, tuple) else (part,))]
        for row in itertools.product(*values)
    ]
    return pd.DataFrame(flat, columns=columns.split())


def valued(frame: pd.DataFrame, name: str = "value", base: float = 0.3, **more) -> pd.DataFrame:
    """The frame with values that rise with the row, and intervals of ± 0.05 around them."""
    value = base + 0.4 * np.arange(len(frame)) / max(1, len(frame))
    ends = {"low": value - 0.05, "high": value + 0.05}
    return frame.assign(**{name: value}, **ends, **{"n": 50, "seeds": 2} | more)


def renamed(frame: pd.DataFrame, prefix: str) -> pd.DataFrame:
    """Intervals that carry their value's name."""
    return frame.rename(columns={"low": f"{prefix}_low", "high": f"{prefix}_high"})


def points(prompts: int = 8) -> list[tuple]:
    """x, y, label and form of prompts on a map."""
    return [(i * 0.7 % 3, i * 1.3 % 2, CLASSES[i % 3], FORMS[i % 2]) for i in range(prompts)]


@functools.cache
def _tables() -> dict[str, pd.DataFrame]:
    pairings, layers = ("sources (paper)", "matched pairs"), (1, 10, 20)
    cells = tuple(itertools.product(FORMS, FORMS))
    equal = [("balanced", "balanced")]
    plane = valued(rows("forms method step", ["published", "equal"], METHODS, [-1, 0, 16]), "dsr")
    plane = renamed(plane, "dsr").assign(nominal=lambda t: t["step"] == -1)
    plane = renamed(valued(plane, "compliance", 0.5), "compliance")
    frontier = valued(rows("target method", (0.8, 0.9), METHODS), "dsr", 0.6)
    surface = rows("pairing reader layer", pairings, ["question-mark", "tf-idf"], [-1])
    probe = valued(rows("pairing reader layer", pairings, ["probe"], layers), "auroc")
    grid = rows("cell status seed", [("layer=0.5", "done"), ("loss=nt", "failed")], [0, 1])
    grid = pd.concat([grid, grid.replace({"layer=0.5": "layer=0.7"}).query("status == 'done'")])
    grid = grid.assign(**{m: 0.4 + 0.1 * grid["seed"] for m in SCREEN}, method="DCR")
    grid.loc[grid["status"] == "failed", list(SCREEN)] = np.nan
    by_class = rows("method label step", TRAINED, CLASSES, STEPS)
    models = [("base", "base"), ("DCR", "refined")]
    kernel = rows("method stage class_a class_b", models[:0] or models, CLASSES, CLASSES)
    named = {"low": "normalised_low", "high": "normalised_high"}
    pairs = rows("method stage pair i", models, ["toxic / toxic", "toxic / general"], range(6))
    differ = "method against label benchmark"
    table1 = rows("method column", METHODS, ["compliance ↑, as published", "DSR ↑, forms equal"])
    return {
        "question_shares": pd.DataFrame(SETS, columns=["set", "label", "question_share"]).assign(
            n=50, use="test"
        ),
        "separability": pd.concat([probe, surface.assign(auroc=0.55)], ignore_index=True),
        "transfer": valued(rows("pairing tested_on layer", pairings, ["a", "b"], layers), "auroc"),
        "probe_cells": valued(
            rows("pairing layer toxic_form harmless_form", pairings, [20], cells), "auroc"
        ),
        "source_shortcut": valued(
            rows(
                "pairing source toxic_form harmless_form",
                pairings,
                ["mean", "oktest", "or-80k"],
                [*cells, *equal],
            ),
            "auroc",
        ).assign(met=lambda t: t["source"] == "or-80k"),
        "map": rows("pairing layer x y label form", pairings, [20], points()),
        "kernel": valued(kernel, "normalised").rename(columns=named),
        "proposition": pairs.assign(
            bilinear=lambda t: 2.0 ** t["i"], kernel=lambda t: 3.0 ** t["i"], layer=20
        ).assign(spearman=0.4, low=0.1, high=0.6, constant=9.0),
        "overview": pd.DataFrame(
            {
                "stage": ["refine", "align"],
                "blocks": 8,
                "trained": [6, 8],
                "layer": [6, 8],
                "loss": ["Circle loss", "next-token loss"],
                "prompts": ["toxic and seemingly toxic", "general, toxic"],
            }
        ),
        "refinement": rows("method seed step", TRAINED, [0, 1], STEPS).assign(
            cross_similarity=lambda t: 0.9 - t["step"] / 100 - 0.1 * t["seed"],
            within_similarity=0.8,
            probe_auroc=0.7,
        ),
        "similarity": valued(
            rows(
                "method measure when", TRAINED, ["cross_similarity", "kernel"], ["before", "after"]
            )
        ),
        "refinement_maps": rows(
            "method when x y label form", ["DCR"], ["before", "after"], points()
        ),
        "refinement_drift": rows("method label layer", ["DCR"], CLASSES, layers).assign(
            drift=lambda t: t["layer"] / 100, refined_at=10
        ),
        "losses": rows(
            "method stage seed step", TRAINED, ["align", "refine"], [0, 1], [1, 2, 3]
        ).assign(loss=lambda t: 2 / t["step"] + t["seed"]),
        "refusal_rates": valued(by_class),
        "refusal_probability": valued(by_class, seeds=1),
        "kernel_trajectory": valued(rows("method step", TRAINED, STEPS), "normalised").rename(
            columns=named
        ),
        "same_rows": rows("method other", TRAINED, TRAINED).assign(share=1.0, shared=40, n=40),
        "plane": plane,
        "frontier": valued(renamed(frontier, "dsr"), "compliance"),
        "frontier_differences": valued(
            rows(
                "method against measure target",
                ["DCR", "Gate"],
                ["STL"],
                [("compliance", 0.8), ("compliance", 0.9), ("auroc", np.nan)],
            ),
            "difference",
            -0.2,
            p_holm=[0.01, 0.2, 0.03, 0.04, 0.9, 1.0],
        ),
        "paired": valued(
            rows(differ, ["DCR", "Gate"], ["STL"], [(c, b) for b, c, _ in SETS]), "difference", -0.2
        ).assign(version="published", form="all", p_holm=0.04),
        "auroc_by_source": valued(
            rows(
                "method source toxic_form harmless_form",
                METHODS,
                ["mean", "oktest", "or-80k"],
                [*cells, *equal],
            ),
            "auroc",
        ).assign(met=lambda t: t["source"] == "or-80k"),
        "gap": valued(
            rows("method reader stage", METHODS, ["refusal", "probe"], ["aligned"]), "auroc"
        ),
        "rates_by_form": valued(
            rows("method benchmark label question_share form", METHODS, SETS, FORMS)
        ),
        "template_effect": valued(
            rows("method label form", METHODS, CLASSES[:2], FORMS), "difference", -0.2
        ),
        "categories": valued(
            rows(
                "method label benchmark category", METHODS, CLASSES[:2], ["s"], ["privacy", "w & t"]
            )
        ),
        "robustness": valued(
            rows("method label wrapper", METHODS, CLASSES[:2], ["plain", "polite"])
        ),
        "ability": valued(
            rows(
                "method task metric", TRAINED, [("piqa", "acc"), ("held-out answers", "perplexity")]
            ),
            "change",
        )
        .rename(columns={"low": "change_low", "high": "change_high"})
        .assign(against="base"),
        "judge_calibration": valued(
            rows(
                "judge model tokens half",
                ["cues", "annotators"],
                ["gpt4", "llama2"],
                [0, 24],
                ["all"],
            ),
            "kappa",
        ),
        "cost": rows("method kind seed", TRAINED, ["align", "generate"], [0, 1]).assign(
            seconds=lambda t: 10.0 + t.index, peak_memory_mib=900.0
        ),
        "ablations": grid.reset_index(drop=True),
        "search": grid.reset_index(drop=True).assign(method="STL"),
        "table1": valued(table1).assign(best=lambda t: t["value"] > 0.6, mark="†"),
        "claims": valued(
            rows(
                "claim reading",
                ["DCR complies more than STL", "DCR is as safe as STL"],
                ["as published", "forms equal", "sources controlled"],
            ),
            base=0.1,
            where="notebook 04, table plane",
        ),
    }


def tables() -> dict[str, pd.DataFrame]:
    """{name: frame}, copies to do with as one likes."""
    return {name: frame.copy() for name, frame in _tables().items()}


SMALL = (
    *("question_shares", "refinement_drift", "kernel_trajectory", "same_rows", "plane", "frontier"),
    *("gap", "ability", "cost", "auroc_by_source", "table1", "claims"),
)


def write_run(root: Path, names: tuple[str, ...] = SMALL) -> Path:
    """A run directory with some tables, a manifest and an executed notebook."""
    (root / "tables").mkdir(parents=True)
    (root / "notebooks").mkdir()
    for name in names:
        tables()[name].to_csv(root / "tables" / f"{name}.csv", index=False)
    config = {"profile": "embedded", "model": {"name": "<i>embedded</i>"}}
    manifest = {"config": config, "methods": [*METHODS], "seeds": [0, 1]}
    (root / "manifest.json").write_text(json.dumps(manifest))
    (root / "notebooks" / "01_representations.ipynb").write_text("{}")
    return root
