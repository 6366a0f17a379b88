"""Grids of cells (method, seed, recipe): every result is a row, a failure too.

The grid is a YAML file:

    profile: reference-135m      # default: the profile asked for
    method: DCR                  # of every cell (a recipe may name another)
    seeds: [0]
    base: {refine.epochs: 1.0}   # dotted overrides of every cell
    grid: {refine.layer: [0.5, 0.75], refine.loss: [circle, supcon]}   # every combination is a cell
    recipes: {sham: {refine.pairing: sham}, STL: {method: STL}}        # further cells, by name
    align: 4                     # none, all, or the best n of the screen

All cells are read on validation prompts alone: test prompts stay untouched by a search.
"""

import functools
import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dcr.config import (
    PROFILE_DIR,
    Config,
    load_config,
    methods_file,
    near,
    parse_overrides,
    parse_seeds,
)
from dcr.data.files import content_key, write_atomic
from dcr.data.ledger import ledger_key
from dcr.errors import DCRError
from dcr.evaluate.judges import identity
from dcr.run.store import Store
from dcr.study.cell import Cell, CellRun, outcome, screened
from dcr.study.engine import run_all

log = logging.getLogger("dcr")
GRIDS = PROFILE_DIR / "grids"
KEYS = ("profile", "method", "seeds", "base", "grid", "recipes", "align")
PHASES = ("screen", "align")


@dataclass(frozen=True)
class Grid:
    """A parsed grid: what all cells share, and the cells."""

    name: str
    profile: str
    base: dict[str, object]
    cells: tuple[Cell, ...]
    align: str | int

    def config(self, cell: Cell) -> Config:
        """The run's configuration of a cell."""
        return load_config(self.profile, seed=cell.seed, overrides={**self.base, **cell.recipe})

    @functools.cached_property
    def shared(self) -> str:
        """Key over what all rows depend on: configurations, for the cells share a ledger, and the
        files of their data and models. What is not at hand counts as the reason."""
        from dcr.lm.load import identity as identity_of_model

        def fact(of: Callable[..., object], *given: object) -> object:
            try:
                return of(*given)
            except DCRError as error:
                return str(error)

        every = [self.config(c) for c in self.cells]
        facts: list[object] = [c.to_dict() for c in every]
        models = sorted({(c.model.name, c.model.revision) for c in every})
        facts += [fact(identity_of_model, *model) for model in models]
        facts += [fact(identity, judge) for judge in sorted({c.evaluation.judge for c in every})]
        return content_key([*facts, fact(ledger_key, every[0], every)])

    def row_path(self, root: Path, cell: Cell, phase: str) -> Path:
        """Where a cell's row of a phase stands in the run directory."""
        parts = [self.config(cell).to_dict(), self.shared, cell.method, cell.seed, phase]
        slug = re.sub(r"[^A-Za-z0-9.=_-]+", "_", cell.name)[:80]
        folder = root / "grid" / self.name
        return folder / f"{slug}-s{cell.seed}-{phase}-{content_key(parts)}.json"

    def row(self, root: Path, cell: Cell, phase: str) -> dict[str, Any]:
        """A cell's row of a phase; empty where there is none."""
        if not (root / "grid" / self.name).is_dir():  # nothing has to be at hand to say so
            return {}
        path = self.row_path(root, cell, phase)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def write(self, root: Path, cell: Cell, phase: str, row: Mapping[str, object]) -> None:
        """Keep a cell's row of a phase."""
        text = json.dumps(row, ensure_ascii=False, indent=1, default=float)
        write_atomic(self.row_path(root, cell, phase), text)


def load_grid(
    source: str | Path, *, profile: str = "", overrides: str | Mapping[str, object] = ""
) -> Grid:
    """The grid of a YAML file, or one of the kit by name; `overrides` go on top of `base`.

    Raises DCRError for a missing file, an unknown key or method, an empty grid, a wrong override.
    """
    path = Path(source) if Path(source).suffix in (".yaml", ".yml") else GRIDS / f"{source}.yaml"
    known = sorted(p.stem for p in GRIDS.glob("*.yaml"))
    if not path.is_file():
        raise DCRError(
            f"{source}: no such grid. Give a YAML file or one of {', '.join(known)}."
            + near(str(source), known)
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DCRError(f"{path}: not YAML ({' '.join(str(error).split())[:120]}).") from None
    if not isinstance(content, Mapping):
        raise DCRError(f"{path}: a grid maps {', '.join(KEYS)} to values.")
    recipes = content.get("recipes") or {}
    parts = {key: content.get(key) for key in ("grid", "recipes", "base")}
    parts |= {f"recipes.{n}": r for n, r in recipes.items()} if isinstance(recipes, dict) else {}
    for key, part in parts.items():
        if not isinstance(part or {}, dict) or not all(isinstance(k, str) for k in part or ()):
            raise DCRError(f"{path}: {key} must map names to values.")
    if unknown := [key for key in content if key not in KEYS]:
        raise DCRError(f"{path}: unknown key {unknown[0]!r}; known: {', '.join(KEYS)}.")
    align = content.get("align", "none")
    number = isinstance(align, int) and not isinstance(align, bool) and align >= 0
    if align not in ("none", "all") and not number:
        raise DCRError(f"{path}: align={align!r}; write none, all or the number of cells to align.")
    base = {**_dotted(content.get("base") or {}), **_dotted(parse_overrides(overrides))}
    name = profile or content.get("profile") or path.stem
    grid = Grid(path.stem, name, base, tuple(_cells(path, content)), align)
    for cell in grid.cells:  # a misspelt parameter is told before anything runs
        grid.config(cell)
    return grid


def changes(config: Config) -> dict[str, object]:
    """Dotted parameters in which a run is not its profile; not the precision, which may be resolved
    in it."""
    plain = _dotted(load_config(config.profile, seed=config.seed).to_dict())
    asked = _dotted(config.to_dict()).items()
    return {k: v for k, v in asked if "." in k and v != plain[k] and k != "model.precision"}


def grid_for(config: Config) -> Grid:
    """The grid of ablations that ships for a run's profile; one without its own takes `ablations`.

    What a run changes of its profile holds for every cell.
    """
    name = config.profile if (GRIDS / f"{config.profile}.yaml").exists() else "ablations"
    return load_grid(name, profile=config.profile, overrides=changes(config))


def _cells(path: Path, content: Mapping[str, Any]) -> Iterator[Cell]:
    axes = content.get("grid") or {}
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise DCRError(f"{path}: grid.{key} must be a list of values.")
    products = [dict(zip(axes, v, strict=True)) for v in itertools.product(*axes.values())]
    named = [
        (" ".join(f"{k.split('.')[-1]}={v}" for k, v in p.items()), p) for p in products if axes
    ]
    named += [(name, r or {}) for name, r in (content.get("recipes") or {}).items()]
    if not named:
        raise DCRError(f"{path}: neither grid nor recipes; there is nothing to run.")
    known = list(methods_file())
    for (name, recipe), seed in itertools.product(named, parse_seeds(content.get("seeds") or 0)):
        method = str(recipe.get("method", content.get("method", "DCR")))
        if method not in known:
            raise DCRError(
                f"{path}: {name}: method {method!r} is unknown; known: {', '.join(known)}."
            )
        own = {k: v for k, v in _dotted(recipe).items() if k != "method"}
        yield Cell(name, method, seed, own)


def _dotted(overrides: Mapping[str, Any]) -> dict[str, object]:
    """Sections with mappings of their own as dotted keys: else one would take another's place."""
    found: dict[str, object] = {}
    for key, value in overrides.items():
        section = isinstance(value, Mapping) and "." not in key
        found |= {f"{key}.{field}": v for field, v in value.items()} if section else {key: value}
    return found


def run_grid(
    grid: Grid, root: str | Path, *, engine: str = "joblib", jobs: int = 1, retry: bool = False
) -> pd.DataFrame:
    """Run what is missing of a grid; its table (see `collect`) goes to grid/<name>.csv.

    A cell that fails keeps its error as its row; `retry` runs such cells again.
    """
    root = Path(root).expanduser().absolute()
    again = (None, "failed") if retry else (None,)
    for phase in PHASES:
        cells = grid.cells if phase == "screen" else _chosen(grid, root)
        todo = [c for c in cells if grid.row(root, c, phase).get("status") in again]
        task = functools.partial(_run_cell, grid, root, phase)
        for cell, error in run_all(task, todo, engine=engine, jobs=jobs):
            if error:
                log.warning("grid %s: %s, %s failed: %s", grid.name, cell.name, phase, error)
                grid.write(root, cell, phase, {"status": "failed", "error": error})
    table = collect(grid, root)
    write_atomic(root / "grid" / f"{grid.name}.csv", table.to_csv(index=False))
    return table


def _run_cell(grid: Grid, root: Path, phase: str, cell: Cell) -> None:
    clock = time.monotonic()
    every = [grid.config(c).replaced(seed=0) for c in grid.cells]
    run = CellRun(cell, grid.config(cell), Store(root), of=every)
    found = screened(run) if phase == "screen" else outcome(run)
    found[f"{phase}_seconds"] = round(time.monotonic() - clock, 1)
    grid.write(root, cell, phase, {"status": "done", "error": "", **found})


def _chosen(grid: Grid, root: Path) -> list[Cell]:
    """The cells to align: none, all that passed the screen, or the n names best in `probe_auroc`
    (mean over seeds)."""
    if grid.align == "none":
        return []
    screens = [grid.row(root, c, "screen") for c in grid.cells]
    passed = [c for c, row in zip(grid.cells, screens, strict=True) if row.get("status") == "done"]
    if grid.align == "all":
        return passed
    read = [grid.row(root, c, "screen")["probe_auroc"] for c in passed]
    by_name = pd.Series(read, [c.name for c in passed], dtype=float).groupby(level=0, sort=False)
    best = by_name.mean().nlargest(int(grid.align))
    return [c for c in passed if c.name in best]


def collect(grid: Grid, root: str | Path) -> pd.DataFrame:
    """One row a cell from what is there: profile, cell, method, seed, status {done, failed,
    missing}, error, its overrides, the screen's measures and, where aligned, the outcome's.
    """
    rows = []
    for cell in grid.cells:
        row: dict[str, object] = {"profile": grid.profile, "cell": cell.name}
        row |= {"method": cell.method, "seed": cell.seed, "status": "missing", "error": ""}
        row |= cell.recipe
        for phase in PHASES:
            row |= grid.row(Path(root), cell, phase)
        rows.append(row)
    return pd.DataFrame(rows)
