"""Empirical neural tangent kernel of the first answer token (PAPER "Motivation", item 2).

z(x): logits at the last prompt position; J = ∂z_T/∂θ over one fixed token set T; K(x', x) = J(x') J(x)ᵀ, [k, k].
Reported: ‖K(x', x)‖_F / ‖K(x', x')‖_F (the paper's) and ‖K(x', x)‖_F / √(‖K(x', x')‖_F ‖K(x, x)‖_F) (symmetric).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dcr.analysis.gradients import Factors, at_embeddings, step_down, trace
from dcr.analysis.refusal import opening_tokens
from dcr.errors import DCRError
from dcr.lm.batches import common_prefix
from dcr.lm.blocks import decoder_layers
from dcr.lm.chat import render
from dcr.lm.states import check_lengths

log = logging.getLogger("dcr")
CHUNK = 8  # prompts set against one prompt at a time: bounds memory


@dataclass(frozen=True)
class KernelResult:
    """‖K‖_F between prompts: cross [n_a, n_b], self_a [n_a], self_b [n_b]; `tokens` is the fixed set (or "all")."""

    cross: np.ndarray
    self_a: np.ndarray
    self_b: np.ndarray
    tokens: list[int] | str
    within_a: np.ndarray | None = None
    within_b: np.ndarray | None = None
    cross_low: np.ndarray | None = (
        None  # 95 % interval of the random-probe estimate; None for exact kernels
    )
    cross_high: np.ndarray | None = None
    degenerate: bool = (
        False  # adapters at initialisation: B = 0, so A's gradient is zero and only B's counts
    )

    @property
    def normalised(self) -> np.ndarray:
        """The paper's ratio ‖K(x', x)‖ / ‖K(x', x')‖, x' in a, x in b, [n_a, n_b]."""
        return self.cross / self.self_a[:, None]

    @property
    def symmetric(self) -> np.ndarray:
        """‖K(x', x)‖ / √(‖K(x', x')‖ ‖K(x, x)‖), in [0, 1], [n_a, n_b]."""
        return self.cross / np.sqrt(self.self_a[:, None] * self.self_b[None])


def entk(
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

    tokens: "top-k" (of the mean first-token distribution over both lists), "refusal" (first tokens of the refusal
    openings) or "all" (k random probes: E[(uᵀKv)²] = ‖K‖_F² for independent standard normal u, v, with an interval).
    parameters: "all", "blocks" (decoder blocks) or "lora" (adapter matrices; at initialisation B = 0, so only B's
    gradient is not zero: the kernel is degenerate, said in the log and in the result).
    Raises DCRError for an empty list, an unknown choice, no such parameters, a prompt over the context length (unless
    `truncate`: the last tokens are kept), or gradients that are not finite.
    """
    if not len(prompts_a) or not len(prompts_b):
        raise DCRError(
            f"entk: {len(prompts_a)} and {len(prompts_b)} prompts given; both lists need at least one."
        )
    texts = render(tokenizer, [*prompts_a, *prompts_b])
    device = next(model.parameters()).device
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    limit = check_lengths(
        model, [len(r) for r in rows], [*prompts_a, *prompts_b], max_length, truncate
    )
    ids = [torch.tensor([r[-limit:]], device=device) for r in rows]
    wanted = _wanted(model, parameters, layers_path)
    degenerate = parameters == "lora" and not any(
        bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n
    )
    if degenerate:
        log.warning(
            "entk: the adapters are at their initialisation (B = 0): A has no gradient yet, so this kernel sees only "
            "B's and is degenerate; take parameters='blocks' or a trained adapter"
        )
    cotangents, shown = _cotangents(model, tokenizer, ids, tokens, k, seed)
    gram = _gram(model, ids, cotangents, wanted, layers_path)  # [n, n, k, k]
    bad = ~torch.isfinite(torch.stack([gram[i, i].sum() for i in range(len(ids))]))
    if bad.any():
        raise DCRError(
            f"entk: gradients of prompt {int(bad.int().argmax())} are not finite; load the model in float32 or "
            "look at that prompt."
        )
    norms, low, high = (
        _probe_norms(gram) if tokens == "all" else (gram.pow(2).sum((-2, -1)).sqrt(), None, None)
    )
    n_a, values = len(prompts_a), norms.double().cpu().numpy()
    own, cross = np.diag(values).copy(), (slice(None, n_a), slice(n_a, None))
    return KernelResult(
        values[cross],
        own[:n_a],
        own[n_a:],
        shown,
        values[:n_a, :n_a],
        values[n_a:, n_a:],
        None if low is None else low[cross].numpy(),
        None if high is None else high[cross].numpy(),
        degenerate,
    )


def _probe_norms(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """‖K‖_F with a 95 % interval from probes: the mean of (uᵀKv)² over pairs of different probes, jackknifed over probes."""
    k = gram.shape[-1]
    squares = gram.double().pow(2) * (
        ~torch.eye(k, dtype=torch.bool)
    )  # u and v must be independent: a probe and itself are not
    whole = squares.sum((-2, -1))
    without = (whole[..., None] - squares.sum(-1) - squares.sum(-2)) / ((k - 1) * (k - 2))
    mean = whole / (k * (k - 1))
    half = 1.96 * ((k - 1) / k * (without - without.mean(-1, keepdim=True)).pow(2).sum(-1)).sqrt()
    return mean.sqrt(), (mean - half).clamp(min=0).sqrt(), (mean + half).sqrt()


def class_matrix(
    norms: np.ndarray, labels: Sequence[str], *, seed: int = 0, n_boot: int = 500
) -> pd.DataFrame:
    """Rows class_a, class_b, normalised, symmetric, each with _low and _high, n: class-by-class means of both ratios.

    norms: ‖K(x', x)‖_F, [n, n]; x' of class_a, x of class_b. A prompt is never set against itself. Intervals (95 %) draw
    prompts with replacement, not pairs. Raises DCRError for a class with fewer than 2 prompts.
    """
    labels, own = np.asarray(labels), np.diag(norms)
    members = {c: np.flatnonzero(labels == c) for c in dict.fromkeys(labels.tolist())}
    for name, rows in members.items():
        if len(rows) < 2:
            raise DCRError(
                f"kernel by class: {len(rows)} prompt of class {name!r}; give at least 2."
            )
    ratios = {"normalised": norms / own[:, None], "symmetric": norms / np.sqrt(np.outer(own, own))}
    rng, rows = np.random.default_rng([seed, 0x4B]), []
    for a, i in members.items():
        for b, j in members.items():
            row: dict[str, object] = {"class_a": a, "class_b": b}
            drawn = [(rng.choice(i, len(i)), rng.choice(j, len(j))) for _ in range(n_boot)]
            if a == b:
                drawn = [(x, x) for x, _ in drawn if len(set(x)) > 1]
            for name, ratio in ratios.items():
                value = _mean_of_others(ratio, i, j)
                low, high = np.quantile(
                    [_mean_of_others(ratio, x, y) for x, y in drawn], [0.025, 0.975]
                )
                row |= {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}
            rows.append({**row, "n": len(i) * len(j) - (len(i) if a == b else 0)})
    return pd.DataFrame(rows)


def _mean_of_others(ratio: np.ndarray, i: np.ndarray, j: np.ndarray) -> float:
    block = ratio[np.ix_(i, j)]
    return float(block[i[:, None] != j[None]].mean())


def _wanted(model, parameters: str, layers_path: str) -> set[str]:
    names = {n for n, _ in model.named_parameters()}
    if parameters == "blocks":
        blocks = decoder_layers(model, layers_path)
        path = next(n for n, m in model.named_modules() if m is blocks)
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


def _cotangents(
    model, tokenizer, ids: list[Tensor], tokens: str, k: int, seed: int
) -> tuple[Tensor, list[int] | str]:
    vocabulary = model.get_output_embeddings().weight.shape[0]
    device = ids[0].device
    if tokens == "all":
        if k < 3:
            raise DCRError(f"entk: tokens='all' needs k >= 3 probes, got {k}.")
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(k, vocabulary, generator=generator).to(device), "all"
    if tokens == "top-k":
        with torch.no_grad():
            mean = sum(
                model(input_ids=row, use_cache=False, logits_to_keep=1)
                .logits[0, -1]
                .float()
                .softmax(-1)
                for row in ids
            )
        chosen = mean.topk(k).indices.tolist()
    elif tokens == "refusal":
        chosen = sorted({row[0] for row in opening_tokens(tokenizer)})
    else:
        raise DCRError(f"entk: tokens={tokens!r} is unknown; use top-k, refusal or all.")
    return torch.nn.functional.one_hot(
        torch.tensor(chosen, device=device), vocabulary
    ).float(), chosen


def _gram(
    model, ids: list[Tensor], cotangents: Tensor, wanted: set[str], layers_path: str
) -> Tensor:
    """[n, n, k, k] inner products of the gradients of every pair of prompts and tokens."""
    blocks = decoder_layers(model, layers_path)
    path = next(n for n, m in model.named_modules() if m is blocks)
    n, k = len(ids), len(cotangents)
    total = torch.zeros(n, n, k, k)
    shared = common_prefix([row[0].tolist() for row in ids], at_least=1)
    states = [
        trace(model, row, cotangents, wanted, layers_path)
        for row in tqdm(ids, desc="kernel: forward", leave=False)
    ]
    for name in states[0].small:
        total += _small([s.small[name] for s in states])
    for index in tqdm(range(len(blocks) - 1, -1, -1), desc="kernel: blocks", leave=False):
        parts = [step_down(blocks[index], f"{path}.{index}", index, s, wanted) for s in states]
        for name in list(parts[0]):
            column = [p.pop(name) for p in parts]
            total += _linear(column, shared) if isinstance(column[0], Factors) else _small(column)
        log.info("kernel: block %d of %d done, %d prompts", len(blocks) - index, len(blocks), n)
    return total + _tables(model, states, cotangents, wanted, layers_path)


def _small(rows: list[Tensor]) -> Tensor:
    flat = torch.cat(rows).float()  # [n * k, size]
    n, k = len(rows), rows[0].shape[0]
    return (flat @ flat.T).reshape(n, k, n, k).permute(0, 2, 1, 3).cpu()


def _linear(column: list[Factors], shared: int = 0) -> Tensor:
    """Σ_ts (δ_t·δ'_s)(a_t·a'_s) for all pairs of prompts and tokens.

    All prompts begin with the same `shared` tokens (the chat template), whose activations are the same as well. In an
    orthonormal basis Q of those, every gradient is B Qᵀ + R with R Q = 0: one matrix product serves the first part,
    and only a prompt's own tokens are left to be set against each other's.
    """
    n, k = len(column), column[0].delta.shape[0]
    width = max(f.delta.shape[1] for f in column)
    delta = torch.stack(
        [_padded(f.delta, width, 1).float().transpose(1, 2) for f in column]
    )  # [n, k, out, seq]
    if (
        column[0].ids is not None
    ):  # one-hot activations; padded places have δ = 0, so what they meet does not matter
        ids = torch.stack(
            [torch.nn.functional.pad(f.ids, (0, width - len(f.ids)), value=-1) for f in column]
        )
        return _pairwise(delta, lambda part, i: (ids[part][:, :, None] == ids[i]).float())
    activation = torch.stack(
        [_padded(f.activation, width, 0) for f in column]
    ).float()  # [n, seq, in]
    total = 0.0
    if shared:
        basis = torch.linalg.qr(activation[0, :shared].T).Q  # [in, <= shared]
        coordinates = activation @ basis  # [n, seq, <= shared]
        common = (delta.flatten(1, 2) @ coordinates).reshape(n * k, -1)
        total = (common @ common.T).reshape(n, k, n, k).transpose(1, 2).cpu()
        activation = activation[:, shared:] - coordinates[:, shared:] @ basis.T
        delta = delta[..., shared:].contiguous()
    return total + _pairwise(delta, lambda part, i: activation[part] @ activation[i].T)


def _pairwise(delta: Tensor, overlap) -> Tensor:
    """[n, n, k, k] from δ [n, k, out, seq] and `overlap(part, i)` [m, seq, seq of i]; the mirrored half is copied."""
    n, k = delta.shape[:2]
    out = torch.zeros(n, n, k, k)
    for i in range(n):
        own = delta[i].flatten(1)  # [k, out * seq]
        for start in range(i, n, CHUNK):
            part = slice(start, min(start + CHUNK, n))
            pulled = (delta[part].flatten(1, 2) @ overlap(part, i)).reshape(
                -1, own.shape[1]
            )  # [m * k, out * seq]
            rows = (own @ pulled.T).reshape(k, -1, k).transpose(0, 1).cpu()
            out[i, part] = rows
            out[part, i] = rows.transpose(1, 2)
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
