"""A grid of recipes in one run directory, shared by as many workers as there are; every result kept, failures too.

The grid is a YAML file:

    profile: smollm2-135m        # default: the name of the profile asked for
    method: DCR                  # stages and own overrides of every cell (a recipe may name another)
    seeds: [0]                   # default: the one asked for
    base: {refine.epochs: 1.0}   # dotted overrides of every cell
    grid: {refine.layer: [0.5, 0.75], refine.loss: [circle, supcon]}    # every combination is a cell
    recipes: {sham: {refine.pairing: sham}, STL: {method: STL}}         # further cells, by name
    validation: [validation-safe, validation-toxic, coconot-validation]
    align: 4                     # none, all, or the best n of the screen
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import yaml
from filelock import FileLock, Timeout

from dcr.config import PROFILE_DIR, load_config, methods_file, parse_overrides
from dcr.data.files import content_key, write_atomic
from dcr.errors import DCRError

log = logging.getLogger("dcr")
GRID_DIR = PROFILE_DIR / "grids"
KEYS = ("profile", "method", "seeds", "base", "grid", "recipes", "validation", "align")
VALIDATION = ("validation-safe", "validation-toxic", "general-validation")
PHASES = ("screen", "align")


@dataclass(frozen=True)
class CellSpec:
    """One recipe with one seed."""

    name: str
    method: str
    seed: int
    recipe: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """A parsed grid: what all cells share, and the cells."""

    name: str
    profile: str
    base: dict
    cells: tuple[CellSpec, ...]
    validation: tuple[str, ...]
    align: str | int

    def row_path(self, root: Path, cell: CellSpec, phase: str) -> Path:
        """Where a cell's row of a phase stands in the run directory."""
        key = content_key(
            [self.profile, self.base, cell.recipe, cell.method, cell.seed, self.validation, phase]
        )
        slug = re.sub(r"[^A-Za-z0-9.=_-]+", "_", cell.name)[:80]
        return root / "sweep" / self.name / f"{slug}-s{cell.seed}-{phase}-{key}.json"


def load_grid(
    source: str | Path,
    *,
    profile: str = "",
    seed: int = 0,
    overrides: str | Mapping[str, object] = "",
) -> Grid:
    """The grid of a YAML file, or one that ships with the kit, by name. `overrides` go on top of its `base`.

    Raises DCRError for a missing file, an unknown key, an empty grid, or an override that no configuration has.
    """
    path = Path(source) if Path(source).suffix in (".yaml", ".yml") else GRID_DIR / f"{source}.yaml"
    if not path.is_file():
        raise DCRError(
            f"{source}: no such grid. Give a YAML file or one of {', '.join(sorted(p.stem for p in GRID_DIR.glob('*.yaml')))}."
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise DCRError(f"{path}: not YAML ({error}).") from error
    unknown = sorted(set(content) - set(KEYS))
    if unknown:
        raise DCRError(f"{path}: unknown key {unknown[0]!r}; known: {', '.join(KEYS)}.")
    for key in ("grid", "recipes", "base"):
        if not isinstance(content.get(key) or {}, Mapping):
            raise DCRError(
                f"{path}: {key} must map names to values, not be a {type(content[key]).__name__}."
            )
    align = content.get("align", "none")
    if align not in ("none", "all") and (
        not isinstance(align, int) or isinstance(align, bool) or align < 0
    ):
        raise DCRError(f"{path}: align={align!r}; write none, all or the number of cells to align.")
    base = {**(content.get("base") or {}), **parse_overrides(overrides)}
    cells = tuple(_cells(path, content, seed))
    grid = Grid(
        path.stem,
        profile or content.get("profile") or path.stem,
        base,
        cells,
        tuple(content.get("validation") or VALIDATION),
        align,
    )
    for cell in cells:  # a misspelt parameter is told before anything runs
        load_config(grid.profile, seed=cell.seed, overrides={**base, **cell.recipe})
    return grid


def grid_for(profile: str, *, seed: int = 0, overrides: str | Mapping[str, object] = "") -> Grid:
    """The grid that ships for a profile; profiles without one of their own take `smollm2-135m`'s."""
    name = profile if (GRID_DIR / f"{profile}.yaml").exists() else "smollm2-135m"
    return load_grid(name, profile=profile, seed=seed, overrides=overrides)


def _cells(path: Path, content: Mapping, seed: int):
    axes = content.get("grid") or {}
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise DCRError(f"{path}: grid.{key} must be a list of values.")
    recipes = {n: dict(r or {}) for n, r in (content.get("recipes") or {}).items()}
    products = (
        [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        if axes
        else []
    )
    named = [
        (" ".join(f"{k.split('.')[-1]}={v}" for k, v in p.items()), p) for p in products
    ] + list(recipes.items())
    if not named:
        raise DCRError(f"{path}: neither grid nor recipes; there is nothing to run.")
    for (name, recipe), cell_seed in itertools.product(named, content.get("seeds") or [seed]):
        method = recipe.get("method", content.get("method", "DCR"))
        if method not in methods_file():
            raise DCRError(
                f"{path}: {name}: method {method!r} is unknown; known: {', '.join(methods_file())}."
            )
        yield CellSpec(name, method, cell_seed, {k: v for k, v in recipe.items() if k != "method"})


def run_sweep(grid: Grid, run_dir: str | Path, *, retry: bool = False) -> pd.DataFrame:
    """Run what is missing of a grid and return its table, a row a cell (see `collect`); written to tables/sweep_<name>.csv.

    Any number of workers may run the same grid on the same folder: a cell belongs to the one that holds its lock, and
    a dead worker's cell is taken over. A cell that fails keeps its error as a row; `retry` runs such cells again.
    """
    root = Path(run_dir).expanduser().absolute()
    _work_through(grid, grid.cells, "screen", root, retry)
    _work_through(grid, chosen_cells(grid, root), "align", root, retry)
    table = collect(grid, root)
    write_atomic(root / "tables" / f"sweep_{grid.name}.csv", table.to_csv(index=False))
    if not (
        root / "manifest.json"
    ).exists():  # a run of its own; in an experiment's folder that experiment's stays
        from dcr.run.experiment import Experiment

        Experiment(
            grid.profile, seed=grid.cells[0].seed, run_dir=root, overrides=grid.base
        ).manifest()
    log.info(
        "sweep %s: %d cells, %d failed", grid.name, len(table), (table["status"] == "failed").sum()
    )
    return table


def chosen_cells(grid: Grid, root: Path) -> list[CellSpec]:
    """The cells to align: all, none, or (per recipe, seeds together) the best n by the screen's probe AUROC."""
    rows = [
        (c, _read(grid.row_path(root, c, "screen"))) for c in grid.cells if grid.align != "none"
    ]
    passed = [(c, r) for c, r in rows if r and r["status"] == "done"]
    if grid.align in ("none", "all"):
        return [c for c, _ in passed]
    values = pd.DataFrame(
        [{"name": c.name, "value": r["probe_auroc"]} for c, r in passed], columns=["name", "value"]
    )
    mean = (
        values.groupby("name", sort=False)["value"]
        .mean()
        .sort_values(ascending=False, kind="stable")
    )
    return [c for c, _ in passed if c.name in mean.index[: grid.align]]


def _work_through(grid: Grid, cells, phase: str, root: Path, retry: bool) -> None:
    started = time.time()
    waiting = list(cells)
    while waiting:
        moved = False
        for cell in list(waiting):
            path = grid.row_path(root, cell, phase)
            with _mine(path) as mine:
                if not mine:
                    continue
                row = _read(path)
                again = retry and row and row["status"] == "failed" and row["finished"] < started
                if row is None or again:
                    write_atomic(
                        path,
                        json.dumps(
                            _run_cell(grid, cell, phase, root), ensure_ascii=False, indent=1
                        ),
                    )
            waiting.remove(cell)
            moved = True
        if waiting and not moved:
            time.sleep(0.5)  # other workers hold the rest; a dead one's lock is free at once


@contextlib.contextmanager
def _mine(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _run_cell(grid: Grid, cell: CellSpec, phase: str, root: Path) -> dict:
    from dcr.run.cell import Cell, judged, screen

    started = time.time()
    log.info("sweep %s: %s, seed %d: %s", grid.name, cell.name, cell.seed, phase)
    row = {
        "cell": cell.name,
        "method": cell.method,
        "seed": cell.seed,
        "phase": phase,
        **cell.recipe,
    }
    try:
        experiment = Cell(
            grid.profile,
            method=cell.method,
            seed=cell.seed,
            run_dir=root,
            base=grid.base,
            recipe=cell.recipe,
            validation=grid.validation,
        )
        row |= {
            "status": "done",
            "error": "",
            **(screen if phase == "screen" else judged)(experiment),
        }
    except Exception as error:  # a row like any other: which recipes cannot be run is a finding
        log.warning(
            "sweep %s: %s failed: %s\n%s", grid.name, cell.name, error, traceback.format_exc()
        )
        row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    return {
        **row,
        f"{phase}_total_seconds": round(time.time() - started, 1),
        "finished": time.time(),
    }


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def collect(grid: Grid, run_dir: str | Path) -> pd.DataFrame:
    """One row a cell from what is there: cell, method, seed, status {done, failed, missing}, error, its overrides, the
    screen's measures, and after alignment dsr, compliance, refusal_auroc (empty where not aligned).
    """
    rows = []
    for cell in grid.cells:
        row = {
            "profile": grid.profile,
            "cell": cell.name,
            "method": cell.method,
            "seed": cell.seed,
            "status": "missing",
            "error": "",
            **cell.recipe,
        }
        for phase in PHASES:
            found = _read(grid.row_path(Path(run_dir), cell, phase))
            row |= {k: v for k, v in (found or {}).items() if k not in ("phase", "finished")}
        rows.append(row)
    return pd.DataFrame(rows)
