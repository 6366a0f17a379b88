"""How a row of an upstream file becomes rows of ours; a column that is missing is a KeyError."""

from collections.abc import Callable

from dcr.data.rows import Row


def _plain(row: Row, columns: dict[str, str]) -> list[Row]:
    columns = {"text": "text"} | columns
    # A part or a copy may lack the category.
    return [{o: row.get(t, "") if o == "category" else row[t] for o, t in columns.items()}]


def _alpaca(row: Row, columns: dict[str, str]) -> list[Row]:
    parts = [str(row["instruction"]), str(row.get("input") or "").strip()]
    return [{"text": "\n\n".join(filter(None, parts)), "response": row["output"]}]


def _red_team(row: Row, columns: dict[str, str]) -> list[Row]:
    first = str(row["transcript"]).split("Assistant:")[0].replace("Human:", "").strip()
    tags = row.get("tags") or [""]
    return [{"text": first, "category": str(tags[0])}] if first else []


def _completions(row: Row, columns: dict[str, str]) -> list[Row]:
    label = "toxic" if row["type"].startswith("contrast") else "seemingly_toxic"
    marks = ("completion", "annotation_1", "annotation_2", "agreement", "final_label")
    about = {"text": row["prompt"], "category": row["type"], "label": label}
    return [about | {k: row[k] for k in marks}]


def _user_study(row: Row, columns: dict[str, str]) -> list[Row]:
    """A row a model: model, completion, answers = share of people who say that it answers."""
    tail = " answer rate"
    about = {"text": row["input"], "category": row["classification"]}
    return [
        about | {"model": m, "completion": row[m], "answers": float(row[m + tail])}
        for m in (c.removesuffix(tail) for c in row if c.endswith(tail))
    ]


SHAPES: dict[str, Callable[[Row, dict[str, str]], list[Row]]] = {
    "": _plain,
    "alpaca": _alpaca,
    "red_team": _red_team,
    "completions": _completions,
    "user_study": _user_study,
}
