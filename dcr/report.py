"""One self-contained report of a run: story, tables, pictures and manifest in a single HTML file, nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape

from dcr.errors import DCRError
from dcr.store import write_atomic

CAPTIONS = {
    "question_shares": "Share of questions in each set. Harmless sets are nearly all questions, toxic ones nearly all "
                       "imperatives: sentence form alone nearly gives the label away.",
    "separability": "AUROC of a linear probe on hidden states by layer (band: 95 % bootstrap over pairs), beside surface "
                    "baselines (dashed).",
    "transfer": "The probe read on sets it was not trained on. Below 0.5 it follows form, not harm.",
    "overview": "The two stages of contrastive refinement.",
    "refinement": "Stage 1 on held-out prompts: cosine between and within classes, and a probe's AUROC.",
    "losses": "Training loss of both stages.",
    "rejection": "Refusal probability of toxic, seemingly toxic and general prompts over alignment (band: 95 % normal "
                 "interval over prompts).",
    "kernel": "Normalised kernel similarity of toxic and seemingly toxic prompts over alignment (bars: 95 % bootstrap over "
              "prompts).",
    "plane": "Each method's checkpoints in the compliance-safety plane; the last one is filled.",
    "rates_by_form": "Refusal rate by benchmark and form of the prompt (95 % Wilson intervals).",
    "cost": "Wall time of each stage by method.",
}


def write_report(root: str | Path) -> Path:
    """`<root>/report.html` from the run's figures, tables and manifest. Raises DCRError when no figure has been drawn."""
    root = Path(root)
    pictures = sorted((root / "figures").glob("*.png"), key=lambda p: list(CAPTIONS).index(p.stem) if p.stem in CAPTIONS else 99)
    if not pictures:
        raise DCRError(f"{root / 'figures'}: no figures yet. Run notebook 05_figures (or `dcr reproduce`) first.")
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8")) if (root / "manifest.json").exists() else {}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=select_autoescape(["html"]))
    tables = []
    for path in sorted((root / "tables").glob("table1*.csv")):
        frame = pd.read_csv(path).fillna("")
        tables.append((path.with_suffix(".title").read_text() if path.with_suffix(".title").exists() else path.stem,
                       frame.to_html(index=False, border=0, escape=True, float_format=lambda v: f"{v:.2f}")))
    notebooks = sorted((root / "notebooks").glob("[0-9]*.ipynb"))
    page = environment.get_template("report.html").render(
        profile=manifest.get("config", {}).get("profile", root.name), methods=", ".join(manifest.get("methods", [])),
        seed=manifest.get("config", {}).get("seed", ""), tables=tables,
        figures=[(p.stem, CAPTIONS.get(p.stem, p.stem), base64.b64encode(p.read_bytes()).decode()) for p in pictures],
        notebooks=[p.name for p in notebooks if ".running" not in p.name],
        manifest=json.dumps(manifest, indent=1, ensure_ascii=False))
    path = root / "report.html"
    write_atomic(path, page)
    return path


def escaped(text: str) -> str:
    """HTML-escaped prompt or answer, for notebooks."""
    return html.escape(str(text), quote=True)
