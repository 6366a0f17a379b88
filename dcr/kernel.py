"""Empirical neural tangent kernel of the first answer token (PAPER "Motivation", item 2).

z(x): logits at the last prompt position; J = ∂z_T/∂θ over one fixed token set T; K(x', x) = J(x') J(x)ᵀ, [k, k].
Reported: ‖K(x', x)‖_F / ‖K(x', x')‖_F (the paper's) and ‖K(x', x)‖_F / √(‖K(x', x')‖_F ‖K(x, x)‖_F) (symmetric).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dcr.chat import render
from dcr.errors import DCRError
from dcr.gradients import Factors, at_embeddings, step_down, trace
from dcr.models import decoder_layers
from dcr.rejection import opening_tokens

log = logging.getLogger("dcr")


@dataclass(frozen=True)
class KernelResult:
    """‖K‖_F between prompts: cross [n_a, n_b], self_a [n_a], self_b [n_b]; `tokens` is the fixed set (or "all")."""

    cross: np.ndarray
    self_a: np.ndarray
    self_b: np.ndarray
    tokens: list[int] | str
    within_a: np.ndarray | None = None
    within_b: np.ndarray | None = None
    relative_error: float = 0.0  # of the random-probe estimate; 0 for exact kernels

    @property
    def normalised(self) -> np.ndarray:
        """The paper's ratio ‖K(x', x)‖ / ‖K(x', x')‖, x' in a, x in b, [n_a, n_b]."""
        return self.cross / self.self_a[:, None]

    @property
    def symmetric(self) -> np.ndarray:
        """‖K(x', x)‖ / √(‖K(x', x')‖ ‖K(x, x)‖), in [0, 1], [n_a, n_b]."""
        return self.cross / np.sqrt(self.self_a[:, None] * self.self_b[None])


def entk(model, tokenizer, prompts_a: Sequence[str], prompts_b: Sequence[str], *, tokens: str = "top-k", k: int = 10,
         parameters: str = "all", seed: int = 0, layers_path: str = "") -> KernelResult:
    """Kernel norms between two lists of prompts.

    tokens: "top-k" (of the mean first-token distribution over both lists), "refusal" (first tokens of the refusal
    openings) or "all" (k random probes: E[(uᵀKv)²] = ‖K‖_F² for independent standard normal u, v; see
    `relative_error`). parameters: "all", "blocks" (decoder blocks) or "lora" (adapter matrices; at initialisation
    B = 0, so only B's gradient is not zero and the kernel is degenerate).
    Raises DCRError for an empty list, an unknown choice, or no such parameters.
    """
    if not len(prompts_a) or not len(prompts_b):
        raise DCRError(f"entk: {len(prompts_a)} and {len(prompts_b)} prompts given; both lists need at least one.")
    texts = render(tokenizer, [*prompts_a, *prompts_b])
    device = next(model.parameters()).device
    ids = [torch.tensor([r], device=device) for r in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    wanted = _wanted(model, parameters, layers_path)
    cotangents, shown = _cotangents(model, tokenizer, ids, tokens, k, seed)
    gram = _gram(model, ids, cotangents, wanted, layers_path)  # [n, n, k, k]
    if tokens == "all":  # u and v must be independent: only pairs of different probes
        off = ~torch.eye(k, dtype=torch.bool)
        squares = gram[..., off].pow(2)
        norms = squares.mean(-1).sqrt()
        halves = [squares[..., i::2].mean(-1) for i in (0, 1)]
        error = float(((halves[0] - halves[1]).abs() / (halves[0] + halves[1])).mean() / 2)
    else:
        norms, error = gram.pow(2).sum((-2, -1)).sqrt(), 0.0
    n_a, values = len(prompts_a), norms.double().cpu().numpy()
    own = np.diag(values).copy()
    return KernelResult(values[:n_a, n_a:], own[:n_a], own[n_a:], shown, values[:n_a, :n_a], values[n_a:, n_a:], error)


def _wanted(model, parameters: str, layers_path: str) -> set[str]:
    names = {n for n, _ in model.named_parameters()}
    if parameters == "blocks":
        blocks = decoder_layers(model, layers_path)
        path = next(n for n, m in model.named_modules() if m is blocks)
        names = {n for n in names if n.startswith(path + ".")}
    elif parameters == "lora":
        names = {n for n in names if "lora_" in n}
        if not names:
            raise DCRError("entk: parameters='lora' but the model has no adapter; use blocks or all.")
    elif parameters != "all":
        raise DCRError(f"entk: parameters={parameters!r} is unknown; use all, blocks or lora.")
    return names


def _cotangents(model, tokenizer, ids: list[Tensor], tokens: str, k: int, seed: int) -> tuple[Tensor, list[int] | str]:
    vocabulary = model.get_output_embeddings().weight.shape[0]
    device = ids[0].device
    if tokens == "all":
        if k < 3:
            raise DCRError(f"entk: tokens='all' needs k >= 3 probes, got {k}.")
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(k, vocabulary, generator=generator).to(device), "all"
    if tokens == "top-k":
        with torch.no_grad():
            mean = sum(model(input_ids=row).logits[0, -1].float().softmax(-1) for row in ids)
        chosen = mean.topk(k).indices.tolist()
    elif tokens == "refusal":
        chosen = sorted({row[0] for row in opening_tokens(tokenizer)})
    else:
        raise DCRError(f"entk: tokens={tokens!r} is unknown; use top-k, refusal or all.")
    return torch.nn.functional.one_hot(torch.tensor(chosen, device=device), vocabulary).float(), chosen


def _gram(model, ids: list[Tensor], cotangents: Tensor, wanted: set[str], layers_path: str) -> Tensor:
    """[n, n, k, k] inner products of the gradients of every pair of prompts and tokens."""
    blocks = decoder_layers(model, layers_path)
    path = next(n for n, m in model.named_modules() if m is blocks)
    n, k = len(ids), len(cotangents)
    total = torch.zeros(n, n, k, k)
    states = [trace(model, row, cotangents, wanted, layers_path)
              for row in tqdm(ids, desc="kernel: forward", leave=False)]
    for name in states[0].small:
        total += _small([s.small[name] for s in states])
    for index in tqdm(range(len(blocks) - 1, -1, -1), desc="kernel: blocks", leave=False):
        parts = [step_down(blocks[index], f"{path}.{index}", index, s, wanted) for s in states]
        for name in parts[0]:
            column = [p[name] for p in parts]
            total += _linear(column) if isinstance(column[0], Factors) else _small(column)
        log.info("kernel: block %d of %d done, %d prompts", len(blocks) - index, len(blocks), n)
    return total + _tables(model, states, cotangents, wanted, layers_path)


def _small(rows: list[Tensor]) -> Tensor:
    flat = torch.cat(rows).float()  # [n * k, size]
    n, k = len(rows), rows[0].shape[0]
    return (flat @ flat.T).reshape(n, k, n, k).permute(0, 2, 1, 3).cpu()


def _linear(column: list[Factors]) -> Tensor:
    """Σ_ts (δ_t·δ'_s)(a_t·a'_s) for all pairs: M = a' aᵀ first, then δ' against M δ; symmetric half computed once."""
    n, k = len(column), column[0].delta.shape[0]
    width = max(f.delta.shape[1] for f in column)
    delta = torch.stack([_padded(f.delta, width, 1) for f in column]).float()  # [n, k, seq, out]
    if column[0].ids is None:
        activation = torch.stack([_padded(f.activation, width, 0) for f in column]).float()  # [n, seq, in]
    else:
        ids = torch.stack([torch.nn.functional.pad(f.ids, (0, width - len(f.ids)), value=-1 - i)
                           for i, f in enumerate(column)])
    out = torch.zeros(n, n, k, k)
    flat = delta.flatten(2)  # [n, k, seq * out]
    for i in range(n):
        if column[0].ids is None:
            overlap = torch.einsum("si,nri->nsr", activation[i], activation[i:])
        else:
            overlap = (ids[i][None, :, None] == ids[i:, None, :]).float()
        pulled = overlap[:, None] @ delta[i:]  # [n - i, k, seq, out]
        rows = torch.einsum("tx,nkx->ntk", flat[i], pulled.flatten(2)).cpu()
        out[i, i:] = rows
        out[i:, i] = rows.transpose(1, 2)
    return out


def _padded(tensor: Tensor, width: int, dim: int) -> Tensor:
    missing = width - tensor.shape[dim]
    return tensor if not missing else torch.nn.functional.pad(tensor, (0, 0, 0, missing))


def _tables(model, states: list, cotangents: Tensor, wanted: set[str], layers_path: str) -> Tensor:
    """Embedding table and LM head, and their cross terms when the two are one matrix."""
    n, k = len(states), len(cotangents)
    total = torch.zeros(n, n, k, k)
    names = {id(m): name for name, m in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    embedding_name = f"{names[id(embedding)]}.weight"
    head_wanted = (embedding_name if tied else f"{names[id(head)]}.weight") in wanted
    if head_wanted:
        inputs = torch.stack([s.head_input for s in states]).float()
        total += ((inputs @ inputs.T)[:, :, None, None] * (cotangents @ cotangents.T)).cpu()
    columns = [at_embeddings(model, s, wanted, layers_path) for s in states]
    for name in columns[0]:
        total += _linear([c[name] for c in columns])
    if tied and head_wanted and names[id(embedding)] in columns[0]:
        total += _tied_cross([c[names[id(embedding)]] for c in columns], inputs, cotangents)
    return total


def _tied_cross(column: list[Factors], inputs: Tensor, cotangents: Tensor) -> Tensor:
    """⟨look-up part of x', head part of x⟩ + the mirrored term: Σ_s (δ'_s·h_x) c[token s]."""
    n, k = len(column), len(cotangents)
    out = torch.zeros(n, n, k, k)
    for i, factors in enumerate(column):
        reach = factors.delta.float() @ inputs.T  # [k, seq, n]
        weight = cotangents[:, factors.ids]  # [k, seq]
        out[i] = torch.einsum("ksn,js->nkj", reach, weight).cpu()
    return out + out.permute(1, 0, 3, 2)

