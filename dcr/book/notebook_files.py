"""Keeping the committed notebooks: executed on `quick`, progress bars and widget state out, pictures and tables in."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

from dcr.data.files import write_atomic

WIDGET = "application/vnd.jupyter.widget-view+json"


def without_progress(content: dict) -> dict:
    """The notebook without saved widget state and progress bars; a widget to explore keeps its text."""
    metadata = {k: v for k, v in content["metadata"].items() if k not in ("widgets", "papermill")}
    cells = [
        c | {"outputs": [_smaller(o) for o in c["outputs"] if not _is_progress(o)]}
        if c["cell_type"] == "code"
        else c
        for c in content["cells"]
    ]
    return content | {"metadata": metadata, "cells": cells}


def _is_progress(output: dict) -> bool:
    if output.get("name") == "stderr":
        return True
    data = output.get("data", {})
    return WIDGET in data and "Box(" not in "".join(data.get("text/plain", ""))


def _smaller(output: dict) -> dict:
    """A picture with 128 colours, a third of the size: a notebook of many pictures stays under a megabyte."""
    picture = output.get("data", {}).get("image/png")
    if not picture:
        return output
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode("".join(picture)))).convert("RGB")
    image.quantize(128).save(buffer, "png", optimize=True)
    return output | {
        "data": output["data"] | {"image/png": base64.b64encode(buffer.getvalue()).decode()}
    }


def main(paths: list[str]) -> None:
    """Clean the notebooks at `paths` in place."""
    for path in map(Path, paths):
        cleaned = without_progress(json.loads(path.read_text(encoding="utf-8")))
        write_atomic(path, json.dumps(cleaned, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
