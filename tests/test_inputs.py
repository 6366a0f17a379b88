"""Malformed and odd input through the `dcr` command: one line, exit status 2, nothing left behind.

What each reader makes of it stands in the tests of that reader; their rows are asked here again.
"""

from __future__ import annotations

import logging
import re
import shutil
import signal
import sys

import pytest
import test_config
import test_grid
import test_read
import yaml

from dcr import cli

GOOD = "text,response\n" + "".join(f"list the cat in {i} .,sure .\n" for i in range(9))
REFINE = "refine OUT --seemingly-toxic good.csv --model MODEL --toxic"
ALIGN = "align OUT --seemingly-toxic good.csv --general good.csv --model MODEL --toxic"
RUN = "run --run-dir new --overrides"
CASES = {}  # name → (files {name: content}, command line as text or as a list, message)


def case(name, command, message, files=()):
    CASES[name] = (dict(files), command, message)


for name, (file, content, message) in test_read.REFUSED.items():
    case(f"file: {name}", [*REFINE.split(), file], message, {file: content})
for name, cell in (
    ("empty", ""),
    ("blank", " "),
    ("nan", "NaN"),
    ("null", "null"),
    ("none", "None"),
):
    text = f"text,response\nhow ?,no\nwhy ?,{cell}\n"
    case(f"answer: {name}", f"{ALIGN} u.csv", "row 1 .'why .'. has no response", {"u.csv": text})
case("table: none", f"{REFINE} none.csv", "No such file")
case("table: folder", f"{REFINE} MODEL/", "stands where a list of prompts is meant")
case("table: text", [*REFINE.split(), "How do I kill time?"], "one string")
case("table: ANSI", [*REFINE.split(), "\x1b[31m.csv"], r"\\x1b\[31m.csv: cannot be read")
for overrides, message in test_config.WRONG:
    case(f"override: {overrides}", [*RUN.split(), overrides], message)
for content, message in test_grid.WRONG:
    text = yaml.safe_dump({"profile": "quick", **content})
    case(f"grid: {content}", "grid g.yaml --run-dir new", message, {"g.yaml": text})

# Model folders: what is done to a good one.
HALF = b"half a file"
for name, files, message in (
    ("half weights", {"model.safetensors": HALF}, "model.safetensors|could not be loaded"),
    (
        "pickled weights",
        {"model.safetensors": None, "pytorch_model.bin": HALF},
        "holds pickled weights alone",
    ),
    ("no weights", {"model.safetensors": None}, r"holds no weights \(\*.safetensors\)"),
    ("no tokenizer", {"tokenizer.json": None}, "holds no tokenizer"),
    ("broken tokenizer", {"tokenizer.json": b"{"}, "could not be loaded"),
    ("no config", {"config.json": None}, "has no config.json"),
    ("broken config", {"config.json": b"{"}, "could not be loaded"),
    ("config a list", {"config.json": b"[]"}, "architecture|could not be loaded"),
    ("unknown kind", {"config.json": b'{"model_type": "martian"}'}, "architecture"),
    ("no kind", {"config.json": b"{}"}, "architecture"),
    (
        "its own code",
        {"config.json": b'{"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}'},
        "x",
    ),
    ("of another kind", {"config.json": b'{"model_type": "gpt2"}'}, "weights lack or misfit"),
    ("an encoder", {"config.json": b'{"model_type": "t5"}'}, "architecture"),
    (
        "an adapter",
        {"config.json": None, "adapter_config.json": b'{"base_model_name_or_path": "a/b"}'},
        "an adapter alone, of base model 'a/b'",
    ),
    ("a broken adapter", {"config.json": None, "adapter_config.json": b"{"}, "an adapter alone"),
):
    files = {f"model 401/{n}": c for n, c in files.items()}
    command = [*REFINE.replace("MODEL", "M").split(), "good.csv"]
    command[command.index("M")] = "model 401"
    case(f"model: {name}", command, message, files)
    case(f"model of a run: {name}", [*RUN.split(), "model.name=model 401"], message, files)
case("model: none", f"{RUN} model.name=./none", "no such model folder")
case("model: file", f"{RUN} model.name=./good.csv", "no such model folder")
case("model: hub", f"{RUN} model.name=nobody/none", "hub cannot be reached")

# Run directories and folders to write into.
for name, files, command, message in (
    ("file", {"r": b""}, "run --no-tables --run-dir r", "r.* could not be written"),
    ("below a file", {"r": b""}, "run --no-tables --run-dir r/a", "could not be"),
    ("broken manifest", {"r/manifest.json": b"{"}, "run --run-dir r", "is no manifest"),
    ("manifest a list", {"r/manifest.json": b"[]"}, "run --run-dir r", "is no manifest"),
    ("manifest of another", {"r/manifest.json": b'{"a": 1}'}, "run --run-dir r", "is no manifest"),
    ("bytes for a manifest", {"r/manifest.json": b"\xff"}, "run --run-dir r", "is no manifest"),
    ("table of it", {"r/manifest.json": b'{"a": 1}'}, "table plane --run-dir r", "is no manifest"),
    ("table of nothing", {}, "table plane --run-dir r", "holds no tables of the reference run"),
    ("unknown table", {}, "table plan --profile quick --run-dir r", "did you mean: plane"),
    ("verify nothing", {}, "verify r", "holds no finished run"),
    ("verify a file", {"r": b""}, "verify r", "holds no finished run"),
    ("verify no artifacts", {"r/manifest.json": b"{}"}, "verify r", "holds no finished|is no man"),
    ("figures of nothing", {}, "figures r --out new", "no tables here"),
    ("seeds", {}, "run --run-dir r --seeds 1-x", "seeds='1-x'"),
    ("negative seed", {}, "run --run-dir r --seeds=-1", "seeds='-1'"),
    ("no seed", {}, "run --run-dir r --seeds 4-1", "give e.g."),
    ("profile", {}, "run --run-dir r --profile ../quick", "profile '../quick' is unknown"),
    ("method", {}, "run --run-dir r --methods DRC", "Did you mean 'DCR'"),
    ("engine", {}, "run --run-dir new --engine slurm", "use joblib or ray"),
    ("no grid", {}, "grid serch --run-dir r", "Did you mean 'search'"),
    ("export a rule", {}, "export question-mark out --run-dir r --profile quick", "is a rule"),
    ("export into a full folder", {"o/x": b""}, "export base o --run-dir r", "is not empty"),
    ("out full", {"o/x": b""}, f"{REFINE} good.csv".replace("OUT", "o"), "is not empty"),
    ("out a file", {"o": b""}, f"{REFINE} good.csv".replace("OUT", "o"), "is a file"),
    ("out below a file", {"o": b""}, f"{REFINE} good.csv".replace("OUT", "o/a"), "is a file"),
    ("out here", {}, f"{REFINE} good.csv".replace("OUT", "."), "is not empty"),
    ("source", {}, "data fetch nothing", "no such data source"),
    ("info", {}, "info --profile quick --overrides a.b=1", "sections: model"),
):
    case(f"run: {name}", command, message, files)


def left(root):
    """Every file, and every folder but those of a run directory that stayed empty."""
    return {p for p in root.rglob("*") if p.is_file()} | {p for p in root.iterdir()} - {
        root / "new"
    }


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # of handlers of an earlier test


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_status_2_and_leaves_nothing(
    name, request, tmp_path, monkeypatch, capsys
):
    files, command, message = CASES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.csv").write_text(GOOD)
    if any(n.startswith("model 401/") for n in files):
        shutil.copytree(request.getfixturevalue("folder"), tmp_path / "model 401")
    for file, content in files.items():
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(
                content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
            )
    words = command.split() if isinstance(command, str) else command
    words = [{"OUT": "out", "MODEL": ".", "MODEL/": "."}.get(w, w) for w in words]
    before = left(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dcr", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    line = said.strip().split("\n")[-1]
    assert end.value.code == 2 and line.startswith("dcr: ") and "Traceback" not in said, said
    assert re.search(message, line) and line.isprintable() and len(line) < 1000, line
    assert left(tmp_path) == before


def test_there_are_many():
    assert len(CASES) > 150
