"""Models by hub id, folder or "embedded": what identifies them, on which device, how precise."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcr.data.files import sha256_of
from dcr.errors import DCRError
from dcr.lm import embedded
from dcr.lm.chat import ALPACA_TEMPLATE, stop_tokens
from dcr.lm.device import DTYPES, pick_device, resolve_precision

log = logging.getLogger("dcr")
PICKLED = re.compile(r"pytorch_model.*\.bin|.*\.(pt|pth|ckpt)")
TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"}


def load(
    name: str = "embedded",
    *,
    revision: str = "",
    precision: str = "auto",
    device: str = "auto",
    chat_template: str = "auto",
):
    """(model, tokenizer) in eval mode; its generation config names every token that ends an answer.

    name: "embedded", a local folder or a hub id (`revision`: commit, tag or branch; "": main as it
    is now). precision: see `resolve_precision`; weights are held in fp32 (bf16 is autocast, or
    `in_precision`), but on a GPU in bf16 when they were published so. device: see `pick_device`.
    chat_template: "auto" (the tokenizer's own; the Alpaca prompt for a model without one) or
    "alpaca". Raises DCRError for a wrong option, and for what cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    device = pick_device(device)
    resolved = resolve_precision(precision, device)
    source, commit = locate(name, revision)
    options = {"trust_remote_code": False, "revision": commit or "main"}
    tokenizer = load_tokenizer(name, revision=commit, chat_template=chat_template)
    with _explained(name):
        config = AutoConfig.from_pretrained(source, **options)
        small = device.startswith("cuda") and resolved == "bf16" and config.dtype == torch.bfloat16
        options |= {"use_safetensors": True, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES["bf16" if small else "fp32"], **options
        )
        model, found = loaded
        if lacking := [*found["missing_keys"], *found["mismatched_keys"]]:  # they would be random
            raise ValueError(f"its weights lack or misfit {len(lacking)} tensors: {lacking[0]}")
        model.to(device)
    if device.startswith("cuda") and resolved == "fp32":
        torch.set_float32_matmul_precision("high")  # TF32
    _complete(model, tokenizer)
    log.info("%s: on %s, in %s", name, device, resolved)
    return model.eval(), tokenizer


def skeleton(name: str, revision: str = "") -> nn.Module:
    """The model's modules alone, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source, commit = locate(name, revision)
    options = {"trust_remote_code": False, "revision": commit or "main"}
    with _explained(name, revision), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, **options)
        return AutoModelForCausalLM.from_config(config)


def load_tokenizer(name: str, *, revision: str = "", chat_template: str = "auto"):
    """The tokenizer as `load` gives it, but for its pad token; no weights are loaded."""
    from transformers import AutoTokenizer

    source, commit = locate(name, revision)
    options = {"trust_remote_code": False, "revision": commit or "main"}
    with _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    _give_template(tokenizer, name, chat_template)
    return tokenizer


@contextlib.contextmanager
def _explained(name: str, revision: str = "") -> Iterator[None]:
    """One clear message for whatever the hub client raises."""
    try:
        yield
    except Exception as error:
        raise DCRError(explain_load_error(name, error, revision)) from error


def _give_template(tokenizer, name: str, chat_template: str) -> None:
    if chat_template not in ("auto", "alpaca"):
        raise DCRError(f"model.chat_template={chat_template!r} is unknown; use auto or alpaca.")
    if chat_template == "alpaca" or not tokenizer.chat_template:
        if chat_template == "auto":
            log.warning("%s has no chat template: using the Alpaca prompt", name)
        bos = tokenizer.bos_token_id
        begins = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        tokenizer.chat_template = "{{ bos_token }}" * begins + ALPACA_TEMPLATE


def _complete(model, tokenizer) -> None:
    """What may lack: a pad id with an embedding, the turn's end among the stops."""
    tokenizer.padding_side = "left"
    pad = tokenizer.pad_token_id
    if pad is None or pad >= model.get_input_embeddings().num_embeddings:
        # For libraries that ask for one (`lm.batches` needs none); never grows the vocabulary.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    model.generation_config.eos_token_id = stop_tokens(model, tokenizer) or None
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def locate(name: str, revision: str = "") -> tuple[str, str]:
    """(folder or hub id, its commit or ""). Raises DCRError for an unfit folder, a silent hub."""
    if name == "embedded":
        return str(embedded.ensure()), ""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        _check_folder(path)
        return str(path), ""
    if path.exists() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise DCRError(f"{name}: no such model folder. Give one with a saved model, or a hub id.")
    from transformers.utils.hub import cached_file

    with _explained(name, revision):
        file = cached_file(name, "config.json", revision=revision or "main")
    return name, Path(str(file)).parent.name


def identity(name: str, revision: str = "") -> dict[str, str]:
    """What a key holds of a model: its commit on the hub, or checksums of its folder's files."""
    source, commit = locate(name, revision)
    if commit:
        return {"name": name, "commit": commit}
    if name == "embedded":
        receipt = json.loads((Path(source) / "receipt.json").read_text(encoding="utf-8"))
        return {"name": name, "sha256": receipt["model_sha256"]}
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt")
    return {p.name: sha256_of(p) for p in sorted(Path(source).iterdir()) if p.suffix in kinds}


def _check_folder(path: Path) -> None:
    """Raise DCRError for what the library does not say clearly."""
    names = {p.name for p in path.iterdir()}
    if "config.json" not in names and "adapter_config.json" in names:
        settings = (path / "adapter_config.json").read_text(encoding="utf-8", errors="replace")
        base = re.search(r'"base_model_name_or_path":\s*"([^"]*)"', settings)
        raise DCRError(
            f"{path}: holds an adapter alone, of base model {base and base[1]!r}. Merge it into "
            "that model (peft: merge_and_unload, save_pretrained) and give the merged folder."
        )
    if "config.json" not in names:
        raise DCRError(f"{path}: has no config.json, so it holds no saved model.")
    if not names & TOKENIZER_FILES:
        raise DCRError(
            f"{path}: holds no tokenizer. Save its base model's there (save_pretrained)."
        )
    if not any(name.endswith(".safetensors") for name in names):
        if any(PICKLED.fullmatch(name) for name in names):
            raise DCRError(
                f"{path}: holds pickled weights alone, which can run code when they are opened. "
                "Convert the model to safetensors first."
            )
        raise DCRError(f"{path}: holds no weights (*.safetensors). Save the model there again.")


def explain_load_error(name: str, error: Exception, revision: str = "") -> str:
    """What went wrong while loading `name`, and what to do, in one sentence or two."""
    from huggingface_hub import errors

    chain: list[BaseException] = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) and below not in chain:
        chain.append(below)

    def found(*kinds) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    status = {getattr(getattr(e, "response", None), "status_code", 0) for e in chain}
    low = str(error).lower()
    if found(errors.RevisionNotFoundError):
        reason = f"the hub has no revision {revision!r} of it. Give one that it has."
    elif found(errors.GatedRepoError) or status & {401, 403} or "gated repo" in low:
        reason = (
            "gated, private, or not on the hub under this name. Accept the licence on its hub page "
            "and set HF_TOKEN, or give a local folder."
        )
    elif "model type" in low or "unrecognized" in low:
        said = " ".join(str(error).split())[:160]
        reason = f"this transformers version knows no causal LM of its architecture ({said})."
    elif "file named model.safetensors" in low:
        reason = "no safetensors weights found. Convert the model to safetensors first."
    elif found(
        errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError
    ):
        reason = (
            "no local folder, and the hub cannot be reached. Mend the network or give a folder."
        )
    else:
        said = str(error).partition("\n")[0][:300]
        reason = f"could not be loaded ({type(error).__name__}: {said})."
    return f"{name}: {reason}"
