"""The base model of a run, loaded once a process, and models of methods that share its tensors."""

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
from dcr.data.files import cache_dir, content_key
from dcr.run.store import environment

TENSORS = "tensors.safetensors"


class Base:
    """The base model of a run, and what identifies it."""

    def __init__(self, config: ModelConfig) -> None:
        from dcr.lm.device import pick_device, resolve_precision

        self.config, self.device = config, pick_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)

    @cached_property
    def key(self) -> dict[str, Any]:
        """Checksums of its files (on the hub: the commit), precision, device, template."""
        from dcr import __version__
        from dcr.lm.load import identity

        return {
            **identity(self.config.name, self.config.revision),
            "precision": self.precision,
            "device": self.device.partition(":")[0],
            "chat_template": self.config.chat_template,
            "layers_path": self.config.layers_path,
            "dcr": __version__,
        }

    @cached_property
    def depth(self) -> int:
        """Number of decoder blocks; no weights are loaded for it."""
        from dcr.lm.blocks import decoder_layers
        from dcr.lm.load import skeleton

        model = skeleton(self.config.name, self.key.get("commit", "") or self.config.revision)
        return len(decoder_layers(model, self.config.layers_path))

    def loaded(self) -> tuple[nn.Module, Any]:
        """(model, tokenizer), the same objects at every call: never write into them."""
        return _loaded(content_key(self.key), self.config, self.key.get("commit", ""))

    def facts(self) -> dict[str, Any]:
        """What every manifest says about the model: its key and a rendered prompt."""
        return {"model": self.key, "rendering": self.rendering}

    @cached_property
    def rendering(self) -> dict[str, str]:
        """An example prompt as the model reads it; no weights are loaded for it."""
        from dcr.lm.chat import rendered_example
        from dcr.lm.load import load_tokenizer

        name, revision = self.config.name, self.key.get("commit", "") or self.config.revision
        template = self.config.chat_template
        return rendered_example(load_tokenizer(name, revision=revision, chat_template=template))


@functools.lru_cache(maxsize=1)
def _loaded(key: str, config: ModelConfig, commit: str):
    from dcr.lm.load import load

    return load(
        config.name,
        revision=commit or config.revision,
        precision=config.precision,
        device=config.device,
        chat_template=config.chat_template,
    )


def shared_copy(model: nn.Module, own: Collection[str] | None = ()) -> nn.Module:
    """A copy of `model` in which only the parameters named in `own` (None: all) are copied.

    The others share their memory with `model` and must not be written in place.
    """
    memo: dict[int, Any] = {id(b): b for b in model.buffers()}
    for name, value in model.named_parameters():
        data = value.detach().clone() if own is None or name in own else value.detach()
        memo[id(value)] = nn.Parameter(data, requires_grad=value.requires_grad)
    return copy.deepcopy(model, memo)


def put_on(model: nn.Module, path: Path, step: int = -1) -> nn.Module:
    """`model` with what an artifact at `path` changes (at a recorded step), adapters merged."""
    from dcr.train.adapters import merged, reopen
    from dcr.train.align import load_step

    if (path / TENSORS).exists():
        from safetensors.torch import load_file

        own = dict(model.named_parameters())
        for name, value in load_file(path / TENSORS).items():
            own[name].data.copy_(value)
        return model
    trained = reopen(model, path / "model")
    if step >= 0:
        load_step(trained, path, step)
    return merged(trained)


def changed_by(path: Path) -> list[str]:
    """Names of the model's parameters that an artifact changes."""
    from safetensors import safe_open

    names: list[str] = []
    for file in (*path.glob(TENSORS), *path.glob("model/*.safetensors")):
        with safe_open(file, "pt") as content:
            names += content.keys()
    return [re.sub(r"^base_model\.model\.|\.lora_[AB](?=\.weight$)", "", n) for n in names]


def machine() -> dict:
    """What a bug report needs: environment, device, precision, folders. No secret."""
    from dcr import __version__
    from dcr.data.sources import data_dir

    base = Base(ModelConfig())
    cpu = torch.backends.cpu.get_cpu_capability()
    name = torch.cuda.get_device_name() if base.device.startswith("cuda") else cpu
    return {
        "dcr": __version__,
        **environment(),
        "device": f"{base.device} ({name})",
        "precision": base.precision,
        "cache": str(cache_dir()),
        "data": str(data_dir()),
    }
