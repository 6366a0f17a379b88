"""Cleaning a committed notebook: progress bars out, pictures smaller, everything else as it was."""

from __future__ import annotations

import base64
import io
import json

from PIL import Image

from dcr.book.notebook_files import main


def test_progress_goes_pictures_and_text_stay(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 60).convert("RGB").save(buffer, "png")
    picture = base64.b64encode(buffer.getvalue()).decode()
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}}
    outputs = [
        {"output_type": "display_data", "data": view | {"text/plain": "Loading: 0%"}},
        {"output_type": "display_data", "data": view | {"text/plain": "VBox(children=(...))"}},
        {"output_type": "stream", "name": "stderr", "text": "a warning"},
        {"output_type": "stream", "name": "stdout", "text": "a number: 1"},
        {"output_type": "execute_result", "data": {"image/png": picture, "text/plain": "<Figure>"}},
    ]
    path = tmp_path / "a.ipynb"
    path.write_text(
        json.dumps(
            {
                "metadata": {"kernelspec": {"name": "python3"}, "widgets": {"x": 1}},
                "nbformat": 4,
                "cells": [
                    {"cell_type": "markdown", "source": "prose"},
                    {"cell_type": "code", "source": "1", "outputs": outputs},
                ],
            }
        )
    )
    main([str(path)])
    content = json.loads(path.read_text())
    kept = content["cells"][1]["outputs"]
    assert [o.get("name", next(iter(o.get("data", {})), "")) for o in kept] == [
        "application/vnd.jupyter.widget-view+json",
        "stdout",
        "image/png",
    ]
    assert (
        content["metadata"] == {"kernelspec": {"name": "python3"}}
        and content["cells"][0]["source"] == "prose"
    )
    smaller = kept[2]["data"]["image/png"]
    assert len(smaller) < len(picture) and Image.open(
        io.BytesIO(base64.b64decode(smaller))
    ).size == (200, 200)
