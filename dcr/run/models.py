"""The base model of a run, loaded once a process, and models of methods that share its tensors."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcr.config import ModelConfig
from dcr.data.files import cache_dir, content_key, sha256_of
from dcr.errors import DCRError
from dcr.run.store import environment

TENSORS = "tensors.safetensors"
KEPT = (".safetensors", ".json", ".jinja", ".model", ".txt")  # files that decide what a model says


class Base:
    """The base model of a run, and what identifies it."""

    def __init__(self, config: ModelConfig) -> None:
        from dcr.lm.generate import inference_dtype
        from dcr.lm.load import pick_device

        self.config, self.device = config, pick_device(config.device)
        dtype = inference_dtype(config.precision, self.device)
        self.precision = {torch.bfloat16: "bf16"}.get(dtype, "fp32")

    @cached_property
    def key(self) -> dict[str, Any]:
        """Checksums of the model's, tokenizer's and template's files (on the hub: the commit), precision, device."""
        from dcr import __version__
        from dcr.lm import embedded

        source = embedded.ensure() if self.config.name == "embedded" else Path(self.config.name)
        key: dict[str, Any] = {
            "precision": self.precision,
            "device": self.device.partition(":")[0],
            "chat_template": self.config.chat_template,
            "layers_path": self.config.layers_path,
            "dcr": __version__,
        }
        if not source.is_dir():
            return {**key, "name": self.config.name, "commit": self.commit}
        files = [p for p in sorted(source.iterdir()) if p.suffix in KEPT and p.stem != "receipt"]
        return {**key, "files": {p.name: sha256_of(p) for p in files}}

    @cached_property
    def commit(self) -> str:
        """The commit that a model on the hub stands for now ("" for a folder): a branch may move."""
        if self.config.name == "embedded" or Path(self.config.name).is_dir():
            return ""
        from transformers import AutoConfig

        from dcr.lm.load import explain_load_error

        try:
            config = AutoConfig.from_pretrained(
                self.config.name, revision=self.config.revision or "main", trust_remote_code=False
            )
        except Exception as error:  # whatever the hub client raises
            raise DCRError(explain_load_error(self.config.name, error)) from error
        return config._commit_hash or self.config.revision

    def loaded(self) -> tuple[nn.Module, Any]:
        """(model, tokenizer), the same objects at every call in this process. Never write into them."""
        return _loaded(content_key(self.key), self.config, self.commit)

    def facts(self) -> dict[str, Any]:
        """What every manifest says about the model: identity, precision, device, a rendered prompt."""
        from dcr.lm.chat import rendered_example

        return {"model": self.key, "rendering": rendered_example(self.loaded()[1])}


@functools.lru_cache(maxsize=1)
def _loaded(key: str, config: ModelConfig, commit: str):
    from dcr.lm import load as models

    return models.load(
        config.name,
        revision=commit or config.revision,
        device=config.device,
        chat_template=config.chat_template,
    )


def shared_copy(model: nn.Module, own: Collection[str] | None = ()) -> nn.Module:
    """A model of its own on the tensors of `model`: parameters named in `own` (None: all) are copied.

    The others share their memory with `model` and must not be written in place.
    """
    memo: dict[int, Any] = {id(b): b for b in model.buffers()}
    for name, value in model.named_parameters():
        data = value.detach().clone() if own is None or name in own else value.detach()
        memo[id(value)] = nn.Parameter(data, requires_grad=value.requires_grad)
    return copy.deepcopy(model, memo)


def put_on(model: nn.Module, path: Path, step: int = -1) -> nn.Module:
    """`model` with what a stage's or a fit's artifact at `path` changes, adapters merged, at a recorded step."""
    from dcr.train.adapters import apply_trained, merged, reopen
    from dcr.train.align import load_step

    if (path / TENSORS).exists():
        from safetensors.torch import load_file

        own = dict(model.named_parameters())
        for name, value in load_file(path / TENSORS).items():
            own[name].data.copy_(value)
        return model
    if step < 0:
        return apply_trained(model, path / "model")
    trained = reopen(model, path / "model")
    load_step(trained, path, step)
    return merged(trained)


def changed_by(path: Path) -> list[str]:
    """Names of the model's parameters that an artifact changes."""
    from safetensors import safe_open

    files = [*path.glob(TENSORS), *path.glob("model/*.safetensors")]
    names: list[str] = []
    for file in files:
        with safe_open(file, "pt") as content:
            names += content.keys()
    return [re.sub(r"^base_model\.model\.|\.lora_[AB](?=\.weight$)", "", n) for n in names]


def machine() -> dict:
    """What a bug report needs: environment, device, precision, folders. No variable's value, no secret."""
    from dcr import __version__
    from dcr.data.sources import data_dir

    base = Base(ModelConfig())
    cpu = torch.backends.cpu.get_cpu_capability()
    name = torch.cuda.get_device_name() if base.device == "cuda" else cpu
    return {
        "dcr": __version__,
        **environment(),
        "device": f"{base.device} ({name})",
        "precision": base.precision,
        "cache": str(cache_dir()),
        "data": str(data_dir()),
    }
