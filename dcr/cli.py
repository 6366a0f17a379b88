"""The `dcr` command: experiments, grids, methods on your own data, export, data."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dcr.errors import DCRError, printable

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False
)
data = typer.Typer(no_args_is_help=True, help="Upstream data: list, fetch, verify.")
app.add_typer(data, name="data")

Profile = Annotated[str, typer.Option(help="quick, embedded, reference-135m, ...")]
Seeds = Annotated[str, typer.Option(help="E.g. 0, 0-4 or 0,2,5.")]
Seed = Annotated[int, typer.Option(help="One seed for everything.")]
RunDir = Annotated[str, typer.Option(help="Run directory; default runs/PROFILE.")]
Overrides = Annotated[str, typer.Option(help='E.g. "refine.layer=0.4,align.epochs=2".')]
Methods = Annotated[str, typer.Option(help="Comma list; default: the profile's.")]
Engine = Annotated[str, typer.Option(help="joblib (this machine) or ray (a cluster).")]
Jobs = Annotated[int, typer.Option(help="Processes at once (joblib).")]
Table = Annotated[str, typer.Option(help="CSV, JSONL, Parquet or hub id with a column text.")]
Answered = Annotated[str, typer.Option(help="The same with a column response.")]
Model = Annotated[str, typer.Option(help="embedded, a folder or a hub id.")]


class Printable(logging.Formatter):
    """Log lines of which none holds an escape that the terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's text, line by line."""
        return _safe(super().format(record))


def _safe(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def show(text: str) -> None:
    """Print a table: for a terminal without what it would obey, for a file as it is."""
    sys.stdout.write((_safe(text) if sys.stdout.isatty() else text).rstrip("\n") + "\n")


def _names(text: str) -> tuple[str, ...]:
    return tuple(n.strip() for n in text.split(",") if n.strip())


@app.command("run")
def run_command(
    profile: Profile = "quick",
    seeds: Seeds = "0",
    run_dir: RunDir = "",
    overrides: Overrides = "",
    methods: Methods = "",
    tables: Annotated[bool, typer.Option(help="Also make every table.")] = True,
    engine: Engine = "joblib",
    jobs: Jobs = 1,
) -> None:
    """Run every stage of every method and seed, then every table; what exists is reused."""
    from dcr.study.experiment import Experiment

    experiment = Experiment(
        profile, seeds=seeds, run_dir=run_dir, overrides=overrides, methods=_names(methods)
    )
    failed: dict[str, list[str]] = {}
    for seed, method, why in experiment.complete(engine, jobs):
        failed.setdefault(why, []).append(f"{method}, seed {seed}")
    if reasons := [f"{'; '.join(cells)}: {why}" for why, cells in failed.items() if why]:
        raise DCRError(f"not all could be run. {' '.join(reasons)}")
    for name, problem in experiment.make_tables().items() if tables else ():
        show(f"{name}: {problem or 'written'}")
    experiment.manifest()
    show(f"{experiment.root}: {len(experiment.store.artifacts())} artifacts")


@app.command("table")
def table_command(
    name: str,
    profile: Profile = "reference",
    seeds: Annotated[str, typer.Option(help="Default: the run's, where there is one.")] = "",
    run_dir: RunDir = "",
    overrides: Overrides = "",
    methods: Methods = "",
) -> None:
    """Print one table as CSV, computed where it has to be; `reference` reads the committed one.

    In the directory of a finished run it is that run's, unless seeds, methods or overrides are
    given.
    """
    from dcr.study.experiment import Experiment, run_manifest
    from dcr.study.verify import as_run

    how: Any = {"seeds": seeds or "0", "overrides": overrides, "methods": _names(methods)}
    experiment = Experiment(profile, run_dir=run_dir, **how)
    kept = run_manifest(experiment.root) if experiment.live else {}
    if not (seeds or overrides or methods) and kept and kept["config"]["profile"] == profile:
        experiment = as_run(experiment.root)
    show(experiment.table(name).to_csv(index=False))


@app.command("figures")
def figures_command(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("figures"),
) -> None:
    """Draw every figure of a run from its tables alone."""
    from dcr.book.report import draw

    for name, why in draw(run, out).items():
        show(f"not drawn: {name} ({why})")
    show(f"Figures: {out}")


@app.command("readme")
def readme_command(
    check: Annotated[bool, typer.Option(help="Only compare; write nothing.")] = False,
) -> None:
    """Write the README's numbers from the tables of the reference run."""
    from dcr.book.readme import readme

    show(f"README: {readme(check=check)}")


@app.command("reproduce")
def reproduce_command(
    profile: Profile = "embedded",
    seeds: Seeds = "0",
    run_dir: RunDir = "",
    overrides: Overrides = "",
    only: Annotated[str, typer.Option(help="Notebook numbers, e.g. 01,05.")] = "",
) -> None:
    """Execute the notebooks through papermill into the run directory and write the report."""
    from dcr.book.reproduce import reproduce

    report = reproduce(
        profile, seeds=seeds, run_dir=run_dir, overrides=overrides, only=_names(only)
    )
    show(f"{'Report' if report.suffix else 'Notebooks'}: {report}")


@app.command("grid")
def grid_command(
    grid: Annotated[str, typer.Argument(help="A YAML file, or a grid of the kit by name.")],
    run_dir: Annotated[str, typer.Option(help="Run directory.")],
    profile: Annotated[str, typer.Option(help="Default: the grid's.")] = "",
    overrides: Overrides = "",
    engine: Engine = "joblib",
    jobs: Jobs = 1,
    retry: Annotated[bool, typer.Option(help="Run failed cells again.")] = False,
) -> None:
    """Run what is missing of a grid of recipes; a cell that fails is a row that says why."""
    from dcr.study.grid import load_grid, run_grid

    loaded = load_grid(grid, profile=profile, overrides=overrides)
    rows = run_grid(loaded, run_dir, engine=engine, jobs=jobs, retry=retry)
    show(rows.to_string(index=False, float_format="%.3f", na_rep=""))


@app.command("align")
def align_command(
    out: Path,
    toxic: Answered,
    seemingly_toxic: Table,
    general: Answered,
    model: Model = "embedded",
    refine: Annotated[bool, typer.Option(help="Contrastive refinement first.")] = True,
    seed: Seed = 0,
    overrides: Overrides = "",
) -> None:
    """Refine and align a model on your own prompts; writes a transformers folder to OUT.

    Many GPUs for one model: accelerate launch --multi_gpu -m dcr.cli align OUT ...
    """
    from dcr.run.own import train_own

    tables = {"toxic": toxic, "seemingly_toxic": seemingly_toxic, "general": general}
    stages = ["refine", "align"] if refine else ["align"]
    show(f"Model: {train_own(out, stages, **tables, model=model, seed=seed, overrides=overrides)}")


@app.command("refine")
def refine_command(
    out: Path,
    toxic: Table,
    seemingly_toxic: Table,
    general: Annotated[str, typer.Option(help="For general_share or retention.")] = "",
    model: Model = "embedded",
    seed: Seed = 0,
    overrides: Overrides = "",
) -> None:
    """Stage 1 alone on your own prompts; many GPUs as for align."""
    from dcr.run.own import train_own

    tables = {"toxic": toxic, "seemingly_toxic": seemingly_toxic, "general": general or None}
    stages = ["refine"]
    show(f"Model: {train_own(out, stages, **tables, model=model, seed=seed, overrides=overrides)}")


@app.command("export")
def export_command(
    method: str,
    out: Path,
    profile: Profile = "embedded",
    seed: Seed = 0,
    run_dir: RunDir = "",
    overrides: Overrides = "",
) -> None:
    """Write a method's model as a transformers folder with a model card."""
    from dcr.run.own import export
    from dcr.study.experiment import Experiment

    experiment = Experiment(profile, seeds=seed, run_dir=run_dir, overrides=overrides)
    show(f"Model: {export(experiment, method, out)}")


@app.command("verify")
def verify_command(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Check every checksum of a run, and that its tables follow from its artifacts."""
    from dcr.study.verify import verify

    rows = verify(run)
    show(rows.to_string(index=False))
    if not (rows["status"] == "ok").all():
        raise typer.Exit(1)


@app.command("info")
def info_command(profile: Profile = "", overrides: Overrides = "") -> None:
    """What a bug report needs: versions, platform, devices, caches; with --profile its
    configuration."""
    import yaml

    from dcr.config import load_config
    from dcr.run.models import machine

    show(yaml.safe_dump(machine(), sort_keys=False, allow_unicode=True))
    if profile:
        config = load_config(profile, overrides=overrides).model_dump(mode="json")
        show("\n" + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


@app.command("model")
def model_command() -> None:
    """Fetch and convert the embedded model into the cache."""
    from dcr.lm.embedded import ensure

    show(f"embedded model: {ensure()}")


@data.command("list")
def data_list() -> None:
    """Every source with its role, rows, licence, and whether it is at hand."""
    from dcr.data.sources import list_sources

    show(list_sources().drop(columns=["citation", "file"]).to_string(index=False))


@data.command("fetch")
def data_fetch(names: list[str]) -> None:
    """Make sure that the named sources are at hand (downloads into the cache)."""
    from dcr.data.sources import path_of

    for name in names:
        show(f"{name}: {path_of(name)}")


@data.command("verify")
def data_verify() -> None:
    """Check checksum and row count of every file at hand."""
    from dcr.data.sources import verify

    table = verify()
    show(table.to_string(index=False))
    if not table["status"].isin(["ok", "missing"]).all():
        raise typer.Exit(1)


def main() -> None:
    """Entry point: one clear line for a DCRError (exit status 2) or a stop (130)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Printable("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("httpx", "papermill", "traitlets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Waiting threads that spin take the cores of whatever else runs here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except DCRError as error:
        typer.echo(f"dcr: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        if getattr(stop, "code", 130) != 130:  # typer's own end
            raise
        typer.echo("dcr: stopped. The same command goes on where it was.", err=True)
        sys.stderr.flush()
        os._exit(130)  # without waiting for threads


if __name__ == "__main__":
    main()
