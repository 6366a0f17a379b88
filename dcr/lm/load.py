"""Models by hub id, folder or "embedded"."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from dcr.errors import DCRError
from dcr.lm import embedded
from dcr.lm.chat import ALPACA_TEMPLATE

log = logging.getLogger("dcr")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name: str = "embedded",
    *,
    revision: str = "",
    dtype: str = "float32",
    device: str = "auto",
    chat_template: str = "auto",
):
    """(model, tokenizer) in eval mode.

    name: "embedded", a local folder or a hub id (`revision` pins its commit).
    dtype: float32, bfloat16 or float16. device: "auto" (cuda, then mps, then cpu) or a torch device.
    chat_template: "auto" (the tokenizer's own; the Alpaca prompt for a model without one) or "alpaca".
    Raises DCRError for a wrong option, no network, a gated model or an unknown architecture.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise DCRError(f"model.dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)}.")
    if chat_template not in ("auto", "alpaca"):
        raise DCRError(f"model.chat_template={chat_template!r} is unknown; use auto or alpaca.")
    source = str(embedded.ensure()) if name == "embedded" else name
    options = {"trust_remote_code": False}
    if not Path(source).is_dir():
        options["revision"] = revision or "main"
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise ValueError(f"unrecognized model type {config.model_type!r}")
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[dtype], use_safetensors=True, **options
        )
    except Exception as error:  # one clear message for whatever the hub client raises
        raise DCRError(explain_load_error(name, error)) from error
    if tokenizer.pad_token is None:
        # A pad that is no stop token, so the stop token stays in the labels; never grows the vocabulary.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if chat_template == "alpaca" or not tokenizer.chat_template:
        if chat_template == "auto":
            log.warning("%s has no chat template: using the Alpaca prompt", name)
        tokenizer.chat_template = ALPACA_TEMPLATE
    tokenizer.padding_side = "left"
    return model.to(pick_device(device)).eval(), tokenizer


def pick_device(device: str) -> str:
    """ "auto" → cuda, mps or cpu, whichever is there first; any other name as it is."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def explain_load_error(name: str, error: Exception) -> str:
    """What went wrong while loading `name`, and what to do, in one sentence or two."""
    text = f"{type(error).__name__}: {error}"
    low = text.lower()
    if "gated" in low or "401" in low or "403" in low:
        return (
            f"{name}: the model is gated or private. Accept its licence on its hub page and set HF_TOKEN, "
            "or give a local folder."
        )
    if "model type" in low or "unrecognized" in low or "unrecognised" in low:
        return f"{name}: this transformers version does not know the architecture; use a supported causal LM. ({error})"
    if "safetensors" in low:
        return f"{name}: no safetensors weights found. Convert the model to safetensors first; nothing else is loaded."
    if any(
        word in low
        for word in (
            "connect",
            "offline",
            "resolve",
            "network",
            "not a local folder",
            "max retries",
            "localentrynotfound",
            "timeout",
            "couldn't reach",
        )
    ):
        return (
            f"{name}: not a local folder, and the Hugging Face hub cannot be reached. Check the network, "
            "give a local folder, or use model.name=embedded."
        )
    return f"{name}: could not be loaded. {text.splitlines()[0][:300]}"
