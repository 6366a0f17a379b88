"""Whether a run directory holds what it says: checksums, form, tables that follow from the rest."""

import json
from pathlib import Path

import pandas as pd

from dcr.data.files import content_key, read_jsonl
from dcr.errors import DCRError
from dcr.evaluate.judges import VERDICTS
from dcr.run.store import Artifact, Store
from dcr.study import registry
from dcr.study.experiment import Experiment, run_manifest

MANIFEST = {"kind": str, "name": str, "dependencies": dict, "environment": dict, "seconds": float}
ROWS: dict[str, dict[str, type]] = {  # file of an artifact → what each of its rows holds
    "generations.jsonl": {"prompt_id": str, "response": str, "n_tokens": int, "finish": str},
    "verdicts.jsonl": {"prompt_id": str, "judge": str, "verdict": str},
    "items.jsonl": {"item": str, "task": str, "metric": str},
    "losses.jsonl": {"item": str, "loss": float, "tokens": int},
    "history.jsonl": {"step": int, "loss": float, "grad_norm": float},
}
CHOICES = {"finish": ("eos", "length"), "verdict": VERDICTS}


def verify(root: str | Path) -> pd.DataFrame:
    """what, status of every artifact (checksums, form) and table (made again from them alone)."""
    root = Path(root).expanduser().absolute()
    rows = [
        {"what": f"{a.path.parent.name}/{a.path.name}", "status": a.broken() or misfit(a) or "ok"}
        for a in Store(root).artifacts()
    ]
    if not rows or not run_manifest(root):
        raise DCRError(f"{root} holds no finished run: no manifest.json or no artifact.")
    experiment = as_run(root)
    experiment.store.complete = True
    for path in sorted(root.glob("tables/*.csv")):
        try:
            same = registry.table_entry(path.stem).make(experiment).to_csv(index=False)
            differs = same != path.read_text(encoding="utf-8")
            status = "differs from what the artifacts give" if differs else "ok"
        except DCRError as error:
            status = f"cannot be made again: {error}"
        rows.append({"what": f"tables/{path.name}", "status": status})
    return pd.DataFrame(rows)


def as_run(root: Path) -> Experiment:
    """The experiment of a finished run, with all that its manifest says it was run with."""
    kept = run_manifest(root)
    named = ("profile", "seed", "methods")  # what the call itself says
    values = {k: v for k, v in kept["config"].items() if k not in named}
    return Experiment(
        kept["config"]["profile"],
        seeds=kept["seeds"],
        run_dir=root,
        overrides={**values, "model.precision": kept["model"]["precision"]},
        methods=kept["methods"],
    )


def misfit(artifact: Artifact) -> str:
    """What an artifact lacks of its form: its manifest, its folder's name, its rows; else ""."""
    manifest = artifact.manifest
    try:
        _holds(manifest, MANIFEST)
        name = f"{manifest['name']}-{content_key(manifest['dependencies'])}"
        if artifact.path.name != name:
            return f"manifest.json is that of {name}"
    except ValueError as error:
        return f"manifest.json: {error}"
    for file in sorted(ROWS.keys() & manifest["outputs"]):
        for number, row in enumerate(read_jsonl(artifact.path / file), 1):
            try:
                _holds(row, ROWS[file])
            except ValueError as error:
                return f"{file}, row {number}: {error}"
    return ""


def _holds(row: dict, fields: dict[str, type]) -> None:
    for name, kind in fields.items():
        value = row.get(name) if isinstance(row, dict) else None
        fits = isinstance(value, (int, float) if kind is float else kind)
        if kind is int and isinstance(value, float):  # as pandas writes a column with gaps
            fits = value.is_integer()
        if not fits or value not in CHOICES.get(name, (value,)):
            raise ValueError(f"{name} is {json.dumps(value)}")
