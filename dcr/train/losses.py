"""Contrastive losses by name, from pytorch-metric-learning, always in fp32.

What is equivalent, and what cannot be. The loss of a batch depends on which prompts stand in it together (in-batch
positives and negatives), so 2 batches of 16 with accumulation are NOT one batch of 32: pairs across the two are never
seen. What holds, and is tested:
- accumulation over k batches gives the mean of their k gradients (every batch has the same number of anchors);
- hidden states, and so everything without gradients (held-out measures, retention's references), do not depend on the
  batch size or the padding, up to float rounding;
- retention is a mean over general prompts, so k batches of b are one batch of k·b for it;
- n processes × batch b equal one process × batch n·b, because hidden states are gathered before the loss, and its
  mean over all anchors is the same number in every process.
"""

from __future__ import annotations

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor, nn

from dcr.errors import DCRError

LOSSES = ("circle", "supcon", "infonce", "triplet")


class ContrastiveLoss(nn.Module):
    """A named loss on pooled hidden states: `forward(hidden [batch, hidden], labels [batch]) -> scalar`.

    margin: m of Circle loss (O_p = 1 + m, O_n = -m, Δ_p = 1 - m, Δ_n = m) or the triplet margin.
    gamma: γ of Circle loss; supcon and infonce use the temperature 1/γ' with γ' = gamma / 8 (γ = 80 → 0.1).
    Anchors without a positive or a negative give 0. The reducer is the mean over all anchors (the library's
    default averages non-zero anchors only, which is no mean that processes could share).
    Rows labelled -1 take no part. Source: paper "Method"; Sun et al., CVPR 2020, eq. 6.
    """

    def __init__(self, name: str = "circle", *, margin: float = 0.4, gamma: float = 80.0) -> None:
        super().__init__()
        common = {"distance": CosineSimilarity(), "reducer": MeanReducer()}
        if name == "circle":
            self.loss = losses.CircleLoss(m=margin, gamma=gamma, **common)
        elif name == "supcon":
            self.loss = losses.SupConLoss(temperature=8.0 / gamma, **common)
        elif name == "infonce":
            self.loss = losses.NTXentLoss(temperature=8.0 / gamma, **common)
        elif name == "triplet":
            self.loss = losses.TripletMarginLoss(margin=margin, **common)
        else:
            raise DCRError(f"refine.loss={name!r} is unknown; use one of {', '.join(LOSSES)}.")

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        used = labels >= 0
        with torch.autocast(hidden.device.type, enabled=False):
            return self.loss(hidden[used].float(), labels[used])


def drift(hidden: Tensor, reference: Tensor) -> Tensor:
    """Mean over rows of ‖h − h₀‖² / ‖h₀‖², h₀ the frozen base's state, [n, hidden] each (0 = knowledge kept)."""
    hidden, reference = hidden.float(), reference.float()
    return ((hidden - reference).pow(2).sum(-1) / reference.pow(2).sum(-1).clamp_min(1e-12)).mean()
