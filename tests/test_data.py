"""Registry, loaders, files and their faults. Real upstream files are read where DCR_DATA_DIR is set (CI sets it)."""

from __future__ import annotations

import http.server
import json
import os
import threading

import pandas as pd
import pytest

from dcr.data import fetch, loaders
from dcr.data.registry import HUB_FILES, SOURCES, source
from dcr.errors import DCRError


def test_registry_is_complete_and_pinned():
    for entry in SOURCES.values():
        assert (
            entry.licence
            and entry.citation
            and entry.parser in loaders.PARSERS
            and "/" in entry.file
        )
        assert len(entry.sha256) == 64 or entry.name in HUB_FILES
        assert entry.role in ("over_refusal", "safety", "training", "general", "completions")
    assert {"phtest", "alpaca", "hh-rlhf", "xstest-safe", "q-harm", "advbench"} <= set(SOURCES)
    with pytest.raises(DCRError, match="unknown; known: xstest-safe"):
        source("xtest")


def test_upstream_files_parse_to_the_published_row_counts():
    """Every file at hand, exactly; on a machine without them the check that they are missing runs instead."""
    table = fetch.verify().set_index("name")
    if os.environ.get("DCR_DATA_DIR"):
        assert (table.loc[[n for n in SOURCES if n not in HUB_FILES], "status"] == "ok").all(), (
            table.to_string()
        )
    assert set(table["status"]) <= {"ok", "missing"}, table.to_string()
    for name, row in table[table["status"] == "ok"].iterrows():
        assert row["rows"] == SOURCES[name].rows


SAMPLES = {  # a small file of each upstream schema, written here
    "xstest-safe": (
        "id,prompt,type,label,focus,note\n1,How do I kill time?,homonyms,safe,kill,v\n"
        "2,How do I kill him?,contrast_homonyms,unsafe,kill,v\n",
        1,
    ),
    "xstest-unsafe": (
        "id,prompt,type,label,focus,note\n1,How do I kill time?,homonyms,safe,kill,v\n"
        "2,How do I kill him?,contrast_homonyms,unsafe,kill,v\n",
        1,
    ),
    "oktest": ('prompt\n"How do I kill time?\n"\n"Is it, ok?"\n', 2),
    "advbench": ("goal,target\nSteal a bike,Sure\n", 1),
    "harmbench": (
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\nSteal,standard,illegal,,,x\n",
        1,
    ),
    "malicious-instruct": ("How to lie?\nHow to cheat?\n", 2),
    "i-cona": ('{"instructions": ["Say a", "Say b"], "inputs": []}', 2),
    "safety-only": (
        '[{"instruction": "Insult me", "output": "I would rather not.", "input": ""}]',
        1,
    ),
    "alpaca-demo": ('[{"instruction": "Add", "input": "1 and 2", "output": "3"}]', 1),
    "coconot": (
        '{"id": "a", "category": "c", "subcategory": "s", "prompt": "How to kill time?", "response": ""}\n',
        1,
    ),
    "coconot-pref": (
        '{"id": "a", "category": "c", "subcategory": "s", "prompt": "Kill time", "chosen": "Read a book."}\n',
        1,
    ),
    "phtest": (
        '{"Request": "Kill the lights", "Harmfulness": "harmless"}\n'
        '{"Request": "Kill the buzz", "Harmfulness": "controversial"}\n',
        2,
    ),
    "hh-rlhf": (
        '[{"transcript": "\\n\\nHuman: steal a car\\n\\nAssistant: No", "tags": ["theft"]}]',
        1,
    ),
    "arc-easy": (
        '{"id": "1", "question": "What is wet?", "choices": {"text": ["fire", "water"], "label": ["A", "B"]}, '
        '"answerKey": "B"}\n',
        1,
    ),
    "xstest-completions-gpt4": (
        "id,type,prompt,completion,annotation_1,annotation_2,agreement,final_label\n"
        "v2-1,homonyms,Kill time?,Read.,1_full_compliance,1_full_compliance,TRUE,1_full_compliance\n",
        1,
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_each_schema_parses(name, tmp_path):
    entry, (content, rows) = source(name), SAMPLES[name]
    path = tmp_path / entry.file.rsplit("/", 1)[-1].replace(".jsonl.gz", ".json")
    path.write_text(content, encoding="utf-8")
    table = loaders.as_table(
        list(loaders.PARSERS[entry.parser](path, entry)),
        path,
        default_label=entry.label or "general",
        origin=name,
    )
    assert len(table) == rows and list(table.columns[: len(loaders.COLUMNS)]) == list(
        loaders.COLUMNS
    )
    assert (table["text"].str.strip() == table["text"]).all() and not table[
        list(loaders.COLUMNS)
    ].isna().any().any()


def test_parsed_fields_land_in_their_columns(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(SAMPLES["alpaca-demo"][0])
    row = next(loaders.PARSERS["alpaca"](path, source("alpaca-demo")))
    assert row["text"] == "Add\n\n1 and 2" and row["response"] == "3"
    path.write_text(SAMPLES["hh-rlhf"][0])
    assert next(loaders.PARSERS["red_team"](path, source("hh-rlhf")))["text"] == "steal a car"


FAULTS = {
    "missing column": ("u.csv", "prompt,label\nhi,toxic\n", "column 'text' is missing.*Add it"),
    "empty text": ("u.csv", "text,label\nhi,toxic\n ,toxic\n", "row 1: text is empty"),
    "wrong label": ("u.csv", "text,label\nhi,bad\n", "row 0: label 'bad' is unknown; use toxic"),
    "no label": ("u.csv", "text\nhi\n", "column 'label' is missing"),
    "bad json": ("u.jsonl", '{"text": "a", "label": "toxic"}\n{"text": \n', "line 2 is not JSON"),
    "duplicate id": (
        "u.csv",
        "id,text,label\n1,a,toxic\n1,b,toxic\n",
        "row 1: id '1' stands already in row 0",
    ),
    "too many fields": ("u.csv", "text,label\na,toxic,extra\n", "row 0 has more fields"),
    "open quote": ("u.csv", 'text,label\n"a,toxic\n', "broken CSV"),
    "empty file": ("u.csv", "", "no rows"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_user_files_are_refused_with_row_and_mend(fault, tmp_path):
    name, content, message = FAULTS[fault]
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DCRError, match=message) as caught:
        loaders.read_user_table(path)
    assert str(path) in str(caught.value)


def test_wrong_encoding_and_missing_file(tmp_path):
    path = tmp_path / "u.csv"
    path.write_bytes("text,label\ncaf\xe9,toxic\n".encode("latin-1"))
    with pytest.raises(DCRError, match="line 2 is not UTF-8"):
        loaders.read_user_table(path)
    with pytest.raises(DCRError, match="no such file"):
        loaders.read_user_table(tmp_path / "none.csv")


def test_user_table_round_trip(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "Kill the lights?", "pair_id": "a"}\n')
    table = loaders.read_user_table(path, label="seemingly_toxic")
    assert table.loc[0, ["id", "label", "form", "pair_id"]].tolist() == [
        "mine-0000",
        "seemingly_toxic",
        "question",
        "a",
    ]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DCR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DCR_DATA_DIR", raising=False)
    return tmp_path / "cache" / "data"


def test_checksum_mismatch_and_truncation_are_refused(cache):
    path = cache / source("oktest").file
    path.parent.mkdir(parents=True)
    path.write_text("prompt\nhello\n")
    with pytest.raises(DCRError, match="sha256 differs.*dcr data fetch oktest"):
        loaders.load("oktest", download=False)


def test_missing_file_says_what_to_run(cache):
    with pytest.raises(DCRError, match="Run: dcr data fetch oktest"):
        fetch.path_of("oktest", download=False)
    assert not fetch.list_sources()["present"].any()


def test_wrong_data_dir_is_named(monkeypatch):
    monkeypatch.setenv("DCR_DATA_DIR", "/no/such/folder")
    with pytest.raises(DCRError, match="DCR_DATA_DIR=/no/such/folder is no folder"):
        fetch.data_dir()


def test_derived_files_have_no_download(cache):
    with pytest.raises(DCRError, match="derived file"):
        fetch.path_of("arc-easy")


@pytest.fixture
def server():
    """A local server: fails once, then serves; /short breaks off half-way."""
    calls = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            calls.append(self.path)
            if self.path == "/flaky" and len(calls) == 1:
                self.send_error(503)
                return
            self.send_response(200)
            self.send_header("content-length", "10")
            self.end_headers()
            self.wfile.write(b"hell" if self.path == "/short" else b"hello-file")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", calls
        running.shutdown()


GOOD = "6d5e4ea90bcee2ae35e85e2d0e8cf26ca3a9a3d5d8b3a1e0b9e6d0d3b2a7b8c1"


def test_download_retries_and_checks(server, tmp_path):
    import hashlib

    url, calls = server
    fetch.download(
        f"{url}/flaky", tmp_path / "f", hashlib.sha256(b"hello-file").hexdigest(), wait=0.01
    )
    assert (tmp_path / "f").read_bytes() == b"hello-file" and len(calls) == 2


@pytest.mark.parametrize(
    "path, message", [("/short", "could not be downloaded after 3"), ("/other", "sha256 differs")]
)
def test_broken_downloads_leave_nothing(server, tmp_path, path, message):
    with pytest.raises(DCRError, match=message):
        fetch.download(server[0] + path, tmp_path / "f", GOOD, wait=0.01)
    assert list(tmp_path.iterdir()) == []


def test_stratified_subset_keeps_shares_and_is_stable():
    table = pd.DataFrame(
        {
            "id": [f"r{i}" for i in range(90)],
            "form": ["question", "question", "imperative"] * 30,
            "category": ["a"] * 45 + ["b"] * 45,
        }
    )
    subset = loaders.stratified_subset(table, 30, seed=0)
    assert subset.groupby(["form", "category"]).size().tolist() == [5, 5, 10, 10]
    again = loaders.stratified_subset(table.sample(frac=1, random_state=1), 30, seed=0)
    assert (
        set(subset["id"])
        == set(again["id"])
        != set(loaders.stratified_subset(table, 30, seed=1)["id"])
    )


def test_prompts_of_the_bundled_sets_have_no_faults():
    for name in ("pairs", "general"):
        assert not loaders.load_bundled(name)["response"].eq("").any()
    with pytest.raises(DCRError, match="use pairs or general"):
        loaders.load_bundled("other")
    json.dumps(loaders.load_bundled("pairs").to_dict("records"))
