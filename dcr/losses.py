"""Contrastive losses by name, from pytorch-metric-learning, always in fp32.

What is equivalent and what is not: the loss of a batch depends on which prompts stand in it together (in-batch
negatives), so two batches of 16 with accumulation are not one batch of 32. Gathering the hidden states of all
processes before the loss makes n processes x batch b equal to one process x batch n*b; nothing else does.
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
    """Squared distance of hidden states to the frozen base's, relative to the base's size (0 = knowledge kept)."""
    hidden, reference = hidden.float(), reference.float()
    return (hidden - reference).pow(2).sum() / reference.pow(2).sum()
