"""The README's numbers: blocks between two comments, written from a run's tables alone."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from dcr.book.say import main_rows, number
from dcr.data.files import write_atomic
from dcr.errors import DCRError
from dcr.plots.tables import markdown
from dcr.study.experiment import CHECKOUT, on_every_seed
from dcr.study.registry import read_table

TARGET = 0.80  # DSR at which methods are compared
METHODS = ["Token+Gate-base", "Token+Gate", "Tied", "Gate", "DCR", "DCR-sham", "STL"]
COLUMNS = {  # of the table of standing, as the README names them
    f"compliance at DSR {TARGET:.2f} ↑": "harmless let through",
    f"DSR on test prompts, set to {TARGET:.2f} ↑": "DSR then",
    f"general let through at DSR {TARGET:.2f} ↑": "general let through",
    "AUROC, toxic / harmless: forms equal ↑": "AUROC",
    "nominal: compliance ↑": "harmless answered",
    "nominal: DSR ↑": "toxic refused",
    "nominal: degenerate answers to harmless prompts ↓": "degenerate",
    "general answered ↑": "general answered",
    "toxic refused, worst rewording ↑": "toxic refused, reworded",
}
BLOCK = re.compile(r"(<!-- (\w+): written by `dcr readme` -->\n).*?(<!-- end -->)", re.DOTALL)


def readme(*, check: bool = False) -> Path:
    """Write README.md's blocks from figures/reference; with `check` only compare.

    Raises DCRError for a block that nobody writes, a table that is not there, and, when `check`
    finds one, a block that the tables do not give.
    """
    path, folder = CHECKOUT / "README.md", CHECKOUT / "figures" / "reference"

    def read(name: str) -> pd.DataFrame:
        if not (folder / f"{name}.csv").is_file():
            raise DCRError(f"{folder / name}.csv is missing: dcr table {name} makes it.")
        return read_table(folder / f"{name}.csv")

    def fill(found: re.Match[str]) -> str:
        if found[2] not in BLOCKS:
            raise DCRError(f"{path}: block {found[2]!r} is unknown; known: {', '.join(BLOCKS)}.")
        return found[1] + BLOCKS[found[2]](read, folder).rstrip() + "\n" + found[3]

    before = path.read_text(encoding="utf-8")
    text = BLOCK.sub(fill, before)
    if not check:
        write_atomic(path, text)
    elif text != before:
        raise DCRError(f"{path} says what figures/reference does not; run: dcr readme.")
    return path


def _claims(read: Callable[[str], pd.DataFrame], folder: Path) -> str:
    """What the run was, and the paper's claims: a row each, a column a reading."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    claims, seeds, methods = read("claims"), manifest["seeds"], manifest["methods"]
    said = f"{len(methods)} methods, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    if len(seeds) > 1 and (alone := [m for m in methods if m not in on_every_seed(manifest)]):
        said += f" (one seed of {', '.join(alone)})"
    config, asked = manifest["config"], manifest["data"]["test"]["rows"]
    answered, tokens = config["data"]["answered"] or "all", config["generation"]["max_new_tokens"]
    first = (
        f"Reference run: {manifest['model']['name']} model, {said}; {asked} test prompts are "
        f"scored (AUROC, thresholds), {answered} requests a set are answered in {tokens} tokens "
        "(compliance, DSR). DCR less STL, 95 % intervals, not corrected for looking at nine; in "
        "the second row 0 is as the paper says, else above 0."
    )
    less = read("frontier_differences")
    less = less.query("method == 'DCR' and against == 'STL' and measure == 'compliance'")
    less = less[less["target"] == TARGET]
    given = read("frontier").query("target == @TARGET").set_index("method")["dsr"]
    last = (
        f"At one DSR (thresholds from validation prompts, {TARGET:.2f}; on test prompts they give "
        f"DCR {given['DCR']:.2f}, STL {given['STL']:.2f}), forms equal, DCR less STL in harmless "
        f"prompts let through: {number(less.iloc[0], 'difference')}."
    )
    table = markdown(claims.rename(columns={"reading": "column"})).rstrip()
    return f"{first}\n\n{table}\n\n{last}"


def _practice(read: Callable[[str], pd.DataFrame], folder: Path) -> str:
    """What a few methods let through at one DSR, and what they then answer."""
    rows = read("standing")
    rows = main_rows(rows[rows["column"].isin(COLUMNS)], METHODS)
    seeds = rows.groupby("method")["seeds"].max().astype(int).astype(str)
    rows = rows.assign(method=rows["method"] + " (" + rows["method"].map(seeds) + ")")
    rows = rows.assign(column=rows["column"].map(COLUMNS))
    said = (
        f"Threshold from validation prompts for a DSR of {TARGET:.2f}; test prompts, forms equal, "
        "95 % intervals; AUROC on unseen sources; in brackets the seeds."
    )
    return f"{said}\n\n{markdown(rows[['method', 'column', 'value', 'low', 'high']])}"


BLOCKS = {"claims": _claims, "practice": _practice}
