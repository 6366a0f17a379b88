"""Your own model and data, from the command line to a folder that transformers alone can load."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading

import pandas as pd
import pytest
from conftest import make_model, make_tokenizer

from dcr.errors import DCRError
from dcr.run import own
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
        table = pd.DataFrame(
            {"text": [text.format(w, i) for i, w in enumerate(words)], "response": answer}
        )
        table.to_csv(tmp_path / "toxic.csv", index=False) if name == "toxic" else table.to_json(
            tmp_path / f"{name}.jsonl", orient="records", lines=True
        )
    return {
        "toxic": str(tmp_path / "toxic.csv"),
        "seemingly_toxic": str(tmp_path / "mine.jsonl"),
        "general": str(tmp_path / "general.jsonl"),
    }


def test_dcr_align_end_to_end_and_the_folder_loads_where_dcr_is_not_importable(
    folder, files, tmp_path
):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "dcr.cli",
        "align",
        str(out),
        "--model",
        str(folder),
        "--toxic",
        files["toxic"],
        "--seemingly-toxic",
        files["seemingly_toxic"],
        "--general",
        files["general"],
        "--overrides",
        SMALL,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "Model:" in done.stdout, done.stderr[-800:]
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if not p.endswith('steering') and p]; "
        "sys.meta_path.insert(0, type('No', (), {'find_spec': staticmethod(lambda n, *a: (_ for _ in ()).throw("
        "ImportError('blocked')) if n.split('.')[0] == 'dcr' else None)})()); "
        "import transformers as t; m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "k = t.AutoTokenizer.from_pretrained(sys.argv[1]); "
        "x = k.apply_chat_template([{'role': 'user', 'content': 'list the cat .'}], add_generation_prompt=True, "
        "return_tensors='pt', return_dict=True); m.generate(**x, max_new_tokens=2); "
        "assert not any('lora' in n for n, _ in m.named_parameters())\n"
        "try:\n    import dcr\nexcept ImportError:\n    print('alone')"
    )
    alone = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )
    assert alone.stdout.strip() == "alone", alone.stderr[-800:]
    assert not list(out.glob("*.bin")) and list(out.glob("*.safetensors"))
    text = (out / "README.md").read_text()
    for part in (
        "## Intended use",
        "## Data",
        "## Licences",
        "## Parameters",
        "| toxic | toxic.csv | 20 | yours |",
    ):
        assert part in text
    assert (
        json.loads(re.search(r"```json\n(.*?)\n```", text, re.S).group(1))["align"]["max_steps"]
        == 2
    )


def test_a_second_call_for_one_folder_waits_and_names_the_holder(
    folder, files, tmp_path, caplog, monkeypatch
):
    out, trained = tmp_path / "out", []
    monkeypatch.setattr(
        own,
        "_train_own",
        lambda *_: trained.append(1) or pytest.fail("must not train while the other holds"),
    )
    release = threading.Event()

    def hold():
        with Store(tmp_path).lock(out):
            out.mkdir()
            (out / "model.safetensors").touch()
            release.wait(20)

    first = threading.Thread(target=hold)
    first.start()
    while not (tmp_path / "out.holder").exists():
        pass
    threading.Timer(0.5, release.set).start()
    with pytest.raises(DCRError, match="is not empty"):  # it waited; by then the folder was filled
        own.align_own(out, model=str(folder), overrides=SMALL, **files)
    first.join()
    assert "being computed by process" in caplog.text and not trained


def test_a_full_disk_while_exporting_leaves_nothing_half(folder, tmp_path, monkeypatch):
    model, tokenizer = make_model(layers=3), make_tokenizer()
    monkeypatch.setattr(
        type(tokenizer),
        "save_pretrained",
        lambda *_a, **_k: (_ for _ in ()).throw(OSError(28, "No space left")),
    )
    with pytest.raises(DCRError, match="could not be written.*No space left"):
        own.save_plain(
            model,
            tokenizer,
            tmp_path / "out",
            {"base": "x", "method": "STL", "data": [], "config": {}},
        )
    assert not list(tmp_path.glob("out*"))


def test_card_marks_sets_the_method_trained_on():
    results = [
        {
            "benchmark": "b",
            "metric": "dsr",
            "value": 0.5,
            "low": 0.4,
            "high": 0.6,
            "n": 9,
            "judge": "phrases",
            "in_distribution": seen,
        }
        for seen in (True, False)
    ]
    text = own.card(
        "x",
        {
            "base": "embedded",
            "method": "DCR",
            "data": [
                {"role": "stage 1, toxic", "source": "xstest", "rows": 3, "licence": "CC-BY-4.0"}
            ],
            "config": {},
            "results": results,
        },
    )
    for mark in ("yes", "no"):
        assert f"| b | dsr | 0.500 | 0.400 to 0.600 | 9 | phrases | {mark} |" in text
    assert "SmolLM2-135M-Instruct (Apache-2.0)" in text and "CC-BY-4.0" in text
