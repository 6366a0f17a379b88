"""Empirical neural tangent kernel of the first answer token (PAPER "Motivation", item 2).

z(x): logits at the last prompt position; J = ∂z_T/∂θ over one fixed token set T; the kernel of two
prompts is K(x', x) = J(x') J(x)ᵀ, [k, k]. Reported: ‖K(x', x)‖_F / ‖K(x', x')‖_F (the paper's) and
‖K(x', x)‖_F / √(‖K(x', x')‖_F ‖K(x, x)‖_F) (symmetric).
"""

import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dcr.analysis.gradients import grads_on
from dcr.analysis.gram import check, gram
from dcr.analysis.refusal import opening_tokens
from dcr.data.read import prompts_of
from dcr.errors import DCRError
from dcr.lm.batches import fitted, named
from dcr.lm.blocks import decoder_layers
from dcr.lm.chat import encode_prompts
from dcr.lm.states import last_logits

log = logging.getLogger("dcr")


@dataclass(frozen=True)
class KernelResult:
    """‖K‖_F of all pairs of prompts, first those of list a, then those of list b, [n, n]."""

    norms: np.ndarray
    n_a: int
    tokens: list[int] | str  # the fixed set, or "all"
    interval: tuple[np.ndarray, np.ndarray] | None = None  # 95 %, of the random-probe estimate
    degenerate: bool = False  # adapters at initialisation: only B has a gradient

    @property
    def cross(self) -> np.ndarray:
        """‖K(x', x)‖, x' in a, x in b, [n_a, n_b]."""
        return self.norms[: self.n_a, self.n_a :]

    @property
    def normalised(self) -> np.ndarray:
        """The paper's ratio ‖K(x', x)‖ / ‖K(x', x')‖, [n_a, n_b]."""
        return self.cross / self.norms.diagonal()[: self.n_a, None]

    @property
    def symmetric(self) -> np.ndarray:
        """‖K(x', x)‖ / √(‖K(x', x')‖ ‖K(x, x)‖), in [0, 1], [n_a, n_b]."""
        own = self.norms.diagonal()
        return self.cross / np.sqrt(own[: self.n_a, None] * own[None, self.n_a :])


def entk(  # noqa: PLR0913
    model,
    tokenizer,
    prompts_a,
    prompts_b,
    *,
    tokens: str = "top-k",
    k: int = 10,
    parameters: str = "all",
    seed: int = 0,
    layers_path: str = "",
    truncate: bool = False,
) -> KernelResult:
    """Kernel norms between two lists of prompts (or what else `prompts_of` takes).

    tokens: "top-k" (of the mean first-token distribution over both lists), "refusal" (first tokens
    of the refusal openings) or "all" (k random probes: E[(uᵀKv)²] = ‖K‖_F² for independent standard
    normal u, v, with an interval). parameters: "all", "blocks" (decoder blocks) or "lora" (adapter
    matrices; at initialisation B = 0, so only B's gradient is not zero: degenerate, and said so).
    Raises DCRError for an empty list, an unknown choice, k out of range, no such parameters, a
    prompt over the context length (unless `truncate`: its last tokens are kept), gradients that are
    not finite, or a model whose gradients, put together from factors, are not autograd's.
    """
    given = {"prompts_a": prompts_a, "prompts_b": prompts_b}
    sides = [prompts_of(side, what=name) for name, side in given.items()]
    prompts, n_a = pd.concat(sides, ignore_index=True), len(sides[0])
    rows = encode_prompts(tokenizer, prompts["text"].tolist())
    rows = fitted(model, rows, prompts, truncate=truncate)
    device = next(model.parameters()).device
    ids = [torch.tensor([r], device=device) for r in rows]
    wanted = _wanted(model, parameters, layers_path)
    trained = any(bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n)
    degenerate = parameters == "lora" and not trained
    if degenerate:
        log.warning(
            "entk: the adapters are at their initialisation (B = 0): A has no gradient yet, so "
            "this kernel of B's alone is degenerate; take parameters='blocks' or a trained adapter"
        )
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if not (least := 3 if tokens == "all" else 1) <= k <= vocabulary:
        raise DCRError(f"entk: k={k}; tokens={tokens!r} needs k >= {least} and <= {vocabulary}.")
    if tokens == "all":
        shown: list[int] | str = "all"
        cotangents = torch.randn(k, vocabulary, generator=torch.Generator().manual_seed(seed))
    else:
        shown = _fixed_set(model, tokenizer, rows, tokens, k)
        cotangents = one_hot(torch.tensor(shown), vocabulary).float()
    with grads_on(model, wanted):
        inner = gram(model, ids, cotangents.to(device), wanted, layers_path)  # [n, n, k, k]
        own = inner.diagonal().permute(2, 0, 1)  # [n, k, k]
        bad = ~torch.isfinite(own.sum((-2, -1)))
        if bad.any():
            row = named(prompts, int(bad.int().argmax()))
            raise DCRError(f"entk: gradients of {row} are not finite; load the model in fp32.")
        check(model, ids[0], cotangents[0].to(device), wanted, float(own[0, 0, 0]))
    if tokens == "all":
        norms, low, high = _probe_norms(inner)
        return KernelResult(norms, n_a, shown, (low, high), degenerate)
    norms = inner.double().pow(2).sum((-2, -1)).sqrt().numpy()
    return KernelResult(norms, n_a, shown, degenerate=degenerate)


def _probe_norms(gram: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """‖K‖_F with a 95 % interval: (uᵀKv)² over pairs of different probes, jackknifed."""
    k = gram.shape[-1]
    squares = gram.double().pow(2) * ~torch.eye(k, dtype=torch.bool)  # u, v must be independent
    whole = squares.sum((-2, -1))
    without = (whole[..., None] - squares.sum(-1) - squares.sum(-2)) / ((k - 1) * (k - 2))
    mean = whole / (k * (k - 1))
    half = 1.96 * ((k - 1) / k * (without - without.mean(-1, keepdim=True)).pow(2).sum(-1)).sqrt()
    low, high = (mean - half).clamp(min=0), mean + half
    return mean.sqrt().numpy(), low.sqrt().numpy(), high.sqrt().numpy()


def _wanted(model, parameters: str, layers_path: str) -> set[str]:
    """Names of the parameters that a choice means."""
    names = {n for n, _ in model.named_parameters()}
    if parameters == "all":
        return names
    if parameters == "blocks":
        blocks = {id(p) for p in decoder_layers(model, layers_path).parameters()}
        return {n for n, p in model.named_parameters() if id(p) in blocks}
    if parameters != "lora":
        raise DCRError(f"entk: parameters={parameters!r} is unknown; use all, blocks or lora.")
    if not (adapters := {n for n in names if "lora_" in n}):
        raise DCRError("entk: parameters='lora' but the model has no adapter; use blocks or all.")
    return adapters


def _fixed_set(model, tokenizer, rows: list[list[int]], tokens: str, k: int) -> list[int]:
    """The fixed token set that a choice means."""
    if tokens == "top-k":
        return last_logits(model, rows).softmax(-1).mean(0).topk(k).indices.tolist()
    if tokens == "refusal":
        return sorted({row[0] for row in opening_tokens(tokenizer)})
    raise DCRError(f"entk: tokens={tokens!r} is unknown; use top-k, refusal or all.")
