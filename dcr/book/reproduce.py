"""`make reproduce`: the notebooks through papermill in order, then the report; resumes."""

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from tqdm import tqdm

import dcr
from dcr.book.report import write_report
from dcr.data.files import content_key, write_atomic
from dcr.data.ledger import ledger_key
from dcr.errors import DCRError
from dcr.lm.load import identity
from dcr.study.experiment import Experiment

# What runs unless told otherwise: 06 asks for every method and a grid besides.
NOTEBOOKS = ("01_representations", "02_refinement", "03_alignment", "04_evaluation", "05_figures")
TIMEOUT = 4 * 3600  # seconds a cell; papermill has none by default
PACKAGE = Path(dcr.__file__).parent


def notebooks_dir() -> Path:
    """The notebooks of the checkout that the package is installed from."""
    folder = PACKAGE.parent / "notebooks"
    if not folder.is_dir():
        raise DCRError("the notebooks are not beside the package; run from a checkout of the kit.")
    return folder


def reproduce(
    profile: str,
    *,
    seeds: str | int = 0,
    run_dir: str = "",
    overrides: str = "",
    only: Sequence[str] = (),
) -> Path:
    """Execute the notebooks into `<run>/notebooks/` and write `<run>/report.html`; its path.

    A notebook that ran with the same source, package, parameters, data and model is kept. `only`:
    numbers of notebooks ("01"; default: `NOTEBOOKS`). Raises DCRError for an unknown number, and
    naming the notebook, its cell and the error.
    """
    known = [path.stem for path in sorted(notebooks_dir().glob("[0-9]*.ipynb"))]
    if unknown := set(only) - {n[:2] for n in known}:
        raise DCRError(f"only={min(unknown)}: no such notebook; known: {', '.join(known)}.")
    chosen = [n for n in known if (n[:2] in only if only else n in NOTEBOOKS)]
    experiment = Experiment(profile, seeds=seeds, run_dir=run_dir, overrides=overrides)
    root, begun = Path(experiment.root).absolute(), time.monotonic()
    (root / "notebooks").mkdir(parents=True, exist_ok=True)
    told = {
        "profile": profile,
        "seeds": ",".join(map(str, experiment.seeds)),
        "run_dir": str(root),
        "overrides": overrides,
    }
    depends = told | {"config": experiment.config.to_dict(), "package": package_hash()}
    if experiment.live:  # tables alone need neither
        model = experiment.config.model
        depends |= {"data": ledger_key(experiment.config)[0]}
        depends |= {"model": identity(model.name, model.revision)}
    sources = {n: nbformat.read(notebooks_dir() / f"{n}.ipynb", as_version=4) for n in chosen}
    code = {n: [c.source for c in s.cells if c.cell_type == "code"] for n, s in sources.items()}
    with tqdm(total=sum(map(len, code.values())), unit=" cells", desc="notebooks") as bar:
        for name, cells in code.items():
            started, done = time.monotonic(), root / "notebooks" / f"{name}.done"
            mark = content_key(depends | {"cells": [c.source for c in sources[name].cells]})
            if done.exists() and done.read_text() == mark and done.with_suffix(".ipynb").exists():
                bar.update(len(cells))
                told_time = "up to date"
            else:
                _execute(name, done.with_suffix(".ipynb"), told, bar)
                write_atomic(done, mark)
                told_time = f"{time.monotonic() - started:.0f} s"
            tqdm.write(f"{name}: {told_time}")
    made = any((root / "tables").glob("*.csv"))  # a part of the notebooks may leave none
    if made:
        experiment.manifest()  # the report says what ran
    report = write_report(root) if made else root / "notebooks"
    print(f"all: {time.monotonic() - begun:.0f} s", flush=True)
    return report


def _execute(name: str, target: Path, parameters: dict, bar: tqdm) -> None:
    """One notebook through papermill into `target`; a cell done moves the bar."""
    import papermill

    partial = target.with_suffix(".running.ipynb")

    def tick(cell: nbformat.NotebookNode, **_) -> None:
        bar.update("injected-parameters" not in cell.metadata.get("tags", []))

    bar.set_postfix_str(name)
    try:
        papermill.execute_notebook(
            str(notebooks_dir() / f"{name}.ipynb"),
            str(partial),
            parameters,
            kernel_name="python3",
            progress_bar=False,
            execution_timeout=TIMEOUT,
            cwd=str(target.parent),
            on_cell_executed=tick,
        )
    except papermill.PapermillExecutionError as error:
        raise DCRError(
            f"{name}: cell {error.exec_count} failed: {error.ename}: {error.evalue}. The notebook "
            f"as far as it ran: {partial}"
        ) from error
    os.replace(partial, target)


def package_hash() -> str:
    """A digest of all files of the package that a result can depend on."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and path.suffix in (".py", ".yaml", ".jsonl", ".csv", ".html"):
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
