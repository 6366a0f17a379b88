"""Whatever holds prompts is read rightly or refused in one sentence with place, row and mend."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcr.data.files import append_jsonl, read_jsonl
from dcr.data.read import COLUMNS, prompts_of
from dcr.errors import DCRError

ROWS = '{"text": "Kill the lights"}\n{"text": "Is it far?"}\n'
TWO = ["Kill the lights", "Is it far?"]
J = json.dumps

# name, content → the texts that are read. A refused one stands in REFUSED with its message.
READ = {
    "csv": ("u.csv", "text\nKill the lights\nIs it far?\n", TWO),
    "capital suffix": ("u.CSV", "text\nKill the lights\nIs it far?\n", TWO),
    "tsv": ("u.tsv", "text\tlabel\nKill the lights\ttoxic\nIs it far?\ttoxic\n", TWO),
    "semicolons": ("u.csv", "text;label\nKill the lights;toxic\nIs it far?;toxic\n", TWO),
    "tabs in a csv": ("u.csv", "text\tid\nKill the lights\t1\nIs it far?\t2\n", TWO),
    "byte order mark": ("u.csv", "\ufefftext\nKill the lights\nIs it far?\n", TWO),
    "crlf": ("u.csv", "text\r\nKill the lights\r\nIs it far?\r\n", TWO),
    "cr alone": ("u.csv", "text\rKill the lights\rIs it far?\r", TWO),
    "quoted newline": ("u.csv", 'text\n"Kill\nthe lights"\n', ["Kill\nthe lights"]),
    "quoted comma": ("u.csv", 'text\n"Kill, then sleep"\n', ["Kill, then sleep"]),
    "spaces in the header": ("u.csv", " text , label\nGo,toxic\n", ["Go"]),
    "blank lines": ("u.csv", "text,id\nGo,1\n\n", ["Go"]),
    "id 0": ("u.csv", "id,text\n0,Go\n1,Stay\n", ["Go", "Stay"]),
    "utf-16": ("u.csv", "text\nKill the lights\nIs it far?\n".encode("utf-16"), TWO),
    "gz": ("u.jsonl.gz", gzip.compress(ROWS.encode()), TWO),
    "jsonl": ("u.jsonl", ROWS, TWO),
    "jsonl named json": ("u.json", ROWS, TWO),
    "jsonl crlf": ("u.jsonl", ROWS.replace("\n", "\r\n"), TWO),
    "jsonl cr": ("u.jsonl", ROWS.replace("\n", "\r"), TWO),
    "jsonl with bom": ("u.jsonl", "\ufeff" + ROWS, TWO),
    "one row": ("u.jsonl", '{"text": "Go"}', ["Go"]),
    "line separators": (
        "u.jsonl",
        '{"text": "a\u2028b\u2029c\u0085d"}\n{"text": "e"}\n',
        ["a\u2028b\u2029c\u0085d", "e"],
    ),
    "json array": ("u.json", J([{"text": t} for t in TWO]), TWO),
    "pretty json": ("u.json", json.dumps([{"text": t} for t in TWO], indent=2), TWO),
    "pretty json named jsonl": ("u.jsonl", json.dumps([{"text": t} for t in TWO], indent=2), TWO),
    "array of texts": ("u.json", J(TWO), TWO),
    "lines of texts": ("u.jsonl", '"Kill the lights"\n"Is it far?"\n', TWO),
    "instructions": ("u.json", J({"instructions": TWO, "inputs": []}), TWO),
    "escaped pair of surrogates": ("u.jsonl", '{"text": "\\ud83d\\ude00 Go"}', ["😀 Go"]),
    "txt": ("u.txt", "Kill the lights\n\nIs it far?\n", TWO),
    "spaces around": ("u.jsonl", '{"text": "  Go \\n"}', ["Go"]),
}
REFUSED = {
    "no text": ("u.csv", "prompt\nGo\n", "row 0: column 'text' is missing .found prompt."),
    "text spelt Text": ("u.csv", "Text\nGo\n", "column 'text' is missing .found Text."),
    "empty text": ("u.csv", "text,id\nGo,1\n ,2\n", "row 1: text is empty"),
    "nan text": ("u.csv", "text,id\nGo,1\nnan,2\n", "row 1: text is empty"),
    "null text": ("u.jsonl", '{"text": "Go"}\n{"text": null}', "row 1: text is empty"),
    "NaN text": ("u.jsonl", '{"text": NaN}', "row 0: text is empty"),
    "number as text": ("u.jsonl", '{"text": 5}', "row 0: text is int, not text"),
    "list as text": ("u.jsonl", '{"text": ["a"]}', "row 0: text is list, not text"),
    "lone surrogate": ("u.jsonl", '{"text": "a\\ud800"}', "row 0: text holds half a char"),
    "number as answer": ("u.jsonl", '{"text": "a", "response": 1}', "row 0 .'a'.: response is int"),
    "wrong label": (
        "u.csv",
        "text,label\nGo,bad\n",
        "row 0 .'Go'.: label 'bad' is unknown; use toxic",
    ),
    "label 1": ("u.csv", "text,label\nGo,1\n", "row 0 .'Go'.: label '1' is unknown; use toxic"),
    "label 0": ("u.jsonl", '{"text": "a", "label": 0}', "row 0 .'a'.: label '0' is unknown"),
    "wrong form": ("u.csv", "text,form\nGo,order\n", "row 0 .'Go'.: form 'order' is unknown"),
    "id twice": ("u.csv", "id,text\n1,a\n1,b\n", "row 1 .'b'.: id '1' stands already in row 0"),
    "row of null": ("u.jsonl", '{"text": "a"}\nnull\n', "row 1 is null, not a row"),
    "row of a number": ("u.jsonl", '{"text": "a"}\n7\n', "row 1 is int, not a row"),
    "row of a text": ("u.jsonl", '{"text": "a"}\n"b"\n', "row 1 is str, not a row"),
    "texts and a row": ("u.json", '["a", {"text": "b"}]', "row 1 is dict, not a text"),
    "numbers": ("u.json", "[1, 2]", "row 0 is int, not a row"),
    "bad json": ("u.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "pretty objects": ("u.jsonl", '{\n "text": "a"\n}\n{\n "text": "b"\n}', "line 1 is not JSON"),
    "broken array": ("u.json", '[{"text": "a"},\n', "line 1 is not JSON"),
    "deep json": ("u.json", "[" * 100_000, "line 1 is not JSON"),
    "too many fields": ("u.csv", "text,label\na,toxic,extra\n", "row 0 has more fields"),
    "too few fields": ("u.csv", "text,label\na,toxic\nb\n", "row 1 has fewer fields"),
    "unquoted comma": ("u.csv", "text\nKill, then sleep\n", "row 0 has more fields.*Quote"),
    "open quote": ("u.csv", 'text,label\n"a,toxic\n', "broken CSV"),
    "column twice": ("u.csv", "text,text\na,b\n", "a column stands twice .text, text."),
    "header alone": ("u.csv", "text,label\n", "no rows"),
    "empty csv": ("u.csv", "", "no rows"),
    "empty jsonl": ("u.jsonl", "\n\n", "no rows"),
    "empty array": ("u.json", "[]", "no rows"),
    "latin-1": ("u.csv", "text\ncaf\xe9\n".encode("latin-1"), r"line 2 is not UTF-8\. Save"),
    "torn utf-16": ("u.csv", "text\na\n".encode("utf-16")[:-1], "is not UTF-16"),
    "utf-16 without a mark": ("u.csv", "text\na\n".encode("utf-16-le"), "line 1 holds a zero"),
    "not gzip": ("u.jsonl.gz", b"plain", "cannot be read.*Give the path"),
    "torn gzip": ("u.jsonl.gz", gzip.compress(ROWS.encode())[:-9], "cannot be read"),
    "not parquet": ("u.parquet", b"PAR1 no", "no readable Parquet"),
    "excel": ("u.xlsx", b"PK", "suffix '.xlsx' is unknown; use .csv"),
    "no suffix": ("u", b"text", "suffix '' is unknown"),
}


def write(folder, name, content):
    path = folder / name
    path.write_bytes(
        content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    )
    return path


@pytest.mark.parametrize("case", READ)
def test_odd_files_are_read_rightly(case, tmp_path):
    name, content, texts = READ[case]
    table = prompts_of(write(tmp_path, name, content))
    assert table["text"].tolist() == texts and list(table.columns[: len(COLUMNS)]) == list(COLUMNS)
    assert not table[list(COLUMNS)].isna().any().any()


@pytest.mark.parametrize("case", REFUSED)
def test_broken_files_are_refused_with_place_and_mend(case, tmp_path):
    name, content, message = REFUSED[case]
    path = write(tmp_path, name, content)
    with pytest.raises(DCRError, match=message) as caught:
        prompts_of(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_lead_nowhere(tmp_path):
    for path, message in (
        (tmp_path / "none.csv", "No such file"),
        (tmp_path / ("x" * 300 + ".csv"), "File name too long"),
        (write(tmp_path, "a.csv", "text\n") / "b.csv", "Not a directory"),
    ):
        with pytest.raises(DCRError, match=message):
            prompts_of(str(path))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DCRError, match="Is a directory"):
        prompts_of(tmp_path / "folder.csv")


def held(value):
    return prompts_of(value)["text"].tolist()


def test_everything_that_holds_texts_works_like_a_list(tmp_path):
    import datasets

    frame = pd.DataFrame({"text": TWO, "label": ["toxic", "toxic"]}, index=[7, 7])
    frame.to_parquet(tmp_path / "u.parquet")
    classes = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["toxic", "general"])}
    )
    typed = datasets.Dataset.from_dict({"text": TWO, "label": [0, 1]}, features=classes)
    for value in (
        TWO,
        tuple(TWO),
        np.array(TWO),
        np.array(TWO, dtype=object),
        pd.Series(TWO, index=[3, 3]),
        pd.Series(TWO, dtype="category"),
        pd.Series(TWO, dtype="string"),
        pd.Index(TWO),
        [{"text": t} for t in TWO],
        frame,
        tmp_path / "u.parquet",
        typed,
    ):
        assert held(value) == TWO
    assert prompts_of(typed)["label"].tolist() == ["toxic", "general"]
    assert prompts_of(TWO, what="mine")["id"].tolist() == ["mine-0000", "mine-0001"]


@pytest.mark.parametrize(
    "value, message",
    [
        ("How do I kill time?", "prompts: one string .'How do I kill time.'. stands where a list"),
        (b"text", "bytes holds no prompts"),
        (None, "NoneType holds no prompts"),
        (5, "int holds no prompts"),
        ({"text": TWO}, "dict holds no prompts"),
        ({"a", "b"}, "set holds no prompts"),
        ((t for t in TWO), "generator holds no prompts"),
        (np.array([TWO]), "ndarray holds no prompts"),
        ([], "no rows"),
        (pd.DataFrame({"text": []}), "no rows"),
        (["a", None], "item 1 is null, not a text"),
        (["a", float("nan")], "item 1 is float, not a text"),
        (["a", ["b"]], "item 1 is list, not a text"),
        (["a", ""], "row 1: text is empty"),
        (pd.Series(["a", pd.NA]), "item 1 is"),
        (pd.DataFrame({"text": ["a", None]}), "row 1: text is empty"),
        (pd.DataFrame({"text": ["a", np.nan]}), "row 1: text is empty"),
        (pd.DataFrame({"text": [1, 2]}), "row 0: text is int, not text"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), "a column stands twice"),
        (pd.DataFrame({"prompt": ["a"]}), "column 'text' is missing .found prompt."),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_what_holds_no_prompts_is_refused_by_name(value, message):
    with pytest.raises(DCRError, match=message):
        prompts_of(value)


def test_a_split_of_a_dataset_dict_must_be_named():
    import datasets

    with pytest.raises(DCRError, match="DatasetDict holds no prompts.*Name one split"):
        prompts_of(datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TWO})}))


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, "", "  ", "nan", "NaN", "null", "None"])
def test_a_missing_answer_is_refused_with_its_row(missing, tmp_path):
    frame = pd.DataFrame({"text": TWO, "response": ["No.", missing]}, dtype=object)
    lists = [dict(zip(frame.columns, r, strict=True)) for r in frame.itertuples(index=False)]
    frame.to_csv(tmp_path / "u.csv", index=False)
    frame.to_json(tmp_path / "u.jsonl", orient="records", lines=True)
    for value in (frame, lists, tmp_path / "u.csv", tmp_path / "u.jsonl"):
        with pytest.raises(DCRError, match=r"row 1 .'Is it far\?'. has no response.*fill it"):
            prompts_of(value, what="toxic", answers=True)
        assert prompts_of(value)["response"].iloc[0] == "No."  # where answers are not asked for


def test_a_table_of_two_classes_is_split_by_its_labels(tmp_path):
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": ["toxic", "general", "toxic"]})
    assert prompts_of(frame, label="toxic")["text"].tolist() == ["a", "c"]
    assert prompts_of(frame, label="general")["text"].tolist() == ["b"]
    with pytest.raises(DCRError, match="mine: given as seemingly_toxic, but.* toxic, general"):
        prompts_of(frame, what="mine", label="seemingly_toxic")
    assert set(prompts_of(TWO, label="toxic")["label"]) == {"toxic"}


def test_categories_that_are_missing_lose_no_rows():
    frame = pd.DataFrame({"text": TWO, "category": [np.nan, "x"], "id": [0, 1.0]})
    table = prompts_of(frame)
    assert table["category"].tolist() == ["", "x"] and table["id"].tolist() == ["0", "1"]
    assert table.groupby("category").size().sum() == 2


def test_numbers_of_any_size_are_ids():
    """A float holds no whole number above 2 ** 1024."""
    ids = [10**400, 2**53 + 1, 1e3, np.float32(2), np.int64(7), 0.5]
    wanted = ["1" + "0" * 400, "9007199254740993", "1000", "2", "7", "0.5"]
    assert prompts_of([{"text": "Go", "id": i} for i in ids])["id"].tolist() == wanted


def test_hub_tables_are_read_at_their_revision(monkeypatch):
    import datasets

    def load_dataset(name, config, revision, split):
        if (name, config, revision, split) != ("a/b", "c", "0123abc", "test"):
            raise ValueError("Unknown\nrevision")
        return datasets.Dataset.from_dict({"text": TWO})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert prompts_of("a/b:c@0123abc#test")["id"].tolist() == ["b-0000", "b-0001"]
    with pytest.raises(
        DCRError, match="a/b@main: could not be fetched .ValueError: Unknown revision.*HF_TOKEN"
    ):
        prompts_of("a/b@main")


def test_own_answers_with_line_separators_are_read_and_resumed(tmp_path):
    path, row = tmp_path / "answers.jsonl", {"response": "a\u2028b\u2029c\u0085d\re"}
    append_jsonl(path, row)
    path.write_bytes(path.read_bytes() + '{"response": "é'.encode()[:-1])  # killed in a character
    assert read_jsonl(path) == [row]
    append_jsonl(path, row)
    assert read_jsonl(path) == [row, row]


# ---- fuzzing: nothing but DCRError --------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text", "label", "response", "id", "x"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
suffixes = st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet", "txt", "csv.gz", "JSON"])
contents = (
    st.binary(max_size=80)
    | st.text(alphabet='text,label;\t\n\r"\\{}[]:\u2028\ufeff\0é', max_size=60).map(
        lambda t: t.encode()
    )
    | st.lists(json_values, max_size=3).map(lambda rows: "\n".join(map(J, rows)).encode())
    | json_values.map(lambda value: J(value).encode())
    | st.text(max_size=40).map(lambda t: ("text\n" + t).encode("utf-8", "surrogatepass"))
)


def check(folder, suffix, content):
    path = folder / f"u.{suffix}"
    path.write_bytes(content)
    try:
        table = prompts_of(path, label="toxic", answers=len(content) % 2 == 0)
    except DCRError as error:
        assert str(path) in str(error)
    else:
        assert len(table) and table["text"].str.strip().ne("").all() and table["id"].is_unique


FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=150, **FUZZ)
@given(suffixes, contents)
def test_no_file_brings_another_error(tmp_path, suffix, content):
    check(tmp_path, suffix, content)


@settings(max_examples=100, **FUZZ)
@given(json_values)
def test_no_value_brings_another_error(value):
    try:
        prompts_of(value)
    except DCRError:
        pass


def test_a_column_that_only_later_rows_have_comes_along():
    table = prompts_of([{"text": "Sing."}, {"text": "Dance.", "kind": "x"}])
    assert table["kind"].tolist()[1] == "x"
