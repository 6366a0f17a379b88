"""Draw every figure and table of a run from its tables: no model, no training. What is missing is said, the rest drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from dcr import plots, tables
from dcr.errors import DCRError
from dcr.store import write_atomic
from dcr.style import save

# figure → (tables it reads, the notebook that writes them)
SOURCES: dict[str, tuple[tuple[str, ...], str]] = {
    "question_shares": (("question_shares",), "01_representations"),
    "separability": (("separability_probe_base", "separability_surface_base"), "01_representations"),
    "transfer": (("separability_transfer_base",), "01_representations"),
    "refinement": (("refinement_DCR",), "02_refinement"),
    "losses": (("losses",), "03_alignment"),
    "rejection": (("trajectory_rejection",), "03_alignment"),
    "kernel": (("trajectory_kernel",), "03_alignment"),
    "plane": (("plane",), "04_evaluation"),
    "rates_by_form": (("metrics",), "04_evaluation"),
    "cost": (("cost",), "04_evaluation"),
}
DRAW: dict[str, Callable[..., Figure]] = {**plots.REDRAW, "separability": plots.separability_by_layer}


def draw_all(folder: str | Path, out: str | Path) -> tuple[dict[str, Figure], dict[str, str]]:
    """Figures drawn from `folder`/<table>.csv into `out` (PNG, SVG, and each table beside), and what is missing.

    Returns ({name: figure}, {name: message}).
    """
    folder, out, drawn, missing = Path(folder), Path(out), {}, {}
    figure = plots.overview()
    save(figure, out / "overview")
    drawn["overview"] = figure
    for name, (needed, notebook) in SOURCES.items():
        absent = [t for t in needed if not (folder / f"{t}.csv").exists()]
        if absent:
            missing[name] = f"{name}: no {', '.join(absent)} yet; run notebook {notebook}."
            continue
        frames = [pd.read_csv(folder / f"{t}.csv", keep_default_na=True) for t in needed]
        try:
            drawn[name] = DRAW[name](*frames)
        except DCRError as error:
            missing[name] = f"{name}: {error}"
            continue
        save(drawn[name], out / name)
        for table, frame in zip(needed, frames, strict=True):
            write_atomic(out / f"{table}.csv", frame.to_csv(index=False))
    return drawn, missing


def draw_tables(metrics: pd.DataFrame, out: str | Path) -> dict[str, pd.DataFrame]:
    """Table 1 (all prompts, and balanced over forms where both occur) and the comparison with the paper's, saved in `out`."""
    out, made = Path(out), {}
    long = tables.table1(metrics)
    made["table1"] = tables.wide(long)
    if (metrics["form"] == "balanced").any():
        made["table1_balanced"] = tables.wide(tables.table1(metrics, "balanced"))
    made["table1_paper"] = tables.beside_paper(long).set_index("source")
    titles = {"table1": "Compliance and defence success rate",
              "table1_balanced": "The same, averaged equally over questions and imperatives (sets that have both)",
              "table1_paper": "Beside the paper's numbers (marked as the paper's, blank where unknown)"}
    for name, frame in made.items():
        tables.save_table(frame, out / name, titles[name])
        write_atomic(out / f"{name}.title", titles[name])
    return made
