"""The README's numbers: blocks between two comments, written from a run's tables alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from dcr.data.files import write_atomic
from dcr.errors import DCRError
from dcr.plots.tables import markdown
from dcr.study.experiment import CHECKOUT
from dcr.study.registry import read_table

TARGET = 0.80  # DSR at which methods are compared
BLOCK = re.compile(r"(<!-- (\w+): written by `dcr readme` -->\n).*?(<!-- end -->)", re.DOTALL)


def written(path: str | Path, tables: str | Path) -> str:
    """The file's text with each block filled from the tables in a folder.

    Raises DCRError for a block that nobody writes, or a table that is not there.
    """
    folder = Path(tables)

    def read(name: str) -> pd.DataFrame:
        if not (folder / f"{name}.csv").is_file():
            raise DCRError(f"{folder / name}.csv is missing: dcr table {name} makes it.")
        return read_table(folder / f"{name}.csv")

    def fill(found: re.Match[str]) -> str:
        if found[2] not in BLOCKS:
            raise DCRError(f"{path}: block {found[2]!r} is unknown; known: {', '.join(BLOCKS)}.")
        return found[1] + BLOCKS[found[2]](read, folder).rstrip() + "\n" + found[3]

    return BLOCK.sub(fill, Path(path).read_text(encoding="utf-8"))


def readme(*, check: bool = False) -> Path:
    """Write README.md's blocks from figures/reference; with `check` only compare.

    Raises DCRError when `check` finds a block that the tables do not give.
    """
    path = CHECKOUT / "README.md"
    text = written(path, CHECKOUT / "figures" / "reference")
    if not check:
        write_atomic(path, text)
    elif text != path.read_text(encoding="utf-8"):
        raise DCRError(f"{path} says what figures/reference does not; run: dcr readme.")
    return path


def _span(row: Mapping[Any, Any], value: str) -> str:
    return f"{row[value]:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def _claims(read: Callable[[str], pd.DataFrame], folder: Path) -> str:
    """What the run was, and the paper's claims: a row each, a column a reading."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    claims, seeds = read("claims"), manifest["seeds"]
    said = (
        f"Reference run: {manifest['model']['name']} model, {len(manifest['methods'])} methods, "
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, {manifest['data']['test']['rows']} test "
        "prompts. DCR less STL, 95 % intervals; above 0 is as the paper says."
    )
    return f"{said}\n\n{markdown(claims.rename(columns={'reading': 'column'}))}"


def _practice(read: Callable[[str], pd.DataFrame], folder: Path) -> str:
    """Compliance at one DSR of the best method and of those to compare with; AUROC by source."""
    at = read("frontier").query("target == @TARGET").sort_values("compliance", ascending=False)
    ranked = read("auroc_by_source").query("source == 'mean' and toxic_form == 'balanced'")
    rates = read("rates").query("benchmark == 'mean' and version == 'both' and form == 'balanced'")
    rates = rates.query("label == 'seemingly_toxic' and metric == 'degenerate_share'")
    broken = rates.set_index("method")["value"]
    by_method = {row["method"]: row for row in at.to_dict("records")}
    aurocs = {row["method"]: row for row in ranked.to_dict("records")}
    shown = [
        m
        for m in dict.fromkeys((*at["method"][:1], "Gate", "DCR", "DCR-sham", "STL"))
        if m in by_method
    ]
    parts = [
        f"{m} {_span(by_method[m], 'compliance')}, {by_method[m]['dsr']:.2f}, "
        f"{_span(aurocs[m], 'auroc')}, {broken[m]:.2f}"
        for m in shown
    ]
    return (
        f"Seemingly toxic prompts let through by thresholds set on validation prompts for a DSR of "
        f"{TARGET:.2f}, the DSR that they give on test prompts, forms equal; AUROC on unseen "
        f"sources; share of answers to such prompts that are degenerate: {'; '.join(parts)}."
    )


BLOCKS = {"claims": _claims, "practice": _practice}
