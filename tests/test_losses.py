"""Contrastive losses: naive oracle, batches without pairs, overflow, excluded rows."""

from __future__ import annotations

import math

import pytest
import torch

from dcr.errors import DCRError
from dcr.train.losses import ContrastiveLoss, SummedCrossEntropy, drift, routing

LOSSES = ("circle", "supcon", "infonce", "triplet")


def naive_circle(hidden, labels, m, gamma):
    """Circle loss per anchor from an explicit double loop over pairs (Sun et al., eq. 6), mean over
    anchors."""
    unit = torch.nn.functional.normalize(hidden, dim=-1)
    total = 0.0
    for i in range(len(labels)):
        positive = negative = 0.0
        for j in range(len(labels)):
            if i == j:
                continue
            s = float(unit[i] @ unit[j])
            if labels[i] == labels[j]:
                positive += math.exp(-gamma * max(1 + m - s, 0) * (s - (1 - m)))
            else:
                negative += math.exp(gamma * max(s + m, 0) * (s - m))
        total += math.log1p(positive * negative) if positive and negative else 0.0
    return total / len(labels)


@pytest.mark.parametrize("m, gamma", [(0.25, 8.0), (0.4, 16.0)])
def test_circle_equals_a_naive_double_loop(m, gamma):
    torch.manual_seed(0)
    hidden = torch.randn(10, 6, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 1, 1])
    loss = ContrastiveLoss("circle", margin=m, gamma=gamma)(hidden, labels)
    assert float(loss) == pytest.approx(naive_circle(hidden, labels.tolist(), m, gamma), rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, -1], [-1, -1, -1]])
def test_a_batch_without_pairs_gives_zero_and_a_working_backward(name, labels):
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = ContrastiveLoss(name)(hidden, torch.tensor(labels))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    loss.backward()
    assert torch.equal(hidden.grad, torch.zeros(3, 4))


@pytest.mark.parametrize("name", LOSSES)
def test_no_overflow_at_gamma_300(name):
    base = torch.randn(1, 8)
    hidden = torch.cat(
        [base, base, -base, -base]
    ).requires_grad_()  # worst cosines: 1 across, -1 within
    loss = ContrastiveLoss(name, gamma=300)(hidden, torch.tensor([0, 1, 0, 1]))
    loss.backward()
    assert torch.isfinite(loss.detach()) and torch.isfinite(hidden.grad).all() and loss > 0


@pytest.mark.parametrize("name", LOSSES)
def test_excluded_rows_take_no_part_and_bf16_is_lifted(name):
    torch.manual_seed(0)
    hidden, labels = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, -1, -1])
    loss = ContrastiveLoss(name)
    assert loss(hidden, labels) == loss(hidden[:4], labels[:4])
    assert loss(hidden.bfloat16(), labels).dtype == torch.float32


def test_separated_classes_lose_less_than_mixed_ones():
    apart = torch.tensor([[1.0, 0], [1, 0.1], [-1, 0], [-1, 0.1]])
    for name in LOSSES:
        loss = ContrastiveLoss(name)
        assert loss(apart, torch.tensor([0, 0, 1, 1])) < loss(apart, torch.tensor([0, 1, 0, 1]))


def test_unknown_loss_lists_the_known_ones():
    with pytest.raises(DCRError, match="circle, supcon, infonce, triplet"):
        ContrastiveLoss("cosine")


def test_drift_is_relative():
    reference = torch.randn(3, 4)
    assert drift(reference, reference) == 0
    assert drift(2 * reference, reference) == pytest.approx(1.0)


def test_drift_of_two_half_batches_is_the_drift_of_the_whole():
    torch.manual_seed(0)
    hidden, reference = torch.randn(8, 4), torch.randn(8, 4)
    halves = (drift(hidden[:4], reference[:4]) + drift(hidden[4:], reference[4:])) / 2
    assert drift(hidden, reference) == pytest.approx(float(halves))


def test_in_batch_negatives_make_one_batch_of_32_another_loss_than_two_of_16():
    """The documented statement of what cannot be equivalent."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(32, 4), torch.arange(32) % 2
    loss = ContrastiveLoss()
    halves = (loss(hidden[:16], labels[:16]) + loss(hidden[16:], labels[16:])) / 2
    assert abs(loss(hidden, labels) - halves) > 1e-2


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_cross_entropy_in_chunks_is_the_whole_one(rows):
    torch.manual_seed(0)
    hidden, targets = torch.randn(7, 4, requires_grad=True), torch.randint(0, 9, (7,))
    head = torch.nn.Linear(4, 9)
    loss = SummedCrossEntropy.apply(hidden, targets, head, rows)
    whole = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    ours, theirs = (torch.autograd.grad(3 * x, hidden)[0] for x in (loss, whole))
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(ours, theirs)


def test_routing_is_least_at_the_target_and_its_pull_is_bounded():
    odds = torch.linspace(-6, 6, 121).requires_grad_()
    each = torch.stack([routing(x[None], torch.tensor([1.5])) for x in odds])
    assert odds[each.argmin()].item() == pytest.approx(1.5, abs=0.06)
    assert torch.autograd.grad(each.sum(), odds)[0].abs().max() <= 1
