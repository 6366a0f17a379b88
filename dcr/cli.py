"""The `dcr` command: data, models, experiments, methods on your own data, export."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from dcr.errors import DCRError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False
)
data = typer.Typer(no_args_is_help=True, help="Upstream data: list, fetch, verify.")
app.add_typer(data, name="data")

Profile = Annotated[str, typer.Option(help="Profile: quick, embedded, smollm2-135m, ...")]
Seed = Annotated[int, typer.Option(help="One seed for everything.")]
RunDir = Annotated[str, typer.Option(help="Run directory; default runs/PROFILE.")]
Overrides = Annotated[str, typer.Option(help='E.g. "refine.layer=0.4,align.epochs=2".')]


@data.command("list")
def data_list() -> None:
    """Every source with its role, rows, licence, and whether it is at hand."""
    from dcr.data.fetch import list_sources

    typer.echo(list_sources().drop(columns=["citation", "file"]).to_string(index=False))


@data.command("fetch")
def data_fetch(names: list[str]) -> None:
    """Make sure that the named sources are at hand (downloads into the cache)."""
    from dcr.data.fetch import path_of

    for name in names:
        typer.echo(f"{name}: {path_of(name)}")


@data.command("verify")
def data_verify() -> None:
    """Check checksum and row count of every file at hand."""
    from dcr.data.fetch import verify

    table = verify()
    typer.echo(table.to_string(index=False))
    if not table["status"].isin(["ok", "missing"]).all():
        raise typer.Exit(1)


@app.command("model")
def model_command() -> None:
    """Fetch and convert the embedded model into the cache."""
    from dcr.lm.embedded import ensure

    typer.echo(f"embedded model: {ensure()}")


@app.command("run")
def run_command(
    profile: Profile = "quick",
    seed: Seed = 0,
    run_dir: RunDir = "",
    overrides: Overrides = "",
    methods: Annotated[str, typer.Option(help="Comma list; default: the profile's.")] = "",
    curves: Annotated[
        bool, typer.Option(help="Also judge every recorded alignment step, and score prompts.")
    ] = True,
    ability: Annotated[bool, typer.Option(help="Also measure general ability.")] = False,
) -> None:
    """Run every stage of every method and write the metric tables; what exists is reused."""
    from dcr.run.experiment import Experiment, run_methods
    from dcr.tables.ability import capability_table
    from dcr.tables.harm_scores import scores_table
    from dcr.tables.outcomes import outcomes_table

    experiment = Experiment(
        profile,
        seed=seed,
        run_dir=run_dir,
        overrides=overrides,
        methods=tuple(m.strip() for m in methods.split(",") if m.strip()),
    )
    for method, what in run_methods(experiment):
        typer.echo(f"{method}: {what}")
    experiment.metrics()
    if curves:
        experiment.curves()
        outcomes_table(experiment)
        scores_table(experiment)
    for against in ("base", "STL") if ability else ():
        if against == "base" or against in experiment.methods:
            capability_table(experiment, against)
    experiment.manifest()
    typer.echo(f"{experiment.store.root}: {experiment.store.summary()}")


@app.command("reproduce")
def reproduce_command(
    profile: Profile = "embedded",
    seed: Seed = 0,
    run_dir: RunDir = "",
    overrides: Overrides = "",
    only: Annotated[str, typer.Option(help="Notebook numbers, e.g. 01,05.")] = "",
) -> None:
    """Execute the notebooks through papermill into the run directory and write the report."""
    from dcr.book.reproduce import reproduce

    report = reproduce(
        profile,
        seed=seed,
        run_dir=run_dir,
        overrides=overrides,
        only=tuple(n.strip() for n in only.split(",") if n.strip()),
    )
    typer.echo(f"{'Report' if report.suffix else 'Notebooks'}: {report}")


@app.command("align")
def align_command(
    out: Path,
    toxic: Annotated[str, typer.Option(help="CSV or JSONL with text and response.")],
    seemingly_toxic: Annotated[str, typer.Option(help="CSV or JSONL with text.")],
    general: Annotated[str, typer.Option(help="CSV or JSONL with text and response.")],
    model: Annotated[str, typer.Option(help="embedded, a folder or a hub id.")] = "embedded",
    refine: Annotated[bool, typer.Option(help="Contrastive refinement before alignment.")] = True,
    seed: Seed = 0,
    overrides: Overrides = "",
) -> None:
    """Refine and align a model on your own prompts; writes a plain transformers folder to OUT."""
    from dcr.run.own import align_own

    folder = align_own(
        out,
        model=model,
        toxic=toxic,
        seemingly_toxic=seemingly_toxic,
        general=general,
        refine_first=refine,
        seed=seed,
        overrides=overrides,
    )
    typer.echo(f"Model: {folder}")


@app.command("export")
def export_command(
    method: str,
    out: Path,
    profile: Profile = "embedded",
    seed: Seed = 0,
    run_dir: RunDir = "",
    overrides: Overrides = "",
) -> None:
    """Write a method's model as a plain transformers folder with a model card."""
    from dcr.run.experiment import Experiment
    from dcr.run.own import export

    typer.echo(
        f"Model: {export(Experiment(profile, seed=seed, run_dir=run_dir, overrides=overrides), method, out)}"
    )


@app.command("refine")
def refine_command(
    out: Path,
    toxic: Annotated[str, typer.Option(help="CSV or JSONL with text.")],
    seemingly_toxic: Annotated[str, typer.Option(help="CSV or JSONL with text.")],
    general: Annotated[
        str, typer.Option(help="CSV or JSONL with text, for general_share or retention.")
    ] = "",
    model: Annotated[str, typer.Option(help="embedded, a folder or a hub id.")] = "embedded",
    seed: Seed = 0,
    overrides: Overrides = "",
) -> None:
    """Stage 1 alone on your own prompts; many processes: `accelerate launch --multi_gpu --num_processes 2 -m dcr.cli refine ...`."""
    from dcr.run.own import refine_own

    folder = refine_own(
        out,
        model=model,
        toxic=toxic,
        seemingly_toxic=seemingly_toxic,
        general=general,
        seed=seed,
        overrides=overrides,
    )
    typer.echo(f"Model: {folder}")


@app.command("sweep")
def sweep_command(
    grid: Annotated[
        str, typer.Argument(help="A YAML file, or a grid that ships with the kit by name.")
    ],
    run_dir: Annotated[str, typer.Option(help="Run directory, shared by all workers.")],
    profile: Annotated[str, typer.Option(help="Default: the grid's.")] = "",
    seed: Seed = 0,
    overrides: Overrides = "",
    retry: Annotated[bool, typer.Option(help="Run failed cells again.")] = False,
) -> None:
    """Run what is missing of a grid of recipes; several workers may share the folder."""
    from dcr.run.grid import load_grid, run_sweep

    table = run_sweep(
        load_grid(grid, profile=profile, seed=seed, overrides=overrides), run_dir, retry=retry
    )
    shown = [
        c
        for c in (
            "cell",
            "seed",
            "status",
            "probe_auroc",
            "cross_similarity",
            "general_drift",
            "dsr",
            "compliance",
            "refusal_auroc",
            "error",
        )
        if c in table
    ]
    typer.echo(table[shown].to_string(index=False, float_format="%.3f", na_rep=""))


@app.command("compare")
def compare_command(
    run: Annotated[Path, typer.Argument(help="A run directory, or one that holds seed-*/.")],
    against: Annotated[
        str, typer.Option(help="Comma list of methods that all are compared with.")
    ] = "STL",
    out: Annotated[
        str, typer.Option(help="Folder for the two tables; empty prints them only.")
    ] = "",
) -> None:
    """Compliance at matched safety over all seeds, and paired differences, from the runs' outcome tables alone."""
    from dcr.tables.outcomes import compare

    for name, table in compare(
        run, against=tuple(a.strip() for a in against.split(",") if a.strip()), out=out
    ).items():
        typer.echo(f"{name}\n{table.to_string(index=False, float_format='%.3f', na_rep='')}\n")


@app.command("figures")
def figures_command(
    run: Annotated[Path, typer.Argument(help="A run directory, or one that holds seed-*/.")],
    out: Annotated[Path, typer.Option(help="Where pictures, their data and the tables go.")] = Path(
        "figures"
    ),
    keep: Annotated[
        bool, typer.Option(help="Keep figures there that this run has no tables for.")
    ] = False,
) -> None:
    """Draw every figure and table of a run from its tables alone, each beside the data that drew it."""
    from dcr.book.figures import draw_run

    drawn, missing = draw_run(run, out, keep=keep)
    for message in missing.values():
        typer.echo(message)
    typer.echo(f"{out}: {len(drawn)} figures drawn, {len(missing)} not")


@app.command("info")
def info_command(
    profile: Profile = "quick",
    overrides: Overrides = "",
    cost: Annotated[
        bool, typer.Option(help="Also estimate parameters, tokens, memory and time here.")
    ] = True,
) -> None:
    """The resolved configuration of a profile, and what a run would cost on this machine (about, to a factor of two)."""
    import yaml

    from dcr.config import load_config

    plain = {
        k: (
            {a: list(b) if isinstance(b, tuple) else b for a, b in v.items()}
            if isinstance(v, dict)
            else list(v)
            if isinstance(v, tuple)
            else v
        )
        for k, v in load_config(profile, overrides=overrides).to_dict().items()
    }
    typer.echo(yaml.safe_dump(plain, sort_keys=False))
    if cost:
        from dcr.tables.estimate import estimate

        try:
            typer.echo(estimate(load_config(profile, overrides=overrides)).to_string(index=False))
        except DCRError as error:
            typer.echo(f"No estimate: {error}")


def main() -> None:
    """Entry point: one clear line for a DCRError, exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "papermill", "traitlets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app()
    except DCRError as error:
        typer.echo(f"dcr: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
