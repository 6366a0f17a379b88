"""`layer="auto"`: a few steps of refinement at each candidate ℓ; held-out similarity against general-prompt drift.

The paper says only "a middle layer". Every candidate starts from the same base (its adapter is taken out again).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from dcr.config import RefineConfig
from dcr.data.files import append_jsonl, read_jsonl
from dcr.lm.blocks import decoder_layers, resolve_layer
from dcr.train.contrast import PromptRows, StageOneModel, pooled_states
from dcr.train.losses import drift

log = logging.getLogger("dcr")
SWEEP = "layer_sweep.jsonl"
GENERAL_PROMPTS = 16  # prompts that drift is measured on
SWEEP_RANK = 16  # LoRA rank of the candidates when the refinement itself trains all parameters


AUTO_LAYERS, AUTO_STEPS = (0.25, 0.4, 0.5, 0.6, 0.75, 0.9), 12


@dataclass(frozen=True)
class LayerChoice:
    """The chosen ℓ (number of blocks) and a row per candidate, best first by `score`."""

    layer: int
    table: list[dict]


def choose_layer(
    model,
    tokenizer,
    *,
    toxic: Sequence[str] | pd.DataFrame,
    seemingly_toxic: Sequence[str] | pd.DataFrame,
    general: Sequence[str] | pd.DataFrame | None = None,
    config: RefineConfig,
    seed: int = 0,
    work_dir: str | Path | None = None,
    layers_path: str = "",
    drift_weight: float = 1.0,
) -> LayerChoice:
    """Sweep AUTO_LAYERS with AUTO_STEPS steps each and pick the layer with the best score.

    score = (within − across) − drift_weight · drift: the held-out cosine within the classes less the one across them
    at ℓ, and how far general prompts' last hidden state moved, ‖h − h₀‖²/‖h₀‖² (the whole model runs, so that layers
    can be compared). General prompts: those given, else bundled ones. The sweep trains LoRA even where the refinement
    does not, so that the base is untouched. Finished candidates in `work_dir` are reused.
    """
    from dcr.train.refine import refine

    depth = len(decoder_layers(model, layers_path))
    layers = sorted({resolve_layer(x, depth) for x in AUTO_LAYERS})
    folder = Path(work_dir) if work_dir is not None else None
    done = {r["layer"]: r for r in read_jsonl(folder / SWEEP)} if folder else {}
    rows, watched = [], _general_rows(general, tokenizer, config)
    before: Tensor | None = None
    for layer in layers:
        short = config.replaced(
            layer=layer,
            max_steps=AUTO_STEPS,
            eval_steps=AUTO_STEPS,
            target=-1.0,
            lora_rank=config.lora_rank or SWEEP_RANK,
        )
        if layer not in done:
            if before is None:
                before = _last_states(model, depth, config, layers_path, watched)
            scratch = folder / f"candidate-{layer}" if folder else None
            result = refine(
                model,
                tokenizer,
                toxic=toxic,
                seemingly_toxic=seemingly_toxic,
                general=general,
                config=short,
                seed=seed,
                work_dir=scratch,
                merge=False,
                layers_path=layers_path,
            )
            moved = float(
                drift(_last_states(result.model, depth, config, layers_path, watched), before)
            )
            result.model.unload()  # the base again, adapter out
            last = {k: v for k, v in result.evaluations[-1].items() if k != "step"}
            done[layer] = {
                "layer": layer,
                "fraction": round(layer / depth, 3),
                "steps": len(result.history),
                **last,
                "general_drift": moved,
                "seconds": result.history[-1]["seconds"],
                "score": last["within_similarity"]
                - last["cross_similarity"]
                - drift_weight * moved,
            }
            if folder and (
                not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
            ):
                append_jsonl(folder / SWEEP, done[layer])
                shutil.rmtree(scratch, ignore_errors=True)
        rows.append(done[layer])
        log.info("layer choice: %s", json.dumps(done[layer]))
    rows = sorted(rows, key=lambda r: -r["score"])
    log.info("layer choice: layer %d of %d", rows[0]["layer"], depth)
    return LayerChoice(rows[0]["layer"], rows)


def _general_rows(general, tokenizer, config: RefineConfig) -> PromptRows:
    if general is None or not len(general):
        from dcr.data.loaders import load_bundled

        rows = load_bundled("general")
        general = rows[rows["split"] == "train"]
    texts = list(general["text"] if isinstance(general, pd.DataFrame) else general)[
        :GENERAL_PROMPTS
    ]
    return PromptRows(
        pd.DataFrame({"text": texts, "label": "general"}), tokenizer, config.max_length
    )


def _last_states(
    model, depth: int, config: RefineConfig, layers_path: str, rows: PromptRows
) -> Tensor:
    return pooled_states(
        StageOneModel(model, depth, config.pooling, layers_path), rows, range(len(rows))
    )
