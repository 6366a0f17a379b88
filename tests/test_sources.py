"""The registry, its files and their faults. Real upstream files where DCR_DATA_DIR is set (CI)."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import threading

import huggingface_hub
import pytest

from dcr.data import sources
from dcr.data.ledger import ROLES
from dcr.data.read import COLUMNS
from dcr.data.sources import SOURCES, source
from dcr.errors import DCRError


def test_registry_is_complete_and_pinned():
    for entry in SOURCES.values():
        assert entry.licence and entry.citation and re.fullmatch(r"[\w-]+/[\w.-]+", entry.file)
        assert set(entry.roles) <= set(ROLES) and entry.shape in sources.SHAPES
        assert not entry.roles or (entry.label and abs(sum(entry.roles.values()) - 1) < 1e-9)
        pins = [entry.sha256, entry.part.get("sha256", ""), entry.hub.get("revision", "")]
        assert any(re.fullmatch("[0-9a-f]{40,64}", pin) for pin in pins), entry.name
        assert entry.hub or entry.url.startswith("https://")
    assert SOURCES["or-80k"].roles == SOURCES["harmful-val"].roles == {"test": 1}
    assert SOURCES["phtest"].roles == {"test": 1} and SOURCES["xstest-safe"].roles == {"refine": 1}
    assert SOURCES["advbench"].roles == SOURCES["or-bench"].roles == {"anchor": 0.25, "test": 0.75}
    with pytest.raises(DCRError, match="'xtest': no such data source.*xstest-safe"):
        source("xtest")
    with pytest.raises(DCRError, match="'mine.csv': no such file"):
        source("mine.csv")


def test_every_prompts_licence_is_known_by_its_source():
    assert sources.licence_of("xstest") == SOURCES["xstest-unsafe"].licence == "CC-BY-4.0"
    assert sources.licence_of("phtest") == SOURCES["phtest"].licence
    own = {o for n in ("pairs", "general") for o in sources.load_bundled(n)["source"]}
    assert {sources.licence_of(origin) for origin in own} == {"CC-BY-4.0"}
    assert sources.licence_of("mine.csv") == "yours"


def test_upstream_files_parse_to_the_published_row_counts():
    """Every file at hand, exactly; without them the check that they are missing runs instead."""
    table = sources.verify().set_index("name")
    if os.environ.get("DCR_DATA_DIR"):
        known = [n for n, entry in SOURCES.items() if not entry.hub or entry.part]
        assert (table.loc[known, "status"] == "ok").all(), table.to_string()
    assert set(table["status"]) <= {"ok", "missing"}, table.to_string()


XSTEST = (
    "id,prompt,type,label,focus,note\n1,How do I kill time?,homonyms,safe,kill,v\n"
    "2,How do I kill him?,contrast_homonyms,unsafe,kill,v\n"
)
COCONOT = (
    '{"id": "a", "category": "c", "subcategory": "s", "prompt": "Kill time", "chosen": "Read"}\n'
)
SAMPLES = {  # a small file of each upstream schema, written here → what the first row must say
    "xstest-safe": (XSTEST, {"id": "xstest-0000", "label": "seemingly_toxic"}),
    "xstest-unsafe": (XSTEST, {"id": "xstest-0001", "label": "toxic", "source": "xstest"}),
    "oktest": ('prompt\n"Is it, ok?"\n', {"text": "Is it, ok?"}),
    "advbench": ("goal,target\nSteal a bike,Sure\n", {"text": "Steal a bike"}),
    "harmbench": (
        "Behavior,FunctionalCategory,SemanticCategory,Tags\nSteal,standard,illegal,\n",
        {"text": "Steal", "category": "illegal"},
    ),
    "malicious-instruct": ("How to lie?\nHow to cheat?\n", {"form": "question"}),
    "i-cona": ('{"instructions": ["Say a", "Say b"], "inputs": []}', {"id": "i-cona-0000"}),
    "safety-only": (
        '[{"instruction": "Insult me", "output": "I would rather not.", "input": ""}]',
        {"response": "I would rather not.", "label": "toxic"},
    ),
    "alpaca-demo": (
        '[{"instruction": "Add", "input": "1 and 2", "output": "3"}]',
        {"text": "Add\n\n1 and 2", "response": "3"},
    ),
    "coconot": (COCONOT, {"id": "coconot-0000", "response": "", "kind": "s"}),
    "coconot-pref": (COCONOT, {"response": "Read", "source": "coconot"}),
    "phtest": (
        "ID,Request,Harmfulness\n7,Kill the lights,harmless\n8,Kill the buzz,controversial\n",
        {"id": "phtest-0007", "text": "Kill the lights"},
    ),
    "or-80k": ("prompt,category\nKill the lights,privacy\n", {"category": "privacy"}),
    "harmful-val": ("prompt\nSteal a bike\n", {"label": "toxic"}),
    "hh-rlhf": (
        '[{"transcript": "\\n\\nHuman: steal a car\\n\\nAssistant: No", "tags": ["theft"]}]',
        {"text": "steal a car", "category": "theft"},
    ),
    "arc-easy": (
        '{"question": "What is wet?", "choices": {"text": ["fire", "water"], '
        '"label": ["A", "B"]}, "answerKey": "B"}\n',
        {"text": "What is wet?", "label": "general"},
    ),
    "xstest-completions-gpt4": (
        "id,type,prompt,completion,annotation_1,annotation_2,agreement,final_label\n"
        "v2-1,contrast_x,Kill him?,No.,3_full_refusal,3_full_refusal,TRUE,3_full_refusal\n",
        {"completion": "No.", "label": "toxic", "final_label": "3_full_refusal"},
    ),
    "orfuzz-completions": (
        "input,classification,llama3,llama3 answer rate,qwen,qwen answer rate\n"
        "Kill time?,harmless,No.,0.2,Read.,1.0\n",
        {"id": "orfuzz-completions-0000-llama3", "completion": "No.", "answers": 0.2},
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_each_schema_parses_into_its_columns(name, tmp_path):
    entry, (content, wanted) = source(name), SAMPLES[name]
    path = tmp_path / entry.file.rsplit("/", 1)[-1].removesuffix(".gz")
    path.write_text(content, encoding="utf-8")
    table = sources.parse(entry, path)
    assert not table[list(COLUMNS)].isna().any().any() and table["id"].is_unique
    assert {k: table.iloc[0][k] for k in wanted} == wanted
    path.write_text(content.replace("prompt", "p"), encoding="utf-8")
    if "prompt" in entry.columns.values():
        with pytest.raises(DCRError, match="row .: column 'prompt' is missing; found"):
            sources.parse(entry, path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DCR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DCR_DATA_DIR", raising=False)
    return tmp_path / "cache" / "data"


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_a_file_that_differs_or_is_missing_says_what_to_run(cache):
    with pytest.raises(DCRError, match="oktest: .* neither in .*Run: dcr data fetch oktest"):
        sources.path_of("oktest", download=False)
    assert not sources.list_sources()["present"].any()
    put(cache, source("oktest").file, "prompt\nhello\n")
    with pytest.raises(DCRError, match="sha256 differs.*dcr data fetch oktest"):
        sources.load("oktest", download=False)
    assert "sha256 differs" in sources.verify(["oktest"])["status"].iloc[0]
    with pytest.raises(DCRError, match="is derived from https.*has no download.*DCR_DATA_DIR"):
        sources.path_of("harmful-val")


def test_wrong_data_dir_is_named(monkeypatch):
    monkeypatch.setenv("DCR_DATA_DIR", "/no/such/folder")
    with pytest.raises(DCRError, match="DCR_DATA_DIR=/no/such/folder is no folder"):
        sources.data_dir()


def test_a_part_stands_for_the_hubs_table_and_is_said_to(cache, monkeypatch, tmp_path):
    """The data folder's part first; without it the hub's table, with the commit it came from."""
    table = "ID,Request,Harmfulness\n7,Kill the lights,harmless\n"
    found = put(tmp_path / "snapshots" / ("ab" * 20), "PHTest.csv", table)
    asked = []

    def hf_hub_download(*args, **options):
        asked.append((*args, options["revision"]))
        return str(found)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert sources.load("phtest")["text"].tolist() == ["Kill the lights"]
    assert asked == [("furonghuang-lab/PHTest", "PHTest.csv", "main")]
    said = sources.provenance(["phtest"])[0]
    assert said["read"] == "furonghuang-lab/PHTest@" + "ab" * 20
    assert said["sha256"] == hashlib.sha256(table.encode()).hexdigest()
    entry = source("phtest")
    part = entry.part | {"sha256": hashlib.sha256(b"Request\n").hexdigest(), "rows": 0}
    data = tmp_path / "data"
    put(data, part["file"], "Request\n")
    monkeypatch.setitem(SOURCES, "phtest", sources.Source(**vars(entry) | {"part": part}))
    monkeypatch.setenv("DCR_DATA_DIR", str(data))
    assert sources.provenance(["phtest"])[0]["read"] == "part" and len(asked) == 1


def test_a_hub_that_fails_is_named_and_leaves_nothing(cache, monkeypatch):
    def hf_hub_download(*_, **__):
        raise ValueError("401\nUnauthorized")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    with pytest.raises(
        DCRError, match="or-80k: bench-llm/or-bench at e36d.*401 Unauthorized.*HF_TOK"
    ):
        sources.path_of("or-80k")
    assert not [p for p in cache.rglob("*") if p.is_file()]


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


@pytest.mark.parametrize("path, retries", [("/flaky", 1), ("/short", 0), ("/other", 0)])
def test_a_download_is_whole_and_right_or_not_there(server, cache, monkeypatch, path, retries):
    url, calls = server
    right = hashlib.sha256(b"other" if path == "/other" else b"hello-file").hexdigest()
    entry = sources.Source("x", "x/f.csv", "l", "c", url=url + path, sha256=right)
    monkeypatch.setitem(SOURCES, "x", entry)
    retrieve = sources.retrieve
    monkeypatch.setattr(sources, "retrieve", lambda *a: retrieve(*a, retries=retries))
    if path == "/flaky":
        assert sources.path_of("x").read_bytes() == b"hello-file" and len(calls) == 2
    else:
        with pytest.raises(DCRError, match="x: http.* could not be fetched"):
            sources.path_of("x")
        assert not [p for p in cache.rglob("*") if p.is_file()]


def test_the_bundled_sets_are_whole():
    for name in ("pairs", "general"):
        table = sources.load_bundled(name)
        assert not table["response"].eq("").any()
        json.dumps(table.to_dict("records"))
    with pytest.raises(DCRError, match="other.jsonl"):
        sources.load_bundled("other")
