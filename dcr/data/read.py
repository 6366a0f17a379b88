"""Anything that holds prompts, as one typed prompt table: files, frames, lists, hub tables.

Broken input is refused with the file, the row (the first is row 0) and the mend.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dcr.data.forms import FORMS, form_of
from dcr.data.pairs import requests_of
from dcr.data.rows import SUFFIXES, Row, as_rows, read_rows, records, short
from dcr.errors import DCRError

log = logging.getLogger("dcr")
FREE = ("source", "category", "request", "role", "pair_id")  # any text or number, "" where missing
COLUMNS = ("id", "text", "label", "form", *FREE, "response")
LABELS = ("toxic", "seemingly_toxic", "general")
MISSING = ("", "nan", "null", "none", "<na>")  # a missing value, and what it is printed as
HUB = re.compile(
    r"(?P<path>[\w.-]+/(?P<stem>[\w.-]+))(?::(?P<config>[\w.-]+))?"
    r"@(?P<revision>[\w.-]+)(?:#(?P<split>[\w.-]+))?"
)


def prompts_of(
    prompts: Any,
    *,
    what: str = "prompts",
    label: str = "",
    others: bool = False,
    answers: bool = False,
) -> pd.DataFrame:
    """The prompt table (columns `COLUMNS`, and any more that came along) of what holds prompts.

    prompts: a list, tuple, array or Series of texts; a list of rows; a DataFrame; a
        `datasets.Dataset`; the path of a table (`SUFFIXES`, also .gz); or a hub table as
        "owner/name:config@revision#split".
    what: its name in messages and ids. answers: every row must have a response.
    label: the class it is given as; of a table with several classes only its rows are taken, or
        with `others` all.
    Raises DCRError naming the file or parameter, the row and the mend.
    """
    rows, where, origin = _rows_of(prompts, what)
    table = as_table(rows, where, label=label, origin=origin, answers=answers)
    mine = table["label"] == label
    if label and not mine.any():
        found = ", ".join(table["label"].unique())
        raise DCRError(f"{where}: given as {label}, but its rows are labelled {found}.")
    if label and not others and not mine.all():
        log.info("%s: %d of %d rows are labelled %s", where, mine.sum(), len(table), label)
        table = table[mine].reset_index(drop=True)
    if (table["request"] == "").any():
        table["request"] = requests_of(table)
    return table


def _rows_of(value: Any, what: str) -> tuple[list[Row], str, str]:
    """(rows, name for messages, stem of ids) of a value of any accepted type."""
    kind = type(value)
    if isinstance(value, Path):
        return read_rows(value), str(value), value.name.split(".")[0]
    if isinstance(value, str):
        path = file_of(value)
        if path or value.lower().removesuffix(".gz").endswith(SUFFIXES):
            return _rows_of(path or Path(value), what)
        if match := HUB.fullmatch(value):
            return _from_hub(match), value, match["stem"]
        raise DCRError(
            f"{what}: one string ({value[:40]!r}) stands where a list of prompts is meant. Give "
            f"[text], the path of a table ({', '.join(SUFFIXES)}) or a hub's owner/name@revision."
        )
    if kind.__module__.startswith("datasets.") and kind.__name__ == "Dataset":
        value = _with_class_names(value)
    if isinstance(value, pd.DataFrame):
        return records(value, what), what, what
    if isinstance(value, (pd.Series, pd.Index, np.ndarray)) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        hint = " Name one split of it." if kind.__name__ == "DatasetDict" else ""
        raise DCRError(
            f"{what}: {kind.__name__} holds no prompts. Give a list of texts or of rows, a Series, "
            f"a DataFrame, a datasets.Dataset or a path.{hint}"
        )
    return as_rows(value, what, "item"), what, what


def file_of(name: str) -> Path | None:
    """The file that a text names ("~" is the home folder); None where it names none."""
    try:
        path = Path(name).expanduser()
        return path if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # a text that can be no name
        return None


def _with_class_names(data: Any) -> pd.DataFrame:
    """A `datasets.Dataset` as a frame; integers of a ClassLabel feature become their names."""
    frame = data.to_pandas()
    for name, feature in data.features.items():
        if type(feature).__name__ == "ClassLabel":
            frame[name] = [None if pd.isna(v) else feature.int2str(int(v)) for v in frame[name]]
    return frame


def _from_hub(match: re.Match) -> list[Row]:
    try:
        import datasets

        split = match["split"] or "train"
        data = datasets.load_dataset(
            match["path"], match["config"], revision=match["revision"], split=split
        )
    except Exception as error:  # whatever the hub client raises
        raise DCRError(
            f"{match[0]}: could not be fetched ({short(error)}). Check the name, the split, the "
            "network and, for gated sets, HF_TOKEN."
        ) from error
    return records(_with_class_names(data), match[0])


# ---- rows → table -----------------------------------------------------------------------------


def as_table(
    rows: Sequence[Row], where: object, *, label: str = "", origin: str, answers: bool = False
) -> pd.DataFrame:
    """Validated prompt table; label: class of rows that name none. Raises DCRError."""
    if not rows:
        raise DCRError(f"{where}: no rows. It is empty or truncated; write it again.")
    seen: dict[str, int] = {}
    done = []
    for number, row in enumerate(rows):
        at = f"{where}: row {number}"
        if "text" not in row:
            found = ", ".join(row) or "nothing"
            raise DCRError(f"{at}: column 'text' is missing (found {found}). Add it.")
        text = _text(row, "text", at)
        if text.lower() in MISSING:
            raise DCRError(f"{at}: text is empty. Fill it or delete the row.")
        at = f"{at} ({text[:40]!r})"
        full = {"text": text} | {n: _text(row, n, at) for n in ("response", "form")}
        full |= {n: _text(row, n, at, True) for n in FREE}
        full["id"] = _text(row, "id", at, True) or f"{origin}-{number:04d}"
        full["label"] = _text(row, "label", at, True) or label
        full["form"] = full["form"] or form_of(text)
        full["source"] = full["source"] or origin
        if answers and full["response"].lower() in MISSING:
            raise DCRError(
                f"{at} has no response. Alignment needs an answer (for toxic prompts a refusal) in "
                "the column 'response': fill it or delete the row."
            )
        for name, known in (("label", (*LABELS, "")), ("form", FORMS)):
            if full[name] not in known:
                raise DCRError(
                    f"{at}: {name} {full[name]!r} is unknown; use {', '.join(filter(None, known))}."
                )
        if (first := seen.setdefault(full["id"], number)) != number:
            raise DCRError(
                f"{at}: id {full['id']!r} stands already in row {first}. Make it unique."
            )
        done.append({**row, **full})
    table = pd.DataFrame(done)
    return table[[*COLUMNS, *(c for c in table if c not in COLUMNS)]]


def _text(row: Row, name: str, at: str, numbers: bool = False) -> str:
    """The stripped text of a field, "" where it is missing. numbers: a number is as good."""
    value = row.get(name)
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    if numbers and isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        whole = isinstance(value, (float, np.floating)) and value.is_integer()
        return str(int(value) if whole else value)
    if not isinstance(value, str):
        raise DCRError(f"{at}: {name} is {type(value).__name__}, not text. Write it as text.")
    if re.search("[\ud800-\udfff]", value):
        raise DCRError(f"{at}: {name} holds half a character (a lone surrogate). Mend the text.")
    return str(value).strip()
