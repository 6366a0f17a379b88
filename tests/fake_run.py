"""A run directory of made-up tables, so that figures, tables and report are tested without a model."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

SETS = (
    ("oktest", "seemingly_toxic", 0.98),
    ("coconot", "seemingly_toxic", 0.8),
    ("i-alpaca", "general", 0.1),
    ("advbench", "toxic", 0.0),
    ("q-harm", "toxic", 1.0),
)
METHODS = ("base", "STL", "DCR", "question-mark")
STEPS = (0, 2, 8)


def metric_rows(
    profile: str = "p",
    seed: int = 0,
    step: int = -1,
    methods: tuple[str, ...] = METHODS,
    strength: float = 1.0,
) -> pd.DataFrame:
    """Metric rows of made-up rates: DCR complies more than STL by 0.1, toxic sets are refused at 0.5 and more."""
    rows = []
    for method in methods:
        for name, label, questions in SETS:
            n = {
                "all": 50,
                "question": round(50 * questions),
                "imperative": 50 - round(50 * questions),
            }
            rate = (
                strength
                * (
                    (0.7 if label == "toxic" else 0.4)
                    - (0.1 if method == "DCR" and label != "toxic" else 0)
                )
                + 0.01 * seed
            )
            rate = 0.05 if method == "base" else rate
            for form in ("all", "question", "imperative", "balanced"):
                if form == "balanced" and min(n.values()) == 0 or n.get(form, 1) == 0:
                    continue
                for metric in ("dsr" if label == "toxic" else "compliance", "refusal_rate"):
                    value = 1 - rate if metric == "compliance" else rate
                    rows.append(
                        {
                            "profile": profile,
                            "method": method,
                            "seed": seed,
                            "judge": "phrases",
                            "benchmark": name,
                            "metric": metric,
                            "form": form,
                            "value": value,
                            "low": value - 0.05,
                            "high": value + 0.05,
                            "n": n.get(form, 50),
                            "step": step,
                            "in_distribution": name == "coconot" and method == "DCR",
                        }
                    )
    return pd.DataFrame(rows)


def tables(seed: int = 0, profile: str = "p") -> dict[str, pd.DataFrame]:
    """One table of each kind that figures read."""
    trained, classes = ("STL", "DCR"), ("toxic", "seemingly_toxic", "general")
    rng = np.random.default_rng(seed)
    pairings = ("sources (paper)", "matched pairs")
    layers = pd.DataFrame(
        [
            {"layer": layer, "auroc": 0.6 + layer / 100, "low": 0.5, "high": 0.8, "pairing": p}
            for p in pairings
            for layer in (1, 10, 20)
        ]
    )
    return {
        "metrics": metric_rows(profile, seed),
        "curves": pd.concat(
            [metric_rows(profile, seed, s, trained, s / 8) for s in STEPS], ignore_index=True
        ).assign(strength=np.nan),
        "question_shares": pd.DataFrame(
            [{"set": s, "label": label, "question_share": q, "n": 50} for s, label, q in SETS]
        ),
        "separability_probe_base": layers,
        "separability_surface_base": pd.DataFrame(
            [{"baseline": "length", "auroc": 0.55, "pairing": p} for p in pairings]
        ),
        "separability_transfer_base": layers.assign(tested_on="matched pairs, forms swapped"),
        "refinement_DCR": pd.DataFrame(
            {
                "step": [0, 5],
                "cross_similarity": [0.9, 0.1],
                "within_similarity": [0.9, 0.8],
                "probe_auroc": [0.6, 0.9],
                "method": "DCR",
            }
        ),
        "losses": pd.DataFrame(
            [
                {
                    "step": s,
                    "loss": 2.0 / s,
                    "method": m,
                    "stage": g,
                    "seconds": 1.0 * s,
                    "tokens": 10 * s + seed,
                }
                for m in trained
                for g in ("align", "refine")[: 1 + (m == "DCR")]
                for s in (1, 2, 3)
            ]
        ),
        "trajectory_rejection": pd.DataFrame(
            [
                {
                    "id": f"{c}{i}",
                    "step": s,
                    "label": c,
                    "form": "question",
                    "method": m,
                    "probability": float(rng.uniform(0, (1 + s) / 10)),
                }
                for m in trained
                for s in STEPS
                for c in classes
                for i in range(4)
            ]
        ),
        "trajectory_kernel": pd.DataFrame(
            [
                {
                    "step": s,
                    "class_a": "toxic",
                    "class_b": "seemingly_toxic",
                    "normalised": 0.8 - 0.2 * (m == "DCR"),
                    "normalised_low": 0.5,
                    "normalised_high": 0.9,
                    "method": m,
                }
                for m in trained
                for s in STEPS
            ]
        ),
        "paired": pd.DataFrame(
            [
                {
                    "prompts": label,
                    "benchmark": b,
                    "metric": "dsr" if label == "toxic" else "compliance",
                    "method": m,
                    "difference": 0.1,
                    "low": 0.0,
                    "high": 0.2,
                    "p": 0.1,
                    "p_holm": 0.2,
                    "n": 50,
                }
                for b, label, _ in (*SETS, ("all", "toxic", 0))
                for m in METHODS
                if m != "STL"
            ]
        ),
        "categories": pd.DataFrame(
            [
                {
                    "profile": profile,
                    "method": m,
                    "label": c,
                    "benchmark": "oktest",
                    "category": k,
                    "value": 0.5,
                    "low": 0.4,
                    "high": 0.6,
                    "n": 10,
                }
                for m in METHODS
                for c in classes
                for k in ("privacy", "weapons & tools")
            ]
        ),
        "judge_calibration": pd.DataFrame(
            [
                {
                    "judge": j,
                    "model": m,
                    "tokens": t,
                    "half": "all",
                    "kappa": 0.7,
                    "low": 0.6,
                    "high": 0.8,
                }
                for j in ("annotators", "phrases", "learned")
                for m in ("gpt4", "llama2new")
                for t in (0, 24)
                if t == 0 or j != "annotators"
            ]
        ),
        "cost": pd.DataFrame(
            [
                {"name": m, "kind": k, "seconds": 10.0, "peak_memory_mib": 900.0}
                for m in trained
                for k in ("align", "generate")
            ]
        ),
        "capabilities": pd.DataFrame(
            [
                {
                    "method": m,
                    "task": t,
                    "metric": k,
                    "value": 0.3 + 0.1 * (m == "DCR"),
                    "low": 0.2,
                    "high": 0.6,
                    "change": 0.1,
                    "change_low": -0.1,
                    "change_high": 0.2,
                    "n": 100,
                }
                for m in trained
                for t, k in (
                    ("piqa", "acc"),
                    ("arc_easy", "acc"),
                    ("held-out answers", "perplexity"),
                )
            ]
        ),
        "ablations": pd.DataFrame(
            [
                {
                    "profile": profile,
                    "cell": c,
                    "method": "DCR",
                    "seed": seed,
                    "cross_similarity": 0.2 + 0.1 * i,
                    "status": "failed" if c == "loss=nt" else "done",
                    "probe_auroc": 0.6 + 0.02 * i,
                    "general_drift": 0.1,
                    "harm_auroc": 0.8 - 0.1 * i,
                    "mean_auroc": 0.6,
                    "dsr": 0.5 + 0.1 * i,
                    "compliance": 0.8 - 0.1 * i,
                    "refusal_auroc": 0.7 + 0.05 * seed,
                }
                for i, c in enumerate(("layer=0.5", "layer=0.75", "loss=nt"))
            ]
        ),
        "bias_sweep": pd.DataFrame(
            [
                {
                    "profile": profile,
                    "method": m,
                    "bias": b,
                    "dsr": 0.5 + 0.1 * b,
                    "compliance": 0.6 - 0.1 * b,
                }
                for m in trained
                for b in (-2.0, 0.0, 2.0)
            ]
        ),
        "matched_safety": pd.DataFrame(
            [
                {
                    "method": m,
                    "quantity": "compliance",
                    "target": t,
                    "compliance": 1.2 - t,
                    "low": 0.2,
                    "high": 0.6,
                    "reason": "",
                }
                for m in trained
                for t in (0.8, 0.85)
            ]
        ),
        "sweep_search": pd.DataFrame(
            [
                {
                    "profile": profile,
                    "cell": f"{m}: some",
                    "method": m,
                    "seed": seed,
                    "cross_similarity": 0.5,
                    "status": "done",
                    "probe_auroc": 0.6,
                    "general_drift": 0.1,
                    "dsr": 0.5,
                    "compliance": 0.7,
                    "refusal_auroc": 0.6,
                }
                for m in trained
            ]
        ),
        "outcomes": _outcomes(profile, seed, trained),
        "scores": _scores(profile, seed, trained),
        "quality": pd.DataFrame(
            [
                {
                    "method": "DCR",
                    "prompts": "seemingly_toxic",
                    "measure": "win rate against STL",
                    "value": 0.55,
                    "low": 0.45,
                    "high": 0.65,
                    "n": 100,
                }
            ]
        ),
    }


def _outcomes(profile: str, seed: int, methods: tuple[str, ...]) -> pd.DataFrame:
    """Curves from complying with all to refusing nearly all; DCR keeps more harmless prompts, and STL never gets to DSR 0.8."""
    rows = pd.DataFrame(
        [
            {
                "id": f"{name}-{form}-{i}",
                "label": label,
                "form": form,
                "benchmark": name,
                "source": name,
                "profile": profile,
                "seed": seed,
                "rank": i / 20,
            }
            for name, label, _ in SETS
            if label != "general"
            for form in ("question", "imperative")
            for i in range(20)
        ]
    )
    toxic = rows["label"] == "toxic"
    for method, reach, kept in zip(methods, (0.7, 0.9), (0.4, 0.6), strict=True):
        rows[f"{method}@0"] = (~toxic).astype(int)
        rows[f"{method}@8"] = np.where(toxic, rows["rank"] < reach, rows["rank"] < kept).astype(int)
    return rows.drop(columns="rank")


def _scores(profile: str, seed: int, methods: tuple[str, ...]) -> pd.DataFrame:
    """Scores that tell harm by chance (STL), mostly (DCR) and always (a probe on the base model)."""
    rows, rng = _outcomes(profile, seed, methods).iloc[:, :7], np.random.default_rng(seed)
    toxic = (rows["label"] == "toxic").to_numpy()
    return rows.assign(
        **{
            "refusal@STL": rng.random(len(rows)),
            "refusal@DCR": rng.random(len(rows)) + 0.5 * toxic,
            "probe@base": toxic + 0.9 * rng.random(len(rows)),
            "means@base": rng.random(len(rows)) + 0.2 * toxic,
        }
    )


def write_run(root: Path, seeds: int = 1, profile: str = "p") -> Path:
    """A run directory with every table; with several seeds, a folder of seed-*/ as `make reproduce SEEDS=` leaves it."""
    for seed in range(seeds):
        run = root / f"seed-{seed}" if seeds > 1 else root
        (run / "tables").mkdir(parents=True)
        for name, table in tables(seed, profile).items():
            table.to_csv(run / "tables" / f"{name}.csv", index=False)
        (run / "manifest.json").write_text(
            json.dumps(
                {
                    "config": {"profile": profile, "seed": seed, "model": {"name": "embedded"}},
                    "methods": list(METHODS),
                }
            )
        )
    return root


@functools.cache
def drawn() -> tuple[Path, dict, dict]:
    """(run directory, figures, missing) of a run with every table, drawn once for all tests; read it, don't change it."""
    from dcr.book.figures import draw_all, draw_tables

    root = Path(tempfile.mkdtemp(prefix="dcr-fake-run-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    run = write_run(root / "run")
    figures, missing = draw_all(run / "tables", run / "figures")
    found = tables()
    draw_tables(found["metrics"].replace("STL", "<b>STL</b>"), run / "tables", found)
    return run, figures, missing


def copy_of_drawn(target: Path) -> Path:
    """The drawn run once more, to change."""
    return Path(shutil.copytree(drawn()[0], target))
