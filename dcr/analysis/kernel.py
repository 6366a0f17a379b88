"""Empirical neural tangent kernel of the first answer token (PAPER "Motivation", item 2).

z(x): logits at the last prompt position; J = ∂z_T/∂θ over one fixed token set T; the kernel of two
prompts is K(x', x) = J(x') J(x)ᵀ, [k, k]. Reported: ‖K(x', x)‖_F / ‖K(x', x')‖_F (the paper's) and
‖K(x', x)‖_F / √(‖K(x', x')‖_F ‖K(x, x)‖_F) (symmetric).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from dcr.analysis.gradients import Factors, Trace, at_embeddings, grads_on, step_down, trace
from dcr.analysis.refusal import opening_tokens
from dcr.data.read import prompts_of
from dcr.errors import DCRError
from dcr.lm.batches import common_prefix, fitted, named
from dcr.lm.blocks import decoder_layers
from dcr.lm.chat import encode_prompts

log = logging.getLogger("dcr")
CHUNK = 8  # prompts set against one prompt at a time: bounds memory
AGREES = 0.005  # relative difference from autograd that rounding may make, in fp32
AGREES_BF16 = 0.1


@dataclass(frozen=True)
class KernelResult:
    """‖K‖_F between prompts: cross [n_a, n_b], self_a [n_a], self_b [n_b], within_a, within_b."""

    cross: np.ndarray
    self_a: np.ndarray
    self_b: np.ndarray
    tokens: list[int] | str  # the fixed set, or "all"
    within_a: np.ndarray
    within_b: np.ndarray
    cross_low: np.ndarray | None = None  # 95 % interval of the random-probe estimate; None if exact
    cross_high: np.ndarray | None = None
    degenerate: bool = False  # adapters at initialisation: only B has a gradient

    @property
    def normalised(self) -> np.ndarray:
        """The paper's ratio ‖K(x', x)‖ / ‖K(x', x')‖, x' in a, x in b, [n_a, n_b]."""
        return self.cross / self.self_a[:, None]

    @property
    def symmetric(self) -> np.ndarray:
        """‖K(x', x)‖ / √(‖K(x', x')‖ ‖K(x, x)‖), in [0, 1], [n_a, n_b]."""
        return self.cross / np.sqrt(self.self_a[:, None] * self.self_b[None])


def entk(  # noqa: PLR0913
    model,
    tokenizer,
    prompts_a: Sequence[str],
    prompts_b: Sequence[str],
    *,
    tokens: str = "top-k",
    k: int = 10,
    parameters: str = "all",
    seed: int = 0,
    layers_path: str = "",
    max_length: int | None = None,
    truncate: bool = False,
) -> KernelResult:
    """Kernel norms between two lists of prompts.

    tokens: "top-k" (of the mean first-token distribution over both lists), "refusal" (first tokens
    of the refusal openings) or "all" (k random probes: E[(uᵀKv)²] = ‖K‖_F² for independent standard
    normal u, v, with an interval). parameters: "all", "blocks" (decoder blocks) or "lora" (adapter
    matrices; at initialisation B = 0, so only B's gradient is not zero: degenerate, and said so).
    Raises DCRError for an empty list, an unknown choice, no such parameters, a prompt over the
    context length (unless `truncate`: its last tokens are kept), gradients that are not finite, or
    a model whose gradients, put together from factors, are not autograd's.
    """
    if not len(prompts_a) or not len(prompts_b):
        raise DCRError(
            f"entk: {len(prompts_a)} and {len(prompts_b)} prompts; give at least one each."
        )
    sides = [prompts_of(side) for side in (prompts_a, prompts_b)]
    prompts = pd.concat(sides, ignore_index=True)
    rows = encode_prompts(tokenizer, prompts["text"].tolist())
    rows = fitted(model, rows, prompts, max_length, truncate=truncate)
    device = next(model.parameters()).device
    ids = [torch.tensor([r], device=device) for r in rows]
    wanted = _wanted(model, parameters, layers_path)
    trained = any(bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n)
    degenerate = parameters == "lora" and not trained
    if degenerate:
        log.warning(
            "entk: the adapters are at their initialisation (B = 0): A has no gradient yet, so this "
            "kernel sees only B's and is degenerate; take parameters='blocks' or a trained adapter"
        )
    cotangents, shown = _cotangents(model, tokenizer, ids, tokens, k, seed)
    gram = _gram(model, ids, cotangents, wanted, layers_path)  # [n, n, k, k]
    own = gram.diagonal().permute(2, 0, 1)  # [n, k, k]
    bad = ~torch.isfinite(own.sum((-2, -1)))
    if bad.any():
        raise DCRError(
            f"entk: gradients of {named(prompts, int(bad.int().argmax()))} are not finite; load the "
            "model in fp32 or look at that prompt."
        )
    _check(model, ids[0], cotangents[0], wanted, float(own[0, 0, 0]))
    low = high = None
    if tokens == "all":
        norms, low, high = (x.numpy() for x in _probe_norms(gram))
    else:
        norms = gram.double().pow(2).sum((-2, -1)).sqrt().numpy()
    n_a, diagonal = len(prompts_a), norms.diagonal().copy()
    cross = (slice(None, n_a), slice(n_a, None))
    return KernelResult(
        norms[cross],
        diagonal[:n_a],
        diagonal[n_a:],
        shown,
        norms[:n_a, :n_a],
        norms[n_a:, n_a:],
        None if low is None else low[cross],
        None if high is None else high[cross],
        degenerate,
    )


def class_matrix(
    norms: np.ndarray | Sequence[np.ndarray],
    labels: Sequence[str],
    *,
    seed: int = 0,
    n_boot: int = 500,
) -> pd.DataFrame:
    """Rows class_a, class_b, normalised, symmetric, each with _low and _high, n.

    norms: ‖K(x', x)‖_F, [n, n], x' of class_a, x of class_b; or several, one a seed, on the same
    prompts. A prompt is never set against itself. Intervals (95 %) draw prompts, not pairs, and
    seeds. Raises DCRError for a class with fewer than 2 prompts.
    """
    stack = np.stack(norms if isinstance(norms, (list, tuple)) else [norms])  # [seeds, n, n]
    own = np.diagonal(stack, axis1=1, axis2=2)  # [seeds, n]
    members = {c: np.flatnonzero(np.asarray(labels) == c) for c in dict.fromkeys(labels)}
    for name, found in members.items():
        if len(found) < 2:
            raise DCRError(
                f"kernel by class: {len(found)} prompt of class {name!r}; give at least 2."
            )
    ratios = {
        "normalised": stack / own[:, :, None],
        "symmetric": stack / np.sqrt(own[:, :, None] * own[:, None]),
    }
    rng, rows = np.random.default_rng([seed, 0x4B]), []
    for a, i in members.items():
        for b, j in members.items():
            drawn = [
                (rng.choice(i, len(i)), rng.choice(j, len(j)), rng.choice(len(stack), len(stack)))
                for _ in range(n_boot)
            ]
            if a == b:
                drawn = [(x, x, s) for x, _, s in drawn if len(set(x)) > 1]
            row: dict[str, object] = {"class_a": a, "class_b": b}
            for name, ratio in ratios.items():
                draws = [_mean_of_others(ratio[s], x, y) for x, y, s in drawn]
                low, high = np.quantile(draws, [0.025, 0.975])
                value = _mean_of_others(ratio, i, j)
                row |= {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}
            rows.append({**row, "n": len(i) * len(j) - (len(i) if a == b else 0)})
    return pd.DataFrame(rows)


def _mean_of_others(ratio: np.ndarray, i: np.ndarray, j: np.ndarray) -> float:
    return float(ratio[:, i[:, None], j[None]][:, i[:, None] != j[None]].mean())


def _probe_norms(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """‖K‖_F with a 95 % interval: (uᵀKv)² over pairs of different probes, jackknifed over probes."""
    k = gram.shape[-1]
    squares = gram.double().pow(2) * ~torch.eye(k, dtype=torch.bool)  # u, v must be independent
    whole = squares.sum((-2, -1))
    without = (whole[..., None] - squares.sum(-1) - squares.sum(-2)) / ((k - 1) * (k - 2))
    mean = whole / (k * (k - 1))
    half = 1.96 * ((k - 1) / k * (without - without.mean(-1, keepdim=True)).pow(2).sum(-1)).sqrt()
    return mean.sqrt(), (mean - half).clamp(min=0).sqrt(), (mean + half).sqrt()


def _wanted(model, parameters: str, layers_path: str) -> set[str]:
    names = {n for n, _ in model.named_parameters()}
    if parameters == "blocks":
        path = _path(model, layers_path)
        names = {n for n in names if n.startswith(path + ".")}
    elif parameters == "lora":
        names = {n for n in names if "lora_" in n}
        if not names:
            raise DCRError(
                "entk: parameters='lora' but the model has no adapter; use blocks or all."
            )
    elif parameters != "all":
        raise DCRError(f"entk: parameters={parameters!r} is unknown; use all, blocks or lora.")
    return names


def _path(model, layers_path: str) -> str:
    blocks = decoder_layers(model, layers_path)
    return next(n for n, m in model.named_modules() if m is blocks)


def _cotangents(
    model, tokenizer, ids: list[Tensor], tokens: str, k: int, seed: int
) -> tuple[Tensor, list[int] | str]:
    vocabulary, device = model.get_output_embeddings().weight.shape[0], ids[0].device
    if tokens == "all":
        if k < 3:
            raise DCRError(f"entk: tokens='all' needs k >= 3 probes, got {k}.")
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(k, vocabulary, generator=generator).to(device), "all"
    if tokens == "top-k":
        mean = torch.zeros(vocabulary, device=device)
        with torch.no_grad():
            for row in ids:
                logits = model(input_ids=row, use_cache=False, logits_to_keep=1).logits[0, -1]
                mean += logits.float().softmax(-1)
        chosen = mean.topk(k).indices.tolist()
    elif tokens == "refusal":
        chosen = sorted({row[0] for row in opening_tokens(tokenizer)})
    else:
        raise DCRError(f"entk: tokens={tokens!r} is unknown; use top-k, refusal or all.")
    index = torch.tensor(chosen, device=device)
    return torch.nn.functional.one_hot(index, vocabulary).float(), chosen


def _check(model, row: Tensor, cotangent: Tensor, wanted: set[str], ours: float) -> None:
    """Set one prompt's squared gradient against autograd's, which frees each gradient as it goes.

    Refuses models whose logits or weights pass through something that the factors do not know.
    """
    parameters = [p for n, p in model.named_parameters() if n in wanted]
    kept, squares = [p.grad for p in parameters], []

    def count(parameter: Tensor) -> None:
        squares.append(parameter.grad.float().pow(2).sum())
        parameter.grad = None

    with grads_on(parameters), torch.enable_grad():
        hooks = [p.register_post_accumulate_grad_hook(count) for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            logits = model(input_ids=row, use_cache=False, logits_to_keep=1).logits[0, -1]
            (logits * cotangent).sum().backward(inputs=parameters)
        finally:
            for hook in hooks:
                hook.remove()
            for p, grad in zip(parameters, kept, strict=True):
                p.grad = grad
    exact = float(sum(squares))
    allowed = AGREES if logits.dtype == torch.float32 else AGREES_BF16
    if abs(ours - exact) > allowed * max(exact, 1e-30):
        raise DCRError(
            f"entk: {type(model).__name__} is not known well enough: the kernel of the first prompt "
            f"is {ours:.4g} from its layers and {exact:.4g} by autograd. Take parameters='blocks', "
            "or another architecture."
        )


def _gram(
    model, ids: list[Tensor], cotangents: Tensor, wanted: set[str], layers_path: str
) -> Tensor:
    """[n, n, k, k] inner products of the gradients of every pair of prompts and tokens."""
    blocks, path = decoder_layers(model, layers_path), _path(model, layers_path)
    n, k = len(ids), len(cotangents)
    total = torch.zeros(n, n, k, k)
    shared = common_prefix([row[0].tolist() for row in ids], at_least=1)
    states = [
        trace(model, row, cotangents, wanted, layers_path)
        for row in tqdm(ids, desc="kernel: forward", leave=False)
    ]
    for index in tqdm(range(len(blocks) - 1, -1, -1), desc="kernel: blocks", leave=False):
        parts = [step_down(blocks[index], f"{path}.{index}", index, s, wanted) for s in states]
        for name in list(parts[0]):
            column = [p.pop(name) for p in parts]
            total += _linear(column, shared) if isinstance(column[0], Factors) else _small(column)
        log.info("kernel: block %d of %d done, %d prompts", len(blocks) - index, len(blocks), n)
    total += _tables(model, states, cotangents, wanted, layers_path)
    for name in states[0].small:
        total += _small([s.small[name] for s in states])
    return total


def _small(rows: list[Tensor]) -> Tensor:
    flat = torch.cat(rows).float()  # [n * k, size]
    n, k = len(rows), rows[0].shape[0]
    return (flat @ flat.T).reshape(n, k, n, k).permute(0, 2, 1, 3).cpu()  # [n, n, k, k]


def _linear(column: list[Factors], shared: int = 0) -> Tensor:
    """Σ_ts (δ_t·δ'_s)(a_t·a'_s) for all pairs of prompts and tokens, [n, n, k, k].

    All prompts begin with the same `shared` tokens (the chat template), whose activations are the
    same as well. In an orthonormal basis Q of those, every gradient is B Qᵀ + R with R Q = 0: one
    matrix product serves the first part, and only a prompt's own tokens are left to be set against
    each other's. Padded places have δ = 0.
    """
    n, k = len(column), column[0].delta.shape[0]
    delta = pad_sequence([f.delta.float().transpose(0, 1) for f in column], True)
    delta = delta.permute(0, 2, 3, 1)  # [n, seq, k, out] -> [n, k, out, seq]
    if column[0].activation.dim() == 1:  # rows of a table: one-hot activations
        ids = pad_sequence([f.activation for f in column], True)
        return _pairwise(delta, lambda part, i: (ids[part][:, :, None] == ids[i]).float())
    activation = pad_sequence([f.activation.float() for f in column], True)  # [n, seq, in]
    total: Tensor | float = 0.0
    if shared:
        basis = torch.linalg.qr(activation[0, :shared].T).Q  # [in, <= shared]
        coordinates = activation @ basis  # [n, seq, <= shared]
        common = (delta.flatten(1, 2) @ coordinates).reshape(n * k, -1)
        total = (common @ common.T).reshape(n, k, n, k).transpose(1, 2).cpu()
        activation = activation[:, shared:] - coordinates[:, shared:] @ basis.T
        delta = delta[..., shared:]
    return total + _pairwise(delta.contiguous(), lambda part, i: activation[part] @ activation[i].T)


def _pairwise(delta: Tensor, overlap: Callable[[slice, int], Tensor]) -> Tensor:
    """[n, n, k, k] from δ [n, k, out, seq] and `overlap(part, i)` [m, seq, seq of i]."""
    n, k = delta.shape[:2]
    out = torch.zeros(n, n, k, k)
    for i in range(n):
        own = delta[i].flatten(1)  # [k, out * seq]
        for start in range(i, n, CHUNK):
            part = slice(start, min(start + CHUNK, n))
            pulled = delta[part].flatten(1, 2) @ overlap(part, i)  # [m, k * out, seq]
            rows = own @ pulled.reshape(-1, own.shape[1]).T  # [k, m * k]
            rows = rows.reshape(k, -1, k).transpose(0, 1).cpu()  # [m, k, k]
            out[i, part], out[part, i] = rows, rows.transpose(1, 2)
    return out


def _tables(
    model, states: list[Trace], cotangents: Tensor, wanted: set[str], layers_path: str
) -> Tensor:
    """Embedding tables and LM head, and their cross terms when the two are one matrix."""
    total = torch.zeros(len(states), len(states), len(cotangents), len(cotangents))
    names = {id(p): n for n, p in model.named_parameters()}
    head = names.get(id(model.get_output_embeddings().weight), "")
    columns = [at_embeddings(model, s, wanted, layers_path) for s in states]
    for name in columns[0]:
        total += _linear([c[name] for c in columns])
    if head in wanted:
        inputs = torch.stack([s.head_input for s in states]).float()  # [n, hidden]
        deltas = torch.stack([s.head_delta for s in states]).float()  # [n, k, m]
        total += _small(list(deltas)) * (inputs @ inputs.T)[:, :, None, None].cpu()
        if head in columns[0]:
            total += _tied_cross([c[head] for c in columns], inputs, deltas, cotangents)
    return total


def _tied_cross(
    column: list[Factors], inputs: Tensor, deltas: Tensor, cotangents: Tensor
) -> Tensor:
    """⟨look-up part of x', head part of x⟩ + the mirrored term: Σ_s (δ'_s·h_x) δ_head,x[token s]."""
    asked = cotangents.any(0)
    place = torch.where(asked, asked.cumsum(0) - 1, deltas.shape[-1])  # token -> column of deltas
    heads = torch.nn.functional.pad(deltas, (0, 1))  # [n, k, m + 1], zero for what is not asked
    parts = [
        torch.einsum("ksn,njs->nkj", f.delta.float() @ inputs.T, heads[..., place[f.activation]])
        for f in column
    ]
    out = torch.stack(parts).cpu()  # [n, n, k, k]
    return out + out.permute(1, 0, 3, 2)
