"""Your own model and data, from the command line to a folder that transformers alone can load."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading

import pandas as pd
import pytest
import yaml
from conftest import make_model, make_tokenizer

from dcr.config import Config
from dcr.errors import DCRError
from dcr.run import card, own
from dcr.run.store import Store

SMALL = (
    "refine.layer=2,refine.max_steps=1,refine.batch_size=8,align.max_steps=2,align.max_length=64"
)


@pytest.fixture
def files(tmp_path):
    words = ["cat", "dog", "house", "bike", "bread", "file", "story", "plan", "trip", "game"] * 2
    rows = {
        "toxic": ("steal the {} in {} .", "sorry , i cannot help ."),
        "mine": ("bake the {} in {} ?", ""),
        "general": ("list the {} of {} .", "sure , the cat ."),
    }
    for name, (text, answer) in rows.items():
        texts = [text.format(w, i) for i, w in enumerate(words)]
        table = pd.DataFrame({"text": texts, **({"response": answer} if answer else {})})
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    return {
        "toxic": str(tmp_path / "toxic.csv"),
        "seemingly_toxic": str(tmp_path / "mine.csv"),
        "general": str(tmp_path / "general.csv"),
    }


ALONE = """
import sys
sys.meta_path.insert(0, type('No', (), {'find_spec': staticmethod(lambda n, *a: (_ for _ in ()).throw(
    ImportError('blocked')) if n.split('.')[0] == 'dcr' else None)})())
import transformers as t
m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1])
k = t.AutoTokenizer.from_pretrained(sys.argv[1])
x = k.apply_chat_template([{'role': 'user', 'content': 'list the cat .'}], add_generation_prompt=True,
    return_tensors='pt', return_dict=True)
m.generate(**x, max_new_tokens=2)
assert not any('lora' in n for n, _ in m.named_parameters())
assert k.convert_tokens_to_ids('<|end|>') in m.generation_config.eos_token_id
try:
    import dcr
except ImportError:
    print('alone')
"""


def test_dcr_align_end_to_end_and_the_folder_loads_without_dcr(folder, files, tmp_path):
    out = tmp_path / "my model, ünïcode"
    command = [sys.executable, "-m", "dcr.cli", "align", str(out), "--model", str(folder)]
    command += ["--toxic", files["toxic"], "--seemingly-toxic", files["seemingly_toxic"]]
    command += ["--general", files["general"], "--overrides", SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "Model:" in done.stdout, done.stderr[-800:]
    alone = subprocess.run(
        [sys.executable, "-c", ALONE, str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )
    assert alone.stdout.strip() == "alone", alone.stderr[-800:]
    assert not list(out.glob("*.bin")) and list(out.glob("*.safetensors"))
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"my model, ünïcode", "toxic.csv", "mine.csv", "general.csv"}
    for path in out.glob("*"):  # no local path in card, configuration or tokenizer
        if path.suffix in (".md", ".json", ".jinja"):
            assert "/tmp" not in path.read_text() and str(folder.parent) not in path.read_text()
    text = (out / "README.md").read_text()
    for part in ("## Intended use", "## Data", "## Licences", "| toxic | toxic.csv | 20 | yours |"):
        assert part in text
    config = json.loads(re.search(r"```json\n(.*?)\n```", text, re.S).group(1))
    assert config["align"]["max_steps"] == 2 and config["model"]["name"] == folder.name


def train(folder, files, out, **more):
    return own.train_own(
        out, **{**files, "model": str(folder), "overrides": SMALL, "stages": ["align"], **more}
    )


def weights(path):
    return (path / "model.safetensors").read_bytes()


def test_what_an_earlier_call_left_is_never_returned_for_other_data_seed_or_parameters(
    folder, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(own.shutil, "rmtree", lambda *_a, **_k: None)  # as if killed before
    made = {}
    general = pd.read_csv(files["general"]).assign(response="sure , the dog .")
    changes = {
        "plain": {},
        "data": {"general": general},
        "seed": {"seed": 3},
        "parameters": {"overrides": SMALL + ",align.lr=1e-2"},
        "stage 1": {"stages": ["refine", "align"], "overrides": SMALL + ",refine.warmup=0"},
    }
    for name, change in changes.items():
        out = train(folder, files, tmp_path / "model", **change)
        made[name] = weights(out)
        out.rename(tmp_path / name)
        assert (tmp_path / "model.work").is_dir()
    assert len(set(made.values())) == len(changes)
    assert weights(train(folder, files, tmp_path / "model")) == made["plain"]


@pytest.mark.parametrize(
    ("stages", "more", "read"),
    [
        (["align"], "", {"toxic", "general"}),
        (["refine"], "", {"toxic", "seemingly"}),
        (["refine"], ",refine.retention=1.0", {"toxic", "seemingly", "general"}),
    ],
)
def test_a_card_lists_what_was_trained_on_alone(folder, files, tmp_path, stages, more, read):
    out = train(folder, files, tmp_path / "out", stages=stages, overrides=SMALL + more)
    listed = re.findall(r"^\| (toxic|seemingly|general)", (out / "README.md").read_text(), re.M)
    assert set(listed) == read


def test_a_users_own_folder_beside_the_model_stays(folder, files, tmp_path):
    notes = tmp_path / "out.work" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    train(folder, files, tmp_path / "out")
    assert [p.name for p in notes.parent.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "name", ["align.n_safe=3", "data.audited=true", "generation.temperature=0.5"]
)
def test_a_parameter_that_own_tables_do_not_have_is_refused(folder, files, tmp_path, name):
    field = name.partition("=")[0]
    with pytest.raises(DCRError, match=f"{field} says nothing.*Leave it out"):
        train(folder, files, tmp_path / "out", overrides=f"{SMALL},{name}")
    assert not list(tmp_path.glob("out*"))


def test_frames_and_a_missing_answer(folder, files, tmp_path):
    frames = {name: pd.read_csv(path) for name, path in files.items()}
    frames["toxic"].loc[3, "response"] = float("nan")
    with pytest.raises(DCRError, match="toxic.*row 3"):
        train(folder, frames, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["full", "file", "below a file", ".", "/", "read-only"])
def test_output_folders_that_cannot_be_are_refused_before_any_work(
    folder, files, tmp_path, monkeypatch, place
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own.OwnData, "model", lambda *_: pytest.fail("trained before looking"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    if place == "read-only":
        monkeypatch.setattr(own.os, "access", lambda *_: False)
    out = {"below a file": "file/out", "read-only": "new/out"}.get(place, place)
    messages = {
        "full": "is not empty",
        ".": "is not empty",
        "/": "is not empty",
        "file": "is a file",
    }
    messages |= {"below a file": "file is a file", "read-only": "cannot be written"}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DCRError, match=messages[place]):
        train(folder, files, out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_second_call_for_one_folder_waits(folder, files, tmp_path, caplog, monkeypatch):
    out, release, held = tmp_path / "out", threading.Event(), threading.Event()
    monkeypatch.setattr(own.OwnData, "model", lambda *_: pytest.fail("trained while another holds"))

    def hold():
        with Store(tmp_path).lock(out):
            held.set()
            release.wait(20)
            out.mkdir()
            (out / "model.safetensors").touch()

    first = threading.Thread(target=hold)
    first.start()
    held.wait(20)
    threading.Timer(0.5, release.set).start()
    with pytest.raises(DCRError, match="is not empty"):  # it waited; by then the folder was filled
        train(folder, files, out)
    first.join()
    assert "being computed by another process" in caplog.text


def test_a_full_disk_while_exporting_leaves_nothing_half(tmp_path, monkeypatch):
    model, tokenizer = make_model(layers=3), make_tokenizer()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    facts = {"method": "STL", "data": [], "config": Config()}
    with pytest.raises(DCRError, match="could not be written.*No space left"):
        own.save_plain({"": (model, tokenizer)}, tmp_path / "out", facts)
    assert not list(tmp_path.glob("out*"))


def test_a_card_names_no_local_path(tmp_path, monkeypatch):
    parts = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for part in parts:
        part.write_text("text")
    values = {"toxic": f"{parts[0]}+{parts[1]}", "judge": f"guard:{tmp_path}", "hub": "a/b"}
    cut = {"toxic": "a.csv+b.csv", "judge": f"guard:{tmp_path.name}", "hub": "a/b"}
    assert card.without_paths(values) == cut
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    home = Config().override({"model.name": "~/mine", "data.toxic": "~/a.csv+~/b.csv"})
    text = card.card("x", {"method": "DCR", "data": [], "config": home})
    assert "~/" not in text and "base_model" not in text and '"toxic": "a.csv+b.csv"' in text


def test_a_card_is_text_whatever_the_names_and_its_metadata_is_valid(tmp_path):
    from huggingface_hub import ModelCard

    name = "a|b <script>alert(1)</script> [x](http://y) `c` \n# d"
    data = [{"role": "toxic", "source": name, "rows": 3, "licence": "CC-BY-4.0"}]
    config = Config().override({"model.name": "someone/model", "data.toxic": "x```y"})
    text = own.card(name, {"method": "DCR", "data": data, "config": config})
    body = text.split("\n---\n", 1)[1]
    assert "<script>" not in body and "[x](" not in body and "\n# d" not in body
    row = next(line for line in body.splitlines() if line.startswith("| toxic"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 5
    assert body.count("```") == 2
    metadata = ModelCard(text).data
    assert metadata.base_model == "someone/model" and metadata.license == "other"
    assert yaml.safe_load(text.split("---")[1])["pipeline_tag"] == "text-generation"
    local = Config().override({"model.name": str(tmp_path), "data.toxic": str(tmp_path)})
    text = own.card("x", {"method": "DCR", "data": [], "config": local})
    assert str(tmp_path) not in text and "base_model" not in text
    text = own.card("x", {"method": "DCR", "data": [], "config": Config()})
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in text and "license: apache-2.0" in text


@pytest.mark.slow
def test_two_processes_align_one_model_together(folder, files, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", "-m", "dcr.cli", "align", str(tmp_path / "both")]
    launch += ["--model", str(folder), "--toxic", files["toxic"], "--general", files["general"]]
    launch += ["--seemingly-toxic", files["seemingly_toxic"], "--overrides", SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "both" / "model.safetensors").is_file()
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"both", "toxic.csv", "mine.csv", "general.csv"}
