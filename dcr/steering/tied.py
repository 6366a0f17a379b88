"""Tied directions (after LLM-VA, ACL 2026): a closed-form edit of what blocks write with.

v_a is the direction along which prompts that the model answers differ from those it refuses, v_b
the one along which harmless differ from toxic. For a matrix that maps x to xW, W' = W + s
((σa/σb) W v_b − W v_a) v_aᵀ: at strength 1 what it writes along v_a is what it wrote along v_b, on
v_a's scale, so that the decision to answer follows harm. Directions from training pairs in both
forms; strength and blocks from validation prompts; repeated while validation improves.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dcr.analysis.probes import fit_probe, is_toxic
from dcr.analysis.refusal import refusal_score
from dcr.errors import DCRError
from dcr.lm.blocks import decoder_layers, is_linear, replaced
from dcr.steering.gate import balanced_auroc, check_sources
from dcr.steering.hooks import FEED_FORWARD, Fit, Material, Steering, part_of

log = logging.getLogger("dcr")
STRENGTHS = (0.5, 1.0)
STARTS = (0.4, 0.6, 0.8)  # first edited block, as a share of depth; all above it are edited as well
LEAST_GAIN = 0.002  # of AUROC on validation prompts, for an iteration to be kept


@dataclass(frozen=True)
class Tied(Steering):
    """facts: what each iteration chose and reached; tensors: {parameter: its new value}."""

    ANCHORS = ("pairs",)
    LONG = True

    @classmethod
    def fitted(cls, on: Material) -> Fit:
        """The edit from anchors of role pairs; the model itself is as before afterwards.

        Raises DCRError for a source with one class only, or a class in one form only.
        """
        prompts = on.anchors["pairs"].reset_index(drop=True)
        check_sources(prompts)
        texts, rows, harmless = prompts["text"].tolist(), on.rows("pairs"), 1 - is_toxic(prompts)
        held = on.validation[on.validation["label"] != "general"].reset_index(drop=True)

        def reached() -> float:
            score = refusal_score(on.model, on.tokenizer, held["text"].tolist())
            return balanced_auroc(held, score)

        depth = len(decoder_layers(on.model, on.layers_path))
        kept: dict[str, Tensor] = {}
        history: list[dict] = [{"validation_auroc": reached()}]
        for _ in range(on.options.tied_iterations):
            with replaced(on.model, kept):
                refusing = refusal_score(on.model, on.tokenizer, texts)
                states = on.residuals(rows, [(-1, None)])[1:, :, 0]
                answered = (refusing < np.median(refusing)).astype(int)
                tried = []
                for start, strength in itertools.product(STARTS, STRENGTHS):
                    first, classes = int(start * depth), (answered, harmless)
                    blocks, path = range(first, depth), on.layers_path
                    edit = tied(on.model, states, classes, blocks, strength, path)
                    with replaced(on.model, edit):
                        tried.append((reached(), first, strength, edit))
            auroc, first, strength, edit = max(tried, key=lambda t: (t[0], -t[1], t[2]))
            log.info("tied: blocks from %d, strength %.1f: AUROC %.3f", first, strength, auroc)
            if auroc < history[-1]["validation_auroc"] + LEAST_GAIN:
                break
            kept |= edit
            chosen = {"first_block": first, "strength": strength}
            history.append({"validation_auroc": auroc, **chosen})
        sources = sorted(prompts["source"].unique())
        return {"iterations": history, "sources": sources, "prompts": len(prompts)}, kept


def tied(
    model: nn.Module,
    states: Tensor,
    classes: tuple[np.ndarray, np.ndarray],
    blocks: Sequence[int],
    strength: float = 1.0,
    layers_path: str = "",
) -> dict[str, Tensor]:
    """{parameter: its new value} of the down-projections of `blocks`.

    states [layers, n, hidden] fp32 at the blocks' outputs; classes: answered and harmless, [n] in
    {0, 1}.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    layers, out = decoder_layers(model, layers_path), {}
    for i in blocks:
        directions = [fit_probe(states[i].numpy(), y).weight for y in classes]
        a, b = (torch.tensor(v / np.linalg.norm(v), dtype=torch.float32) for v in directions)
        ratio = float((states[i] @ a).std() / (states[i] @ b).std())
        module: Any = down_projection(layers[i])
        for parameter in filter(lambda p: p is not None, (module.weight, module.bias)):
            stored = type(module).__name__ == "Conv1D" or parameter.dim() == 1
            whole = parameter.detach().float()
            whole = whole if stored else whole.T  # [in, out], or [out] of a bias
            va, vb = a.to(whole), b.to(whole)
            moved = ratio * (whole @ vb) - whole @ va  # [in], or one number for a bias
            edit = whole + strength * moved.unsqueeze(-1) * va
            out[names[id(parameter)]] = (edit if stored else edit.T).to(parameter).contiguous()
    return out


def down_projection(block: nn.Module) -> nn.Module:
    """The last linear layer of a block's MLP. Raises DCRError for a block whose MLP is unknown."""
    part = part_of(block, FEED_FORWARD)
    linear = [m for m in part.modules() if is_linear(m)]
    if not linear or hasattr(part, "experts"):
        raise DCRError(f"Tied: {type(part).__name__} has no single down-projection to edit.")
    return linear[-1]
