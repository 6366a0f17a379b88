"""The rows of a table file or a frame, as they stand: CSV, TSV, JSON, JSON lines, Parquet, text.

Broken input is refused with the file, the row (the first is row 0) and the mend.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dcr.errors import DCRError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
NEWLINE = re.compile(r"\r\n|\n|\r")  # and no other: U+2028 and its like stand inside texts
Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a table file by its suffix (any case; .gz is unpacked). Raises DCRError."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in SUFFIXES:
        raise DCRError(f"{path}: suffix {suffix!r} is unknown; use {', '.join(SUFFIXES)}.")
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.name.lower().endswith(".gz") else raw
    except (OSError, EOFError, zlib.error) as error:
        problem = getattr(error, "strerror", None) or error
        raise DCRError(f"{path}: cannot be read ({problem}). Give the path of a table.") from error
    if suffix == ".parquet":
        try:
            frame = pd.read_parquet(io.BytesIO(raw))
        except Exception as error:  # pyarrow's own kinds
            raise DCRError(f"{path}: no readable Parquet file. Write it again.") from error
        return records(frame, path)
    text = _decoded(raw, path)
    if suffix in (".csv", ".tsv"):
        return _csv(text, path, "\t" if suffix == ".tsv" else "")
    if suffix == ".txt":
        return [{"text": line} for line in NEWLINE.split(text) if line.strip()]
    return as_rows(_json(text, path), path, "row")


def _decoded(raw: bytes, path: Path) -> str:
    name = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "UTF-8"
    try:
        text = raw.decode(name).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        text, problem = raw[: error.start].decode("latin-1"), f"is not {name}"
    else:
        text, _, rest = text.partition("\0")
        problem = "holds a zero byte" if rest else ""
    if problem:
        line = text.count("\n") + 1
        raise DCRError(f"{path}: line {line} {problem}. Save the file as UTF-8 text.")
    return text


def _csv(text: str, path: Path, delimiter: str) -> list[Row]:
    head = NEWLINE.split(text.lstrip("\r\n"), maxsplit=1)[0]
    delimiter = delimiter or max(",;\t", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        lines = [line for line in reader if line]
    except csv.Error as error:
        raise DCRError(
            f"{path}: broken CSV near line {reader.line_num} ({error}). Mend its quotes."
        ) from error
    names = [name.strip() for name in lines[0]] if lines else []
    for number, line in enumerate(lines[1:]):
        if len(line) != len(names):
            raise DCRError(
                f"{path}: row {number} has {'more' if len(line) > len(names) else 'fewer'} fields "
                f"than the header ({', '.join(names)}). Quote fields that hold a {delimiter!r}."
            )
    return records(pd.DataFrame(lines[1:], columns=names, dtype=object), path)


def _json(text: str, path: Path) -> list:
    """The items of a JSON array, of JSON lines, or of {"instructions": [...]}."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, dict) and "text" not in whole and "instructions" in whole:
        whole = whole["instructions"]
    if isinstance(whole, list):
        return whole
    items = []
    for number, line in enumerate(NEWLINE.split(text), 1):
        if line.strip():
            try:
                items.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise DCRError(
                    f"{path}: line {number} is not JSON ({getattr(error, 'msg', error)}). Write "
                    "one object a line, or one array of objects."
                ) from error
    return items


def as_rows(items: Sequence, where: object, unit: str) -> list[Row]:
    """Items that are all texts, or all rows, as rows. Raises DCRError for the first other."""
    texts = len(items) > 0 and isinstance(items[0], str)
    for number, item in enumerate(items):
        if not isinstance(item, str if texts else dict):
            kind = "null" if item is None else type(item).__name__
            raise DCRError(
                f"{where}: {unit} {number} is {kind}, not a {'text' if texts else 'row'}. Give "
                "texts, or rows with a field 'text'."
            )
    return [{"text": i} if texts else {str(k): v for k, v in i.items()} for i in items]


def records(frame: pd.DataFrame, where: object) -> list[Row]:
    """The rows of a frame. Raises DCRError for a column that stands twice."""
    names = [str(c) for c in frame.columns]
    if len(set(names)) < len(names):
        raise DCRError(f"{where}: a column stands twice ({', '.join(names)}). Rename one.")
    rows: list[Any] = frame.astype(object).set_axis(names, axis=1).to_dict("records")
    return rows


def short(error: Exception) -> str:
    """Kind and first words of another library's error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
