"""Experiment: a profile, its seeds and methods in one run directory; tables, figures by name."""

import functools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dcr.config import Config, load_config, parse_seeds
from dcr.data.files import write_atomic, writing
from dcr.data.ledger import ledger
from dcr.data.sets import dropped, table_hash
from dcr.data.sources import SOURCES, provenance
from dcr.errors import DCRError
from dcr.run.models import Base
from dcr.run.readings import Run
from dcr.run.store import Store, environment
from dcr.study import registry
from dcr.study.engine import run_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("dcr")
CHECKOUT = Path(__file__).resolve().parents[2]
REFERENCE = "reference"  # the profile whose tables are committed and read, never computed


def run_directory(profile: str, run_dir: str | Path = "") -> Path:
    """`run_dir`, else runs/<profile> of the checkout (or of the current folder)."""
    if run_dir:
        return Path(run_dir).expanduser().absolute()
    root = CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else Path.cwd()
    return root / ("figures/reference" if profile == REFERENCE else f"runs/{profile}")


class Experiment:
    """One configuration with one or more seeds in one run directory.

    profile: its name, or "reference" (the committed tables of the reference run, read only).
    overrides: "refine.layer=0.4,align.epochs=2" or a mapping. methods: default the profile's. A run
    directory that holds tables and no artifacts is read as well (`live` is False, `runs` empty).
    """

    def __init__(
        self,
        profile: str = "quick",
        *,
        seeds: str | int | Iterable[int] = (0,),
        run_dir: str | Path = "",
        overrides: str | Mapping[str, object] = "",
        methods: Iterable[str] = (),
    ) -> None:
        self.root = run_directory(profile, run_dir)
        self.store = Store(self.root)
        kept = run_manifest(self.root)
        self.live = profile != REFERENCE and (not kept or bool(self.store.artifacts()))
        self._tables: dict[str, pd.DataFrame] = {}
        self.runs: tuple[Run, ...] = ()
        if not self.live:
            if not kept:
                raise DCRError(
                    f"{self.root} holds no tables of the reference run; give the checkout's "
                    "figures/reference as run_dir, or a profile that computes."
                )
            if overrides or methods:
                raise DCRError(
                    f"{self.root} holds tables only, which overrides and methods cannot change; "
                    "give a profile that computes (--profile)."
                )
            if parse_seeds(seeds) not in ((0,), tuple(kept["seeds"])):
                raise DCRError(
                    f"{self.root} holds tables of seeds {kept['seeds']} together; leave seeds out, "
                    "or give a profile that computes (--profile)."
                )
            self.config = Config().override(kept["config"])
            self.seeds, self.methods = tuple(kept["seeds"]), tuple(kept["methods"])
            return
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise DCRError(
                "an experiment runs in one process, not under accelerate launch; many cells go "
                "through the grid engine: dcr run --seeds 0-4 --engine ray (or --jobs N), or "
                "dcr grid."
            )
        self.seeds = parse_seeds(seeds)
        self.config = load_config(profile, seed=self.seeds[0], overrides=overrides)
        self.methods = tuple(methods) or self.config.methods
        self._asked = {"profile": profile, "run_dir": self.root, "overrides": overrides}
        base = Base(self.config.model)
        self.runs = tuple(Run(self.config.replaced(seed=s), self.store, base) for s in self.seeds)
        for method in (*self.methods, *self.config.every_seed):
            self.runs[0].entry(method)

    def runs_of(self, method: str) -> tuple[Run, ...]:
        """The runs (seeds) of a method: all, or the first where `every_seed` does not name it."""
        wanted = self.config.every_seed
        return self.runs if not wanted or method in wanted else self.runs[:1]

    def cells(self) -> list[tuple[Run, str]]:
        """Every method with each run (seed) of it, a seed after the other."""
        return [(run, m) for run in self.runs for m in self.methods if run in self.runs_of(m)]

    # ---- prompts -------------------------------------------------------------------------------

    @property
    def first(self) -> Run:
        """The run of the first seed. Raises DCRError where the directory holds tables only."""
        if not self.runs:
            raise DCRError(f"{self.root} holds tables only; an Experiment of a profile computes.")
        return self.runs[0]

    @property
    def prompts(self) -> pd.DataFrame:
        """Test prompts, the same for every seed and method."""
        return self.first.prompts

    @property
    def validation(self) -> pd.DataFrame:
        """Validation prompts: thresholds and choices are made on these."""
        return self.first.validation

    @property
    def answered(self) -> pd.DataFrame:
        """The test prompts that are answered and judged; all are scored."""
        return self.first.answered

    # ---- tables and figures --------------------------------------------------------------------

    def table(self, name: str) -> pd.DataFrame:
        """The table: computed, and written to tables/<name>.csv; or, where not `live`, read.

        Raises DCRError for an unknown name, or a table to be read that was not made.
        """
        entry = registry.table_entry(name)
        if name not in self._tables:
            path, text = self.table_path(name), ""
            if self.live:
                text = entry.make(self).to_csv(index=False)
                if not self.store.complete:  # verify compares with what was written
                    write_atomic(path, text)
            elif not path.is_file():
                raise DCRError(
                    f"{path} is missing. Experiment({self.config.profile!r}, "
                    f"seeds={self.seeds}).table({name!r}) makes it, or: dcr table {name} "
                    f"--profile {self.config.profile}."
                )
            self._tables[name] = registry.read_table(path, text)
        return self._tables[name].copy()

    def table_path(self, name: str) -> Path:
        """tables/<name>.csv of a run directory; the reference run's stand in the folder itself."""
        folder = self.root / "tables"
        return (folder if self.live or folder.is_dir() else self.root) / f"{name}.csv"

    def figure(self, name: str) -> "Figure":
        """The figure drawn from the table of that name."""
        return registry.figure_entry(name).draw(self.table(name))

    # ---- the whole run -------------------------------------------------------------------------

    def complete(self, engine: str = "joblib", jobs: int = 1) -> Iterator[tuple[int, str, str]]:
        """Make all that curves and frontiers need; yields (seed, method, why it failed).

        engine, jobs: see `dcr.study.engine.run_all`.
        """
        _ = self.first.base_model.key  # a wrong model is told once, before anything is made
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        task = functools.partial(_complete, self._asked)
        cells = [(run.seed, method) for run, method in self.cells()]
        for (seed, method), problem in run_all(task, cells, engine=engine, jobs=jobs):
            yield seed, method, problem

    def make_tables(self) -> dict[str, str]:
        """Make every registered table: name → "" or why it could not be made."""
        registry.load_all()
        found = {}
        for name in registry.TABLES:
            try:
                self.table(name)
                found[name] = ""
            except DCRError as error:
                found[name] = str(error)
        return found

    def artifacts(self, *, of_methods: bool = False) -> list[dict[str, Any]]:
        """kind, name, seed, seconds, peak_memory_mib, started of all in the run directory.

        of_methods: of what this run's methods need for curves and frontiers alone (and made, where
        missing); a grid's cells and other seeds lie in the same directory.
        """
        self.store.asked.clear()
        for run, method in self.cells() if of_methods else ():
            run.complete(method)
        shown = ("kind", "name", "seed", "seconds", "peak_memory_mib", "started")
        return [
            {k: a.manifest.get(k) for k in shown}
            for a in self.store.artifacts()
            if not of_methods or f"{a.path.parent.name}/{a.path.name}" in self.store.asked
        ]

    def manifest(self) -> dict[str, Any]:
        """What this run is, written to manifest.json: configuration, machine, data, artifacts."""
        first = self.first
        tables = {"test": first.prompts, "validation": first.validation}
        left_out = dropped(self.config, of=first.of)
        read = set(ledger(self.config, of=first.of)["table"]) & set(SOURCES)
        whole = {
            "config": self.config.to_dict(),
            "seeds": list(self.seeds),
            "methods": list(self.methods),
            "environment": environment(),
            **first.base_model.facts(),
            "data": {n: {"rows": len(t), "hash": table_hash(t)} for n, t in tables.items()},
            "dropped": {
                "counts": left_out.groupby("table").size().to_dict(),
                "prompts": left_out.to_dict("records"),
            },
            "sources": provenance(sorted(read)),
            "artifacts": self.artifacts(),
        }
        write_atomic(self.root / "manifest.json", json.dumps(whole, indent=1, ensure_ascii=False))
        return whole


def _complete(asked: Mapping[str, Any], cell: tuple[int, str]) -> None:
    seed, method = cell
    Experiment(**asked, seeds=seed, methods=(method,)).runs[0].complete(method)
    log.info("%s, seed %d: complete", method, seed)


def on_every_seed(manifest: Mapping[str, Any]) -> list[str]:
    """The methods of a run's manifest that ran on all of its seeds, not on the first alone."""
    named = manifest["config"].get("every_seed")
    return [m for m in manifest["methods"] if not named or m in named]


def run_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a run directory, {} without one. Raises DCRError for a broken one."""
    path, wanted = root / "manifest.json", {"config", "seeds", "methods", "model"}
    if not path.is_file():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise DCRError(f"{path} is no manifest ({error}). Delete it.") from error
    if not (isinstance(kept, dict) and wanted <= set(kept)):
        raise DCRError(f"{path} is no manifest of a run ({', '.join(sorted(wanted))}). Delete it.")
    return kept
