"""All figures of a run drawn from its tables, and one self-contained page that tells the story."""

import base64
import json
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader

from dcr.data.files import write_atomic
from dcr.errors import DCRError
from dcr.plots.style import DPI, save
from dcr.plots.tables import save_table, styled
from dcr.study.experiment import on_every_seed
from dcr.study.registry import FIGURES, TABLES, load_all, read_table

MAIN = (  # what the index of figures shows; the others it names
    *("plane", "frontier", "frontier_differences", "auroc_by_source", "gap", "rates_by_form"),
    *("source_shortcut", "separability", "similarity", "refusal_rates", "kernel_trajectory"),
    "same_rows",
)
BY_COMMAND = {  # tables that no notebook makes
    "search": "dcr grid search --run-dir RUN, then dcr table search --profile P --run-dir RUN"
}
PEOPLE = ("table1", "table1_sets", "table1_paper", "quality")
CLAIMS = (
    "The paper's claims in this run: differences with 95 % intervals; above 0 is as the paper "
    "says, in the second row 0 is"
)


def tables_of(run: str | Path) -> Path:
    """The run's `tables/`, or the folder itself. Raises DCRError where no table is."""
    run = Path(run)
    folder = run / "tables" if (run / "tables").is_dir() else run
    if not any(folder.glob("*.csv")):
        raise DCRError(f"{run}: no tables here; give a run directory or a folder of tables.")
    return folder


def notebook_of(name: str) -> str:
    """The notebook that makes a table, "" for one of no notebook of ours."""
    return TABLES[name].notebook if name in TABLES else ""


def maker_of(name: str) -> str:
    """What to run for a table that is not there."""
    return BY_COMMAND.get(name, f"notebook {notebook_of(name)}".rstrip())


def caption_of(name: str) -> str:
    """What a table function says that it makes."""
    return " ".join((TABLES[name].make.__doc__ or name).split()) if name in TABLES else name


def draw(run: str | Path, out: str | Path) -> dict[str, str]:
    """Draw every registered figure whose table the run has into `out`: png, svg and its csv.

    Tables for people come as Markdown and LaTeX; README.md lists all. The same tables give the
    same bytes. Returns {figure that could not be drawn: why}. Raises DCRError for no tables.
    """
    load_all()
    folder, out, missing, links = tables_of(run), Path(out), {}, {}
    within = out.resolve() in folder.resolve().parents  # the tables are there already
    for name, entry in FIGURES.items():
        source = folder / f"{name}.csv"
        try:
            if not source.exists():
                raise DCRError(f"no table; run {maker_of(name)}")
            save(entry.draw(read_table(source)), out / name)
        except DCRError as error:
            missing[name] = str(error)
            continue
        data = source.resolve().relative_to(out.resolve()).as_posix() if within else source.name
        if not within:
            write_atomic(out / source.name, source.read_bytes())
        links[name] = f"[{name}]({name}.png) ([data]({data}))"
    for name in sorted(set(TABLES) - set(FIGURES)):
        source = folder / f"{name}.csv"
        if source.exists() and "column" in (frame := read_table(source)):
            save_table(frame, out / name, caption_of(name))
            links[name] = f"[{name}]({name}.md) ([LaTeX]({name}.tex))"
    lines = ["# Figures", "", "Drawn by `dcr figures RUN --out DIR` from a run's tables alone.", ""]
    for name in (n for n in MAIN if n in links):
        told = ". ".join(FIGURES[name].caption.split(". ")[:2]).rstrip(".")
        lines += [f"{told}: {links.pop(name)}.", "", f"![{name}]({name}.png)", ""]
    lines += ["Further:", "", *(f"- {link}" for link in links.values())]
    lines += [f"- not drawn: {name} ({why})" for name, why in missing.items()]
    write_atomic(out / "README.md", "\n".join(lines) + "\n")
    return missing


def effect(claims: pd.DataFrame) -> str:
    """Whether this run shows the paper's effect: intervals above, below and around 0.

    As published, and with forms equal.
    """
    told, sure = [], []
    for reading in claims["reading"].unique()[:2]:
        rows = claims[claims["reading"] == reading]
        above, below = int((rows["low"] > 0).sum()), int((rows["high"] < 0).sum())
        sure.append(above + below)
        around = len(rows) - above - below
        told.append(
            f"{reading}: {above} with an interval above 0, {below} below, {around} that hold it"
        )
    if not sure[0]:
        return (
            f"This run is too small to show an effect: {claims['reading'].iloc[0]}, the interval "
            "of every claim holds 0. It shows that the machinery works; findings stand in the "
            "reference run."
        )
    return f"Of {claims['claim'].nunique()} claims of the paper, {'; '.join(told)}."


def write_report(root: str | Path) -> Path:
    """Write `<root>/report.html` from the run's tables and manifest: no network, all escaped.

    Figures are those of `<root>/figures`, drawn anew where their tables changed. Raises DCRError
    when the run has no tables.
    """
    load_all()
    root, folder = Path(root), tables_of(root)
    read = {p.stem: read_table(p) for p in sorted(folder.glob("*.csv"))}
    missing = dict.fromkeys(set(FIGURES) - set(read), "no table yet")
    if any(_stale(root / "figures", folder / f"{n}.csv") for n in FIGURES if n in read):
        missing = draw(root, root / "figures")
    sections: dict[str, Any] = {}  # by notebook, those of no notebook last
    for name in sorted(FIGURES, key=lambda n: notebook_of(n) or "~"):  # stable: order of its module
        home = sections.setdefault(notebook_of(name), {"figures": [], "missing": []})
        if name in missing:
            home["missing"].append(f"{name}: {missing[name]}")
        elif name != "plane":
            home["figures"].append(_shown(root, name))
    path, claims = root / "manifest.json", read.get("claims", pd.DataFrame())
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    told = {}
    if manifest:
        alone = set(manifest["methods"]) - set(on_every_seed(manifest))
        shown = [f"{m} (first seed)" if m in alone else m for m in manifest["methods"]]
        told["methods"] = ", ".join(shown)
    if len(claims):
        laid = claims.rename(columns={"reading": "column"})
        told |= {"effect": effect(claims), "claims": styled(laid, CLAIMS).to_html()}
    executed = sorted((root / "notebooks").glob("[0-9]*.ipynb"))
    environment = Environment(loader=PackageLoader("dcr.book"), autoescape=True)
    page = environment.get_template("report.html").render(
        **told,
        profile=manifest.get("config", {}).get("profile", root.name),
        seeds=", ".join(map(str, manifest.get("seeds", []))),
        plane=_shown(root, "plane") if "plane" in set(FIGURES) - set(missing) else None,
        sections=sections,
        tables=[styled(read[n], caption_of(n)).to_html() for n in PEOPLE if n in read],
        notebooks=[p.name for p in executed if ".running" not in p.name],
        manifest=json.dumps(manifest, indent=1, ensure_ascii=False),
    )
    write_atomic(root / "report.html", page)
    return root / "report.html"


def _stale(figures: Path, table: Path) -> bool:
    """Whether a figure was not drawn from this very table."""
    copy = figures / table.name
    same = copy.exists() and copy.read_bytes() == table.read_bytes()
    return not (same and copy.with_suffix(".png").exists())


def _shown(root: Path, name: str) -> dict[str, str | int]:
    """A figure of the page, shown at 100 pixels an inch, so that text has one size everywhere."""
    content = (root / "figures" / f"{name}.png").read_bytes()
    width = int.from_bytes(content[16:20]) * 100 // DPI
    data = base64.b64encode(content).decode()
    return {"name": name, "caption": FIGURES[name].caption, "width": width, "data": data}
