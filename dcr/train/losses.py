"""Losses of both stages: contrastive ones by name, drift, cross-entropy in chunks, routing.

What is equivalent, and what cannot be. A contrastive loss depends on which prompts stand in a batch
together (in-batch positives and negatives), so 2 batches of 16 with accumulation are NOT one batch
of 32: pairs across the two are never seen. What holds, and is tested:
- accumulation over k batches gives the mean of their k gradients (each has as many anchors);
- a batch cut into micro-batches for memory is the same batch: the loss sees all hidden states;
- hidden states do not depend on batch size or padding, up to float rounding;
- n processes × batch b equal one process × batch n·b: hidden states are gathered before the loss,
  and its mean over all anchors is the same number in every process.
"""

from collections.abc import Callable

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor, nn
from torch.nn import functional

from dcr.errors import DCRError

LOGITS_AT_ONCE = 2**25  # elements of one chunk of logits: 128 MiB in fp32


class ContrastiveLoss(nn.Module):
    """A named loss on pooled hidden states: `forward(hidden [batch, hidden], labels [batch])`.

    margin: m of Circle loss (O_p = 1 + m, O_n = -m, Δ_p = 1 - m, Δ_n = m) or the triplet margin.
    gamma: γ of Circle loss; supcon and infonce use the temperature 8 / γ (γ = 80 → 0.1).
    Anchors without a positive or a negative give 0. The reducer is the mean over all anchors, of
    infonce over positive pairs, of triplet over triplets (the library's default leaves out those
    that are 0: no mean that processes could share). Rows labelled -1 take no part; computed in
    fp32. Source: paper "Method"; Sun et al. 2020, eq. 6.
    """

    def __init__(self, name: str = "circle", *, margin: float = 0.4, gamma: float = 80.0) -> None:
        super().__init__()
        common = {"distance": CosineSimilarity(), "reducer": MeanReducer()}
        known = {
            "circle": lambda: losses.CircleLoss(m=margin, gamma=gamma, **common),
            "supcon": lambda: losses.SupConLoss(temperature=8.0 / gamma, **common),
            "infonce": lambda: losses.NTXentLoss(temperature=8.0 / gamma, **common),
            "triplet": lambda: losses.TripletMarginLoss(margin=margin, **common),
        }
        if name not in known:
            raise DCRError(f"refine.loss={name!r} is unknown; use one of {', '.join(known)}.")
        self.loss = known[name]()

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar in fp32."""
        used = labels >= 0
        with torch.autocast(hidden.device.type, enabled=False):
            return self.loss(hidden[used].float(), labels[used])


def drift(hidden: Tensor, reference: Tensor) -> Tensor:
    """Mean over rows of ‖h − h₀‖² / ‖h₀‖², h₀ the frozen base's state, [n, hidden] each."""
    hidden, reference = hidden.float(), reference.float()
    return ((hidden - reference).pow(2).sum(-1) / reference.pow(2).sum(-1).clamp_min(1e-12)).mean()


class SummedCrossEntropy(torch.autograd.Function):
    """Σ -log p(target) in chunks, so that the logits of all positions never exist at one time.

    A chunk's gradient is taken right behind its loss (logits are computed once, as in an ordinary
    backward pass) and kept as [n, hidden].
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, logits_of: Callable, rows: int) -> Tensor:
        """hidden [n, hidden], targets [n], logits_of [rows, hidden] → [rows, vocabulary]."""
        total, gradients = hidden.new_zeros((), dtype=torch.float32), []
        wanted = ctx.needs_input_grad[0]
        for part, labels in zip(hidden.split(rows), targets.split(rows), strict=True):
            with torch.set_grad_enabled(wanted):
                part = part.detach().requires_grad_(wanted)
                loss = functional.cross_entropy(logits_of(part).float(), labels, reduction="sum")
            if wanted:
                gradients += torch.autograd.grad(loss, part)
            total += loss.detach()
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        """The kept gradient, scaled."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def chunk_rows(vocabulary: int) -> int:
    """Positions whose logits are computed at once."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def routing(odds: Tensor, targets: Tensor) -> Tensor:
    """Σ over rows of the binary cross-entropy between log odds and target log odds, [n] each.

    Its minimum is at odds = targets, and its pull is bounded however far they lie apart.
    """
    return functional.binary_cross_entropy_with_logits(
        odds.float(), targets.float().sigmoid(), reduction="sum"
    )
