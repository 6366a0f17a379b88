"""`make reproduce`: the notebooks through papermill, in order, then the report. What is up to date is not run again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path

from dcr.config import load_config
from dcr.data.files import content_key, write_atomic
from dcr.errors import DCRError

log = logging.getLogger("dcr")
NOTEBOOKS = ("01_representations", "02_refinement", "03_alignment", "04_evaluation", "05_figures")
TIMEOUT = 4 * 3600  # seconds a cell; papermill has none by default


def notebooks_dir() -> Path:
    """The notebooks folder of the checkout the package is installed from."""
    folder = Path(__file__).resolve().parents[2] / "notebooks"
    if not folder.is_dir():
        raise DCRError(
            "the notebooks are not beside the package; run from a checkout of the project (pip install -e .)."
        )
    return folder


def reproduce(
    profile: str,
    *,
    seed: int = 0,
    run_dir: str = "",
    overrides: str = "",
    only: tuple[str, ...] = (),
) -> Path:
    """Execute the notebooks into `<run>/notebooks/` and write `<run>/report.html`; returns the report's path.

    A notebook that ran already with the same source, package and parameters is kept. With `only`, and no figures yet, there is
    nothing to report: the path is then the folder of executed notebooks. Raises DCRError naming the notebook and the cell's error.
    """
    import papermill

    config = load_config(
        profile, seed=seed, overrides=overrides
    )  # a wrong name fails before anything starts
    root = Path(run_dir or Path("runs") / profile).expanduser().absolute()
    out = root / "notebooks"
    out.mkdir(parents=True, exist_ok=True)
    chosen = [n for n in NOTEBOOKS if not only or n[:2] in only]
    parameters = {"profile": profile, "seed": seed, "run_dir": str(root), "overrides": overrides}
    for number, name in enumerate(chosen, 1):
        source, target = notebooks_dir() / f"{name}.ipynb", out / f"{name}.ipynb"
        mark = content_key(
            {
                "source": _source_of(source),
                "package": _package_hash(),
                "config": config.to_dict(),
                "run": str(root),
                "data": os.environ.get("DCR_DATA_DIR", ""),
            }
        )
        done = target.with_suffix(".done")
        if target.exists() and done.exists() and done.read_text() == mark:
            print(f"[{number}/{len(chosen)}] {name}: up to date", flush=True)
            continue
        started = time.time()
        partial = target.with_suffix(".running.ipynb")
        print(f"[{number}/{len(chosen)}] {name}: running", flush=True)
        try:
            papermill.execute_notebook(
                str(source),
                str(partial),
                parameters,
                kernel_name="python3",
                progress_bar=False,
                execution_timeout=TIMEOUT,
                cwd=str(out),
            )
        except papermill.PapermillExecutionError as error:
            raise DCRError(
                f"{name}: cell {error.exec_count} failed: {error.ename}: {error.evalue}. The notebook as far "
                f"as it ran: {partial}"
            ) from error
        shutil.move(partial, target)
        write_atomic(done, mark)
        print(f"[{number}/{len(chosen)}] {name}: done in {time.time() - started:.0f} s", flush=True)
    if only and not (root / "figures" / "index.json").exists():
        print("no report yet: 05_figures draws what it shows", flush=True)
        return out
    from dcr.book.report import write_report

    return write_report(root)


def _source_of(path: Path) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def _package_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*")):
        if path.is_file() and path.suffix in (".py", ".yaml", ".jsonl", ".csv", ".html"):
            digest.update(
                path.relative_to(Path(__file__).parents[1]).as_posix().encode() + path.read_bytes()
            )
    return digest.hexdigest()
