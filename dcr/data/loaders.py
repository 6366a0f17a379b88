"""Every source and user file as one prompt table: id, text, label, source, category, split, form, pair_id, response.

Broken input is refused with the file, the row and the mend.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from dcr.data.fetch import path_of
from dcr.data.forms import form_of
from dcr.data.registry import Source, source
from dcr.errors import DCRError

BUNDLED = Path(__file__).parent / "bundled"
COLUMNS = ("id", "text", "label", "source", "category", "split", "form", "pair_id", "response")
LABELS = ("toxic", "seemingly_toxic", "general")
Row = dict[str, object]


def load(name: str, *, audited: bool = False, download: bool = True) -> pd.DataFrame:
    """One registry source as a prompt table.

    audited: leave out the rows of `safety-only` that the committed audit marks harmless or ambiguous.
    """
    entry = source(name)
    path = path_of(name, download=download)
    rows = list(PARSERS[entry.parser](path, entry))
    if entry.rows and len(rows) != entry.rows:
        raise DCRError(
            f"{path}: {len(rows)} rows for {name}, expected {entry.rows}. The file is truncated or another "
            f"version; delete it and run: dcr data fetch {name}"
        )
    table = as_table(rows, path, default_label=entry.label or "general", origin=name)
    if audited:
        marks = audit()
        if name != "safety-only":
            raise DCRError(f"{name}: no audit is committed for this source; turn data.audited off.")
        table = table[~table["id"].map(marks).isin(["harmless", "ambiguous"])].reset_index(
            drop=True
        )
    return table


@cache
def audit() -> dict[str, str]:
    """id → harmful, ambiguous or harmless for the public toxic training file (our own reading, no text)."""
    path = BUNDLED / "audit.csv"
    if not path.exists():
        raise DCRError(f"{path} is missing: this checkout has no audit; turn data.audited off.")
    return dict(pd.read_csv(path)[["id", "label"]].itertuples(index=False, name=None))


def load_bundled(name: str) -> pd.DataFrame:
    """The kit's own data: "pairs" (DCR-Pairs) or "general"."""
    path = BUNDLED / f"{name}.jsonl"
    if name not in ("pairs", "general") or not path.exists():
        raise DCRError(f"bundled data {name!r} is unknown; use pairs or general.")
    return as_table(list(_jsonl(path)), path, default_label="general", origin=f"dcr-{name}")


def read_user_table(path: str | Path, label: str | None = None) -> pd.DataFrame:
    """A user's CSV or JSONL in the same columns; `text` is required, and `label` unless given here."""
    path = Path(path)
    if not path.is_file():
        raise DCRError(
            f"{path}: no such file. Give the path of a CSV or JSONL table with a text column."
        )
    rows = list(_csv(path) if path.suffix == ".csv" else _jsonl(path))
    if rows and label is None and "label" not in rows[0]:
        raise DCRError(
            f"{path}: column 'label' is missing. Add it ({', '.join(LABELS)}) or name the label."
        )
    return as_table(rows, path, default_label=label or "", origin=path.stem)


def as_table(rows: list[Row], path: Path, *, default_label: str, origin: str) -> pd.DataFrame:
    """Validated prompt table from parsed rows. Raises DCRError with file, row and mend."""
    if not rows:
        raise DCRError(f"{path}: no rows. The file is empty or truncated; fetch or write it again.")
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        if "text" not in row:
            raise DCRError(
                f"{path}: column 'text' is missing (row {number} has {', '.join(map(str, row))}). Add it."
            )
        text = row["text"]
        if not isinstance(text, str) or not text.strip():
            raise DCRError(f"{path}: row {number}: text is empty. Fill it or delete the row.")
        label = row.get("label") or default_label
        if label not in LABELS:
            raise DCRError(
                f"{path}: row {number}: label {label!r} is unknown; use {', '.join(LABELS)}."
            )
        key = str(row.get("id") or f"{origin}-{number:04d}")
        if key in seen:
            raise DCRError(
                f"{path}: row {number}: id {key!r} stands already in row {seen[key]}. Make ids unique."
            )
        seen[key] = number
        row.update(
            id=key,
            text=text.strip(),
            label=label,
            source=row.get("source") or origin,
            category=row.get("category") or "",
            split=row.get("split") or "test",
            form=row.get("form") or form_of(text),
            pair_id=row.get("pair_id") or "",
            response=str(row.get("response") or "").strip(),
        )
    extra = [c for c in rows[0] if c not in COLUMNS]
    return pd.DataFrame(rows)[[*COLUMNS, *extra]].reset_index(drop=True)


def stratified_subset(table: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """`n` rows, each (form, category) in its share; which ones hangs on the seed and each row's id alone."""
    if n >= len(table):
        return table.reset_index(drop=True)
    order = table["id"].map(lambda i: hashlib.sha256(f"{seed}:{i}".encode()).hexdigest())
    shuffled = table.assign(_order=order).sort_values("_order")
    strata = [part for _, part in shuffled.groupby(["form", "category"], sort=True)]
    quota = np.array([len(part) * n / len(table) for part in strata])
    counts = np.floor(quota).astype(int)
    for i in np.argsort(-(quota - counts), kind="stable")[: n - counts.sum()]:
        counts[i] += 1
    picked = pd.concat([part.head(c) for part, c in zip(strata, counts, strict=True)])
    return picked.drop(columns="_order").sort_index().reset_index(drop=True)


# ---- parsers: file → rows with upstream columns mapped -----------------------------------------------------


def _text_of(path: Path) -> str:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DCRError(f"{path}: line {line} is not UTF-8. Save the file as UTF-8.") from error


def _csv(path: Path) -> Iterator[Row]:
    try:
        reader = csv.DictReader(io.StringIO(_text_of(path)), strict=True)
        for number, row in enumerate(reader):
            if None in row or None in row.values():
                raise DCRError(
                    f"{path}: row {number} has {'more' if None in row else 'fewer'} fields than the header "
                    f"({', '.join(reader.fieldnames or [])}). Quote fields that hold commas."
                )
            yield row
    except csv.Error as error:
        raise DCRError(
            f"{path}: broken CSV near line {reader.line_num} ({error}). Fetch or write it again."
        ) from error


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text_of(path).splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DCRError(
                    f"{path}: line {number} is not JSON ({error.msg}). Mend or delete that line."
                ) from error


def _json(path: Path):
    try:
        return json.loads(_text_of(path))
    except json.JSONDecodeError as error:
        raise DCRError(
            f"{path}: broken JSON at line {error.lineno} ({error.msg}). Fetch it again."
        ) from error


def _column(path: Path, number: int, row: Row, *names: str):
    for name in names:
        if name in row:
            return row[name]
    raise DCRError(
        f"{path}: row {number}: column {names[0]!r} is missing; found {', '.join(map(str, row))}."
    )


def _xstest(path: Path, entry: Source) -> Iterator[Row]:
    for number, row in enumerate(_csv(path)):
        if _column(path, number, row, "label") == entry.keep[1]:
            yield {
                "id": f"xstest-{number:04d}",
                "text": _column(path, number, row, "prompt"),
                "source": "xstest",
                "category": _column(path, number, row, "type"),
            }


def _prompt_csv(path: Path, entry: Source) -> Iterator[Row]:
    for number, row in enumerate(_csv(path)):
        yield {
            "text": _column(path, number, row, "prompt", "goal", "Behavior"),
            "category": row.get("category") or row.get("SemanticCategory") or "",
        }


def _lines(path: Path, entry: Source) -> Iterator[Row]:
    for line in _text_of(path).splitlines():
        if line.strip():
            yield {"text": line}


def _instructions(path: Path, entry: Source) -> Iterator[Row]:
    content = _json(path)
    if not isinstance(content, dict) or "instructions" not in content:
        raise DCRError(f"{path}: key 'instructions' is missing. Fetch it again.")
    for text in content["instructions"]:
        yield {"text": text}


def _alpaca(path: Path, entry: Source) -> Iterator[Row]:
    rows = pd.read_parquet(path).to_dict("records") if path.suffix == ".parquet" else _json(path)
    for number, row in enumerate(rows):
        text = str(_column(path, number, row, "instruction"))
        extra = str(row.get("input") or "").strip()
        yield {
            "text": f"{text}\n\n{extra}" if extra else text,
            "response": _column(path, number, row, "output"),
            "split": "train",
        }


def _coconot(path: Path, entry: Source) -> Iterator[Row]:
    for number, row in enumerate(_jsonl(path)):
        yield {
            "text": _column(path, number, row, "prompt"),
            "source": "coconot",
            "response": row.get("chosen", ""),
            "category": str(row.get("category", "")),
            "kind": str(row.get("subcategory", "")),
            "id": f"{entry.name}-{number:04d}",
        }


def _phtest(path: Path, entry: Source) -> Iterator[Row]:
    for number, row in enumerate(_jsonl(path)):
        yield {
            "text": _column(path, number, row, "Request"),
            "category": _column(path, number, row, "Harmfulness"),
        }


def _red_team(path: Path, entry: Source) -> Iterator[Row]:
    rows = _json(path) if _text_of(path).lstrip().startswith("[") else list(_jsonl(path))
    for number, row in enumerate(rows):
        first = str(_column(path, number, row, "transcript")).split("Assistant:")[0]
        text = first.replace("Human:", "").strip()
        if text:
            yield {
                "text": text,
                "category": str((row.get("tags") or [""])[0] if row.get("tags") else ""),
            }


def _multiple_choice(path: Path, entry: Source) -> Iterator[Row]:
    for number, row in enumerate(_jsonl(path)):
        choices = _column(path, number, row, "choices")
        answer = choices["text"][choices["label"].index(_column(path, number, row, "answerKey"))]
        yield {
            "text": _column(path, number, row, "question"),
            "response": answer,
            "category": entry.name,
        }


def _completions(path: Path, entry: Source) -> Iterator[Row]:
    for number, row in enumerate(_csv(path)):
        kind = _column(path, number, row, "type")
        yield {
            "text": _column(path, number, row, "prompt"),
            "completion": _column(path, number, row, "completion"),
            "category": kind,
            "label": "toxic" if kind.startswith("contrast") else "seemingly_toxic",
            "source": "xstest",
            **{
                k: _column(path, number, row, k)
                for k in ("annotation_1", "annotation_2", "agreement", "final_label")
            },
            "id": f"{entry.name}-{number:04d}",
        }


PARSERS = {
    "xstest": _xstest,
    "prompt_csv": _prompt_csv,
    "lines": _lines,
    "instructions": _instructions,
    "alpaca": _alpaca,
    "coconot": _coconot,
    "phtest": _phtest,
    "red_team": _red_team,
    "multiple_choice": _multiple_choice,
    "completions": _completions,
}
