"""Inner products of logit gradients from their factors, and a check of one against autograd."""

import contextlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from dcr.analysis.gradients import Factors, Trace, at_embeddings, outside, step_down, trace
from dcr.errors import DCRError
from dcr.lm.batches import common_prefix
from dcr.lm.blocks import decoder_layers

log = logging.getLogger("dcr")
CHUNK = 8  # prompts set against one prompt at a time: bounds memory
AGREES = 0.005  # relative difference from autograd that rounding may make, in fp32
AGREES_BF16 = 0.1


def gram(
    model, ids: list[Tensor], cotangents: Tensor, wanted: set[str], layers_path: str = ""
) -> Tensor:
    """[n, n, k, k] inner products of the gradients of every pair of prompts and tokens."""
    blocks = decoder_layers(model, layers_path)
    path = next(name for name, module in model.named_modules() if module is blocks)
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
            column: list = [p.pop(name) for p in parts]
            total += _linear(column, shared) if isinstance(column[0], Factors) else _small(column)
        log.info("kernel: block %d of %d done, %d prompts", len(blocks) - index, len(blocks), n)
    total += _tables(model, states, cotangents, wanted, blocks)
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
    model, states: list[Trace], cotangents: Tensor, wanted: set[str], blocks: nn.ModuleList
) -> Tensor:
    """Embedding tables and LM head, and their cross terms when the two are one matrix."""
    total = torch.zeros(len(states), len(states), len(cotangents), len(cotangents))
    names, small = {id(p): n for n, p in model.named_parameters()}, outside(model, blocks, wanted)
    head = names.get(id(model.get_output_embeddings().weight), "")
    columns = [at_embeddings(state, small) for state in states]
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
    """⟨look-up part of x', head part of x⟩ and its mirror: Σ_s (δ'_s·h_x) δ_head,x[token s]."""
    asked = cotangents.any(0)
    place = torch.where(asked, asked.cumsum(0) - 1, deltas.shape[-1])  # token -> column of deltas
    heads = torch.nn.functional.pad(deltas, (0, 1))  # [n, k, m + 1], zero for what is not asked
    parts = [
        torch.einsum("ksn,njs->nkj", f.delta.float() @ inputs.T, heads[..., place[f.activation]])
        for f in column
    ]
    out = torch.stack(parts).cpu()  # [n, n, k, k]
    return out + out.permute(1, 0, 3, 2)


def check(model, row: Tensor, cotangent: Tensor, wanted: set[str], ours: float) -> None:
    """Set one prompt's squared gradient against autograd's, which frees each gradient as it goes.

    Raises DCRError for models whose logits or weights pass through something that the factors do
    not know.
    """
    kept = {p: p.grad for n, p in model.named_parameters() if n in wanted}
    squares: list[Tensor] = []

    def count(parameter: Tensor) -> None:
        if parameter.grad is not None:
            squares.append(parameter.grad.float().pow(2).sum())
        parameter.grad = None

    with contextlib.ExitStack() as hooks:
        for parameter in kept:
            parameter.grad = None
            hooks.enter_context(parameter.register_post_accumulate_grad_hook(count))
        logits = model(input_ids=row, use_cache=False, logits_to_keep=1).logits[0, -1]
        (logits * cotangent).sum().backward(inputs=list(kept))
    for parameter, grad in kept.items():
        parameter.grad = grad
    exact = float(sum(squares))
    allowed = AGREES if logits.dtype == torch.float32 else AGREES_BF16
    if abs(ours - exact) > allowed * max(exact, 1e-30):
        raise DCRError(
            f"entk: {type(model).__name__} is not known well enough: the kernel of the first "
            f"prompt is {ours:.4g} from its layers and {exact:.4g} by autograd. Take "
            "parameters='blocks', or another architecture."
        )
