"""From a run's tables to the frame that each figure draws: seeds averaged, forms pooled, before beside after."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from dcr.errors import DCRError
from dcr.evaluate.matched import TARGETS, curves_from, matched_differences, matched_safety
from dcr.evaluate.rates import by_form, class_rates, plane_points
from dcr.evaluate.seeds import over_seeds
from dcr.tables.harm_scores import score_auroc, score_curves

Tables = Mapping[str, pd.DataFrame]
FOLLOWED = ("cross_similarity", "within_similarity")
MEASURES = {
    "cross_similarity": "cosine, across classes",
    "within_similarity": "cosine, within classes",
    "kernel": "kernel, toxic against\nseemingly toxic",
}


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV back as it was written, to the last bit. Raises DCRError naming a file that is no table."""
    try:
        return pd.read_csv(path, float_precision="round_trip")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DCRError(
            f"{path}: not a CSV table ({str(error).strip()}). Delete it and run its notebook again."
        ) from error


def seed_folders(folder: str | Path) -> list[Path]:
    """Where a run's tables are: the folder itself, its `tables/`, or `seed-*/tables/` where several seeds ran.

    None where nothing has run yet (each figure then says which notebook to run).
    """
    folder = Path(folder)
    many = sorted(folder.glob("seed-*/tables"), key=lambda p: (len(p.parent.name), p.parent.name))
    if many:
        return many
    found = folder / "tables" if (folder / "tables").is_dir() else folder
    return [found] if found.is_dir() else []


def load_tables(folder: str | Path) -> dict[str, pd.DataFrame]:
    """Every table of a run by name, with a `seed` column; several seeds below one another. Refuses mixed profiles."""
    parts: dict[str, list[pd.DataFrame]] = {}
    profiles: dict[str, Path] = {}
    for number, place in enumerate(seed_folders(folder)):
        name = place.parent.name
        seed = (
            int(name[5:])
            if name.startswith("seed-") and name[5:].isdigit()
            else _seed_of(place.parent, number)
        )
        for path in sorted(place.glob("*.csv")):
            if path.stem.startswith(("table1", "table_")):
                continue
            table = read_csv(path)
            profiles |= {
                p: path for p in table.get("profile", pd.Series(dtype=str)).dropna().unique()
            }
            parts.setdefault(path.stem, []).append(
                table if "seed" in table else table.assign(seed=seed)
            )
    if len(profiles) > 1:
        named = ", ".join(f"{p} ({path})" for p, path in profiles.items())
        raise DCRError(f"{folder} mixes profiles: {named}. Draw one profile at a time.")
    return {name: pd.concat(tables, ignore_index=True) for name, tables in parts.items()}


def _seed_of(run: Path, otherwise: int) -> int:
    try:
        return int(
            json.loads((run / "manifest.json").read_text(encoding="utf-8"))["config"]["seed"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return otherwise


def as_is(*names: str):
    """Frames: the tables themselves, averaged over seeds."""
    return lambda tables: {name: over_seeds(tables[name]) for name in names}


def each_seed(*names: str):
    """Frames: the tables themselves, seeds apart, for pictures with a dot a seed."""
    return lambda tables: {name: tables[name] for name in names}


def plane(tables: Tables) -> dict[str, pd.DataFrame]:
    """Points of every checkpoint (curves), the last one from the full sets (metrics), published and form-balanced."""
    frames = []
    for form in ("all", "balanced"):
        last = plane_points(tables["metrics"], form) if "metrics" in tables else None
        way = plane_points(tables["curves"], form) if "curves" in tables else None
        if last is not None and way is not None and len(way):
            way = way[
                ~way["nominal"] | ~way["method"].isin(last["method"])
            ]  # that point comes from the full sets
        both = [part for part in (way, last) if part is not None and len(part)]
        if both:
            frames.append(over_seeds(pd.concat(both, ignore_index=True)).assign(weights=form))
    if not frames:
        raise DCRError(
            "no method has both a toxic and a seemingly toxic benchmark; run notebook 04_evaluation with both"
        )
    return {"plane": pd.concat(frames, ignore_index=True)}


def refusal_rates(tables: Tables) -> dict[str, pd.DataFrame]:
    """Refusal rate of each class over alignment steps; methods that steer have strengths instead of steps and stay away."""
    curves = tables["curves"]
    return {"refusal_rates": over_seeds(class_rates(curves[curves["strength"].isna()]))}


def rates_by_form(tables: Tables) -> dict[str, pd.DataFrame]:
    """Refusal rates of questions and imperatives, each set pooled with its swapped version."""
    rows = by_form(tables["metrics"][tables["metrics"]["metric"] == "refusal_rate"])
    return {"rates_by_form": over_seeds(rows)}


def shortcut(tables: Tables) -> dict[str, pd.DataFrame]:
    """Question shares, and refusal by form without the sets' swapped versions standing apart."""
    return {
        "shares": over_seeds(tables["question_shares"]),
        "rates": rates_by_form(tables)["rates_by_form"],
    }


def rejection(tables: Tables) -> dict[str, pd.DataFrame]:
    """Mean refusal probability of each class over alignment steps, with a normal 95 % interval over prompts (and seeds)."""
    keys = ["method", "step", "label", "seed"]
    grouped = tables["trajectory_rejection"].groupby(keys, sort=False)["probability"]
    mean = grouped.agg(value="mean", half="sem", n="size").reset_index()
    half = 1.96 * mean.pop("half").fillna(0)
    return {
        "rejection": over_seeds(
            mean.assign(
                low=(mean["value"] - half).clip(lower=0), high=(mean["value"] + half).clip(upper=1)
            )
        )
    }


def losses(tables: Tables) -> dict[str, pd.DataFrame]:
    """Training loss, stage 1 before stage 2."""
    rows = tables["losses"].sort_values(
        "stage", key=lambda c: c.map({"refine": 0, "align": 1}), kind="stable"
    )
    return {"losses": over_seeds(rows)}


def differences(tables: Tables) -> dict[str, pd.DataFrame]:
    """Paired differences of single benchmarks."""
    rows = tables["paired"]
    rows = rows[(rows["benchmark"] != "all") & ~rows["benchmark"].str.endswith("/swapped")]
    return {"differences": over_seeds(rows.drop(columns=["p", "p_holm"], errors="ignore"))}


def seeds_matched_safety(tables: Tables) -> dict[str, pd.DataFrame]:
    """Matched safety of all seeds together, from their outcomes alone."""
    return {"seeds_matched_safety": matched_safety(curves_from(tables["outcomes"]))}


def seeds_differences(tables: Tables) -> dict[str, pd.DataFrame]:
    """Paired differences of all seeds together, from their outcomes alone: to STL-tuned where it ran, else to STL."""
    curves = curves_from(tables["outcomes"])
    against = "STL-tuned" if any(c.method == "STL-tuned" for c in curves) else "STL"
    return {"seeds_differences": matched_differences(curves, against)}


def seeds_scores(tables: Tables) -> dict[str, pd.DataFrame]:
    """AUROC of every score over all seeds, and the compliance of a threshold on it."""
    scores = tables["scores"]
    return {
        "auroc": score_auroc(scores),
        "safety": matched_safety(score_curves(scores), TARGETS[:1]),
    }


def refinement(tables: Tables) -> dict[str, pd.DataFrame]:
    """Held-out similarity over stage 1 of every method that refines."""
    return {"refinement": over_seeds(_refinements(tables))}


def _refinements(tables: Tables) -> pd.DataFrame:
    found = [
        t.assign(method=name.removeprefix("refinement_"))
        for name, t in tables.items()
        if name.startswith("refinement_") and set(FOLLOWED) <= set(t)
    ]  # others hold maps and drifts of single methods
    if not found:
        raise DCRError("no table refinement_*; run notebook 02_refinement")
    return pd.concat(found, ignore_index=True)


def similarity(tables: Tables) -> dict[str, pd.DataFrame]:
    """Cosines at layer ℓ at the first and the last evaluation of stage 1; the kernel of the base and the refined model."""
    rows, steps = [], over_seeds(_refinements(tables)).sort_values("step")
    for method, part in steps.groupby("method", sort=False):
        rows += [
            {
                "method": method,
                "measure": MEASURES[m],
                "before": part[m].iloc[0],
                "after": part[m].iloc[-1],
            }
            for m in FOLLOWED
        ]
    if "trajectory_kernel" in tables:
        kernel = over_seeds(tables["trajectory_kernel"])
        start = kernel[
            (kernel["class_a"] == "toxic")
            & (kernel["class_b"] == "seemingly_toxic")
            & (kernel["step"] == 0)
        ]
        start = start.drop_duplicates("method").set_index("method")["normalised"]
        rows += [
            {"method": m, "measure": MEASURES["kernel"], "before": start["STL"], "after": start[m]}
            for m in dict.fromkeys(steps["method"])
            if m in start and "STL" in start
        ]
    return {"similarity": pd.DataFrame(rows)}
