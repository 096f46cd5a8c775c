"""Lovász-Softmax against the paper's algorithm as a loop, and against the Jaccard index."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import jaccard_score

from clip2scene.losses.lovasz import lovasz_softmax


def draw(seed, n=80, classes=5, ignored=0.2):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes - 1, (n,), generator=g)  # the last class has no point
    labels[torch.rand(n, generator=g) < ignored] = -1
    return torch.randn(n, classes, generator=g, dtype=torch.float64), labels


def loop(logits, labels):
    """Algorithm 1: the Jaccard loss of the first 0, 1, 2, ... points in error, and its increments."""
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    losses = []
    for c in sorted(set(labels.tolist())):
        own = [label == c for label in labels.tolist()]
        errors = [abs(o - p) for o, p in zip(own, logits.softmax(1)[:, c].tolist(), strict=True)]
        total, wrong, before = 0.0, set(), 0.0
        for i in sorted(range(len(own)), key=lambda i: -errors[i]):
            wrong.add(i)
            inside = sum(o for j, o in enumerate(own) if j not in wrong)
            union = sum(own) + sum(not own[j] for j in wrong)
            total += errors[i] * (1 - inside / union - before)
            before = 1 - inside / union
        losses.append(total)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_algorithm_1(seed):
    logits, labels = draw(seed)
    assert float(lovasz_softmax(logits, labels)) == pytest.approx(loop(logits, labels), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_of_certain_predictions_it_is_one_minus_iou(seed):
    logits, labels = draw(seed)
    certain = 1e4 * torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).double()
    counted = labels >= 0
    iou = jaccard_score(labels[counted], certain[counted].argmax(1), labels=labels[counted].unique(), average="macro")
    assert float(lovasz_softmax(certain, labels)) == pytest.approx(1 - iou, rel=1e-9)


def test_gradient_order_and_points_that_do_not_count():
    logits, labels = draw(7)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lovasz_softmax(x, labels), logits)
    lovasz_softmax(logits, labels).backward()
    assert not logits.grad[labels < 0].any()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float(lovasz_softmax(logits[order], labels[order])) == pytest.approx(
            float(lovasz_softmax(logits, labels))
        )


@pytest.mark.parametrize("count", [0, 4])
def test_without_a_point_that_counts_it_is_0(count):
    logits = torch.randn(count, 3, requires_grad=True)
    loss = lovasz_softmax(logits, torch.full((count,), -1))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not logits.grad.any()


def test_half_precision_is_summed_in_full():
    logits, labels = draw(1)
    loss = lovasz_softmax(logits.half(), labels)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(loop(logits, labels), abs=1e-3)
