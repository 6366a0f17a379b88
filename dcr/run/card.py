"""The model card of an exported model."""

import html
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcr.config import Config
from dcr.run.store import environment

EMBEDDED = "HuggingFaceTB/SmolLM2-135M-Instruct"
INTENDED = (
    "Research on over-refusal: a model that is to refuse harmful requests and answer harmless ones "
    "that look harmful. Not a safety guarantee and not for deployment as it is; judge it on your "
    "own prompts before any use."
)


def markdown(text: object) -> str:
    """Text as text in a Markdown table: no markup, link, HTML, line or column of its own."""
    plain = html.escape(" ".join(str(text).split()))
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", plain)


def card(name: str, facts: Mapping[str, Any]) -> str:
    """The model card: hub metadata, use, data, licences, parameters. It names no local path."""
    from huggingface_hub import ModelCardData

    config: Config = facts["config"]
    base = config.model.name
    if local := is_here(base):
        base = Path(base).name
    own = base == "embedded"
    about = ModelCardData(
        language="en",
        license="apache-2.0" if own else "other",
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=EMBEDDED if own else None if local else base,
        tags=["over-refusal", "safety", "dcr"],
    )
    rows = [
        f"| {markdown(d['role'])} | {markdown(d['source'])} | {d['rows']} | "
        f"{markdown(d['licence'])} |"
        for d in facts["data"]
    ]
    parameters = json.dumps(without_paths(config.to_dict()), indent=1).replace("`", "\\u0060")
    parts = [
        f"---\n{about.to_yaml()}\n---",
        f"# {markdown(name)}",
        f"Base model: {markdown(base)}. Method: {markdown(facts['method'])}.",
        f"## Intended use\n\n{INTENDED}",
        "Load it with `transformers.AutoModelForCausalLM.from_pretrained`; the chat template is in "
        "the tokenizer. A folder with `use.py` acts at inference time: that script shows how.",
        "## Data\n\n| role | source | rows | licence |\n|---|---|---|---|\n" + "\n".join(rows),
        "## Licences\n\nThe base model's licence holds for these weights; the data's licences are "
        "in the table above. A non-commercial licence there (CC-BY-NC) binds what is made from it.",
        f"## Parameters\n\n```json\n{parameters}\n```",
        f"Environment: {markdown(json.dumps(environment()))}",
    ]
    return "\n\n".join(parts) + "\n"


def is_here(path: str) -> bool:
    """Whether a path is one of this machine; "~" is the user's home."""
    return os.path.exists(os.path.expanduser(path))


def without_paths(value: Any) -> Any:
    """Nested values with local paths cut to their last part."""
    if isinstance(value, dict):
        return {k: without_paths(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(v) for v in value]
    if not isinstance(value, str):
        return value
    parts = re.split(r"(\+|^guard:)", value)  # joined tables, a judge's folder
    parts = [value] if is_here(value) else parts
    local = [("/" in p or os.sep in p) and is_here(p) for p in parts]
    return "".join(Path(p).name if own else p for p, own in zip(parts, local, strict=True))
