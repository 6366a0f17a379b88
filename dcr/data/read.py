"""Anything that holds prompts, as one typed prompt table: files, frames, lists, hub tables.

Broken input is refused with the file, the row (the first is row 0) and the mend.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dcr.data.forms import FORMS, form_of
from dcr.data.pairs import requests_of
from dcr.errors import DCRError

log = logging.getLogger("dcr")
COLUMNS = (
    "id",
    "text",
    "label",
    "form",
    "source",
    "category",
    "request",
    "role",
    "pair_id",
    "response",
)
LABELS = ("toxic", "seemingly_toxic", "general")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
NOT_AN_ANSWER = ("nan", "null", "none", "<na>")  # what a missing value becomes when it is printed
HUB = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?@(?P<revision>[\w.-]+)(?:#(?P<split>[\w.-]+))?"
)
Row = dict[str, object]


def prompts_of(
    prompts, *, what: str = "prompts", label: str = "", answers: bool = False
) -> pd.DataFrame:
    """The prompt table (columns `COLUMNS`, and any more that came along) of whatever holds prompts.

    prompts: a list, tuple, array or Series of texts; a list of rows; a DataFrame; a `datasets.Dataset`; the
        path of a CSV, TSV, JSONL, JSON, Parquet or text file (also .gz); "owner/name:config@revision#split" of a hub table.
    what: its name in messages and ids. label: the class it is given as; of a table that carries several
        classes only the rows of this one are taken. answers: every row must have a response.
    Raises DCRError naming the file or parameter, the row and the mend.
    """
    rows, where, origin = _rows_of(prompts, what)
    table = as_table(rows, where, label=label, origin=origin, answers=answers)
    mine = table["label"] == label
    if label and not mine.all():
        if not mine.any():
            raise DCRError(
                f"{where}: given as {label}, but its rows are labelled {', '.join(table['label'].unique())}."
            )
        log.info("%s: %d of %d rows are labelled %s", where, mine.sum(), len(table), label)
        table = table[mine].reset_index(drop=True)
    if (table["request"] == "").any():
        table["request"] = requests_of(table)
    return table


def _rows_of(value, what: str) -> tuple[list[Row], str, str]:
    """(rows, name for messages, stem of ids) of a value of any accepted type."""
    kind = type(value)
    if isinstance(value, (str, Path)):
        if isinstance(value, Path) or value.lower().removesuffix(".gz").endswith(SUFFIXES):
            path = Path(value).expanduser()
            return read_rows(path), str(path), path.name.split(".")[0]
        if match := HUB.fullmatch(value):
            return _from_hub(match), value, match["name"].split("/")[1]
        raise DCRError(
            f"{what}: one string ({value[:40]!r}) stands where a list of prompts is meant. Give [text], the path of a "
            f"table ({', '.join(SUFFIXES)}) or a hub table as owner/name@revision."
        )
    if kind.__module__.startswith("datasets.") and kind.__name__ == "Dataset":
        value = _named_classes(value)
    if isinstance(value, pd.DataFrame):
        if not value.columns.is_unique:
            raise DCRError(
                f"{what}: column {value.columns[value.columns.duplicated()][0]!r} twice."
            )
        names = [str(c) for c in value.columns]
        return [dict(zip(names, r, strict=True)) for r in _records(value)], what, what
    if isinstance(value, (pd.Series, pd.Index, np.ndarray)) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        hint = " Name one split of it." if kind.__name__ == "DatasetDict" else ""
        raise DCRError(
            f"{what}: {kind.__name__} is no table of prompts. Give a list of texts or of rows, a Series, a DataFrame, "
            f"a datasets.Dataset or a path.{hint}"
        )
    return as_rows(value, what, "item"), what, what


def _records(frame: pd.DataFrame) -> list[tuple]:
    return list(frame.astype(object).itertuples(index=False, name=None))


def _named_classes(data) -> pd.DataFrame:
    """A `datasets.Dataset` as a frame; integers of a ClassLabel feature become their names."""
    frame = data.to_pandas()
    for name, feature in data.features.items():
        if type(feature).__name__ == "ClassLabel":
            frame[name] = [feature.int2str(int(v)) if v == v else None for v in frame[name]]
    return frame


def _from_hub(match: re.Match) -> list[Row]:
    try:
        import datasets

        data = datasets.load_dataset(
            match["name"],
            match["config"],
            revision=match["revision"],
            split=match["split"] or "train",
        )
    except Exception as error:  # whatever the hub client raises
        raise DCRError(
            f"{match[0]}: could not be fetched ({type(error).__name__}: {str(error).splitlines()[0][:160]}). Check "
            "the name, the split, the network and, for gated sets, HF_TOKEN."
        ) from error
    frame = _named_classes(data)
    return [dict(zip(frame.columns, r, strict=True)) for r in _records(frame)]


# ---- files → rows ----------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """The rows of a table file by its suffix (any case; .gz is unpacked). Raises DCRError with file and row."""
    try:
        problem = "" if path.is_file() else "is a folder" if path.is_dir() else "no such file"
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        raise DCRError(f"{path}: {problem}. Give the path of a table ({', '.join(SUFFIXES)}).")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in SUFFIXES:
        raise DCRError(f"{path}: {suffix or 'no suffix'!r} is unknown; use {', '.join(SUFFIXES)}.")
    if suffix == ".parquet":
        try:
            frame = pd.read_parquet(path)
        except Exception as error:  # pyarrow's own kinds
            raise DCRError(f"{path}: no readable Parquet file. Write it again.") from error
        return [dict(zip(map(str, frame.columns), r, strict=True)) for r in _records(frame)]
    text = _text_of(path)
    if suffix in (".csv", ".tsv"):
        return _csv(text, path, "\t" if suffix == ".tsv" else "")
    if suffix == ".txt":
        return [{"text": line} for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
    return as_rows(_json(text, path), path, "row")


def _text_of(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DCRError(f"{path}: cannot be read ({error}). Write it again.") from error
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DCRError(
            f"{path}: line {line} is not {encoding[:6].upper()}. Save the file as UTF-8."
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DCRError(f"{path}: line {line} holds a zero byte. Save the file as UTF-8 text.")
    return text


def _csv(text: str, path: Path, delimiter: str) -> list[Row]:
    head = re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]
    delimiter = delimiter or max(",;\t", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        lines = [line for line in reader if line]
    except csv.Error as error:
        raise DCRError(
            f"{path}: broken CSV near line {reader.line_num} ({error}). Mend its quotes or write it again."
        ) from error
    names = [name.strip() for name in lines[0]] if lines else []
    if len(set(names)) < len(names):
        raise DCRError(f"{path}: the header names a column twice ({', '.join(names)}).")
    for number, line in enumerate(lines[1:]):
        if len(line) != len(names):
            raise DCRError(
                f"{path}: row {number} has {'more' if len(line) > len(names) else 'fewer'} fields than the header "
                f"({', '.join(names)}). Quote fields that hold a {delimiter!r}."
            )
    return [dict(zip(names, line, strict=True)) for line in lines[1:]]


def _json(text: str, path: Path) -> list:
    """The items of a JSON array, of JSON lines, or of {"instructions": [...]}."""
    problem, line = "", 0
    if text.lstrip()[:1] == "[":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DCRError(f"{path}: broken JSON ({error}). Write it again.") from error
    items = []
    for line, content in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        if content.strip():
            try:
                items.append(json.loads(content))
            except (ValueError, RecursionError) as error:
                problem = getattr(error, "msg", str(error))
                break
    if problem or len(items) == 1:
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            whole = None
        if isinstance(whole, dict) and isinstance(whole.get("instructions"), list):
            return whole["instructions"]
    if problem:
        raise DCRError(
            f"{path}: line {line} is not JSON ({problem}). Write one object a line, or one array of objects."
        )
    return items


def as_rows(items: Sequence, where: object, unit: str) -> list[Row]:
    """Items that are all texts, or all rows, as rows. Raises DCRError for the first that is neither."""
    wanted: type = str if len(items) and isinstance(items[0], str) else dict
    for number, item in enumerate(items):
        if not isinstance(item, wanted):
            kind = "null" if item is None else type(item).__name__
            raise DCRError(
                f"{where}: {unit} {number} is {kind}, not a {'text' if wanted is str else 'row'}. Give texts, or rows "
                "with a field 'text'."
            )
    return [{"text": i} if wanted is str else {str(k): v for k, v in i.items()} for i in items]


# ---- rows → table ----------------------------------------------------------------------------------------------


def as_table(
    rows: Sequence[Row], where: object, *, label: str = "", origin: str, answers: bool = False
) -> pd.DataFrame:
    """Validated prompt table. label: class of rows that name none. Raises DCRError with place, row and mend."""
    if not rows:
        raise DCRError(f"{where}: no rows. It is empty or truncated; write it again.")
    seen: dict[str, int] = {}
    done = []
    for number, row in enumerate(rows):
        at = f"{where}: row {number}"
        if "text" not in row:
            raise DCRError(
                f"{where}: column 'text' is missing (row {number} has {', '.join(row) or 'nothing'}). Add it."
            )
        text = _string(row, "text", at)
        if not text:
            raise DCRError(f"{at}: text is empty. Fill it or delete the row.")
        response = _string(row, "response", at)
        if answers and (not response or response.lower() in NOT_AN_ANSWER):
            raise DCRError(
                f"{at} ({text[:40]!r}) has no response. Alignment needs an answer (for toxic prompts a refusal) in "
                "the column 'response': fill it or delete the row."
            )
        its = _string(row, "label", at, numbers=True) or label
        if its and its not in LABELS:
            raise DCRError(f"{at}: label {its!r} is unknown; use {', '.join(LABELS)}.")
        form = _string(row, "form", at) or form_of(text)
        if form not in FORMS:
            raise DCRError(f"{at}: form {form!r} is unknown; use {', '.join(FORMS)}.")
        key = _string(row, "id", at, numbers=True) or f"{origin}-{number:04d}"
        if seen.setdefault(key, number) != number:
            raise DCRError(f"{at}: id {key!r} stands already in row {seen[key]}. Make ids unique.")
        free = {
            name: _string(row, name, at, numbers=True)
            for name in ("source", "category", "request", "role", "pair_id")
        }
        fixed = {"id": key, "text": text, "label": its, "form": form, "response": response}
        done.append({**row, **free, **fixed, "source": free["source"] or origin})
    extra = [c for c in done[0] if c not in COLUMNS]
    return pd.DataFrame(done)[[*COLUMNS, *extra]]


def _string(row: Row, name: str, at: str, *, numbers: bool = False) -> str:
    """The stripped text of a field, "" where it is missing. numbers: a number is as good."""
    value = row.get(name)
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    if numbers and isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        return str(int(value) if float(value).is_integer() else value)
    if not isinstance(value, str):
        raise DCRError(f"{at}: {name} is {type(value).__name__}, not text. Write it as text.")
    if re.search("[\ud800-\udfff]", value):
        raise DCRError(f"{at}: {name} holds half a character (a lone surrogate). Mend the text.")
    return str(value).strip()
