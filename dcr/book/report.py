"""One self-contained report of a run: story, tables, pictures and manifest in a single HTML file, nothing from elsewhere."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape

from dcr.book.figures import read_index
from dcr.data.files import write_atomic
from dcr.errors import DCRError
from dcr.evaluate.rates import plane_points
from dcr.evaluate.seeds import over_seeds
from dcr.plots.style import DPI, in_order
from dcr.plots.table_formats import fragment
from dcr.tables.figure_data import load_tables, read_csv

# The story: heading, what the reader is told, the figures that show it. No number stands here; those come from the run.
STORY = (
    (
        "Why aligned models over-refuse",
        "Safety alignment teaches a model to refuse toxic prompts, and the refusals spill over to harmless prompts that look toxic. "
        "The paper's explanation: the model represents both alike, so a step on one moves the other.",
        ("refusal_rates", "rejection", "reliability", "kernel", "proposition", "separability"),
    ),
    (
        "Contrastive refinement",
        "Before alignment, a contrastive loss at one layer pulls the two classes apart; then alignment runs as before.",
        (
            "overview",
            "similarity",
            "refinement",
            "refinement_cosines",
            "refinement_maps",
            "refinement_drift",
            "refinement_kernel",
            "losses",
        ),
    ),
    (
        "Compliance and safety",
        "A model that refuses everything is safe, one that refuses nothing complies: both axes belong in one picture, and each method is a "
        "curve in it.",
        (
            "plane",
            "matched_safety",
            "seeds_matched_safety",
            "seeds_differences",
            "bias_frontier",
            "differences",
            "categories",
            "ability",
            "robustness",
            "cost",
        ),
    ),
    (
        "Is it harm, or the form of the sentence?",
        "In the published sets harmless prompts are nearly all questions and toxic ones nearly all imperatives. The rule “refuse unless it "
        "ends in a question mark” stands beside every method, and every rate is read by form.",
        (
            "question_shares",
            "shortcut",
            "rates_by_form",
            "transfer",
            "probe_cells",
            "harm_read",
            "seeds_scores",
        ),
    ),
    (
        "How far the numbers can be trusted",
        "Judges against human labels, and one setting changed at a time.",
        ("judges", "ablation_levers", "ablation_outcomes", "search_levers", "search_outcomes"),
    ),
)


def write_report(root: str | Path) -> Path:
    """`<root>/report.html` from the run's figures, tables and manifest. Raises DCRError when no figure has been drawn."""
    root = Path(root)
    index = read_index(root / "figures")
    manifest = (
        json.loads((root / "manifest.json").read_text(encoding="utf-8"))
        if (root / "manifest.json").exists()
        else {}
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(["html"]),
    )
    told = {name for _, _, names in STORY for name in names}
    rest = [name for name in index["figures"] if name not in told]
    story = [*STORY, *([("Further figures", "", tuple(rest))] if rest else [])]
    sections = [
        {
            "title": heading,
            "text": text,
            "figures": [_figure(root, name, index) for name in names if name in index["figures"]],
            "missing": [index["missing"][name] for name in names if name in index["missing"]],
        }
        for heading, text, names in story
    ]
    page = environment.get_template("report.html").render(
        profile=manifest.get("config", {}).get("profile", root.name),
        methods=", ".join(manifest.get("methods", [])),
        seed=manifest.get("config", {}).get("seed", ""),
        tables=_tables(root / "tables"),
        findings=findings(root),
        sections=sections,
        notebooks=[
            p.name
            for p in sorted((root / "notebooks").glob("[0-9]*.ipynb"))
            if ".running" not in p.name
        ],
        manifest=json.dumps(manifest, indent=1, ensure_ascii=False),
    )
    path = root / "report.html"
    write_atomic(path, page)
    return path


def _figure(root: Path, name: str, index: dict) -> dict[str, str | int]:
    path = root / "figures" / f"{name}.png"
    if not path.exists():
        raise DCRError(f"{path} is missing, but its index names it. Run notebook 05_figures again.")
    content = path.read_bytes()
    width = (
        int.from_bytes(content[16:20], "big") * 100 // DPI
    )  # shown at 100 pixels an inch, so that text has one size everywhere
    return {
        "name": name,
        "caption": index["figures"][name]["caption"],
        "width": width,
        "data": base64.b64encode(content).decode(),
    }


def _tables(folder: Path) -> list[tuple[str, str]]:
    """(caption, HTML) of the run's tables: Table 1 first, the paper's beside it, then the others."""
    paths = sorted(folder.glob("table1*.csv")) + sorted(folder.glob("table_*.csv"))
    result = []
    for path in paths:
        title = path.with_suffix(".title")
        caption = title.read_text(encoding="utf-8") if title.exists() else path.stem
        result.append((caption, fragment(pd.read_csv(path, dtype=str).fillna(""))))
    return result


def findings(root: Path) -> list[str]:
    """Sentences with this run's numbers: mean compliance and DSR of each method, and the question-mark rule's; [] without metrics."""
    path = root / "tables" / "metrics.csv"
    if not path.exists():
        return []
    metrics = load_tables(root)["metrics"] if (root / "tables").is_dir() else read_csv(path)
    points = over_seeds(plane_points(metrics)).set_index("method")
    if points.empty:
        return []
    sentences = [
        f"{m}: mean compliance {points['compliance'][m]:.2f} [{points['compliance_low'][m]:.2f}, "
        f"{points['compliance_high'][m]:.2f}], mean DSR {points['dsr'][m]:.2f} [{points['dsr_low'][m]:.2f}, "
        f"{points['dsr_high'][m]:.2f}]."
        for m in in_order(points.index)
    ]
    if "STL" in points.index and "DCR" in points.index:
        compliance, dsr = (points[c]["DCR"] - points[c]["STL"] for c in ("compliance", "dsr"))
        sentences.insert(
            0,
            f"Against STL, DCR's mean compliance changes by {compliance:+.2f} and its mean DSR by {dsr:+.2f} "
            "(published sets, equal weights).",
        )
    return sentences
