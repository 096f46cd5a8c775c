"""Every loss as a plain loop over points in float64, written from its equation, and random input."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Input:
    points: Tensor
    pixels: Tensor
    labels: Tensor
    cells: Tensor
    text: Tensor

    def permuted(self) -> Input:
        order = torch.randperm(len(self.points), generator=torch.Generator().manual_seed(0))
        return Input(self.points[order], self.pixels[order], self.labels[order], self.cells[order], self.text)

    def scaled(self, factor: float, dtype: torch.dtype) -> Input:
        points, pixels, text = ((t.clamp(-1, 1) * factor).to(dtype) for t in (self.points, self.pixels, self.text))
        return Input(points, pixels, self.labels, self.cells, text)


def draw(seed: int, n: int = 60, classes: int = 5, width: int = 7, cells: int = 20, present: int | None = None):
    """Random pairs: ``present`` of the classes occur, and cell ids have gaps, for cells that no pixel sees."""
    g = torch.Generator().manual_seed(seed)
    points, pixels = (torch.randn(n, width, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, present or classes, (n,), generator=g)
    ids = torch.randint(0, cells, (n,), generator=g) * 7 + 3
    return Input(points, pixels, labels, ids, torch.randn(classes, width, generator=g, dtype=torch.float64))


def dot(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def scr(points, labels, text, tau):
    total = 0.0
    for c in range(len(text)):
        positive = [math.exp(dot(text[c], p) / tau) for p, label in zip(points, labels, strict=True) if label == c]
        negative = [math.exp(dot(text[c], p) / tau) for p, label in zip(points, labels, strict=True) if label != c]
        if positive and negative:
            total -= math.log(sum(positive) / sum(negative))
    return total


def cross_entropy(points, labels, text):
    total = 0.0
    for p, label in zip(points, labels.tolist(), strict=True):
        exponentials = [math.exp(dot(t, p)) for t in text]
        total -= math.log(exponentials[label] / sum(exponentials))
    return total / len(points)


def stcr(
    points, pixels, labels, cells, text, lambda_, pixel_term=True, cell_text="point", max_points=None, empty=False
):
    total, distinct = 0.0, sorted(set(cells.tolist()))
    for cell in distinct:
        members = [i for i in range(len(cells)) if cells[i] == cell][:max_points]
        texts = {i: text[labels[members[0] if cell_text == "first" else i]] for i in members}
        a = {i: math.exp(dot(pixels[i], texts[i]) / lambda_) if pixel_term else 0.0 for i in members}
        b = {i: math.exp(dot(points[i], texts[i]) / lambda_) for i in members}
        z = sum(a.values()) + sum(b.values())
        fused = sum(a[i] / z * pixels[i] + b[i] / z * points[i] for i in members)
        total += sum(1 - 1 / (1 + math.exp(-dot(points[i], fused))) for i in members)
        if empty:
            total += (max_points - len(members)) * (1 - 0.5)
    return total / (len(distinct) * (max_points if empty else 1))


def divergence(points, pixels, text, tau):
    def probabilities(feature):
        exponentials = [math.exp(dot(feature, t) / tau) for t in text]
        return [e / sum(exponentials) for e in exponentials]

    total = 0.0
    for p, x in zip(points, pixels, strict=True):
        total += sum(q * math.log(q / s) for q, s in zip(probabilities(x), probabilities(p), strict=True))
    return total / len(points)


def cosine(points, pixels):
    each = [1 - dot(p, x) / math.sqrt(dot(p, p) * dot(x, x)) for p, x in zip(points, pixels, strict=True)]
    return sum(each) / len(each)


def info_nce(queries, keys, temperature):
    total = 0.0
    for i, q in enumerate(queries):
        exponentials = [math.exp(dot(q, k) / temperature) for k in keys]
        total -= math.log(exponentials[i] / sum(exponentials))
    return total / len(queries)


def superpixel_means(points, pixels, segments):
    means = []
    for segment in sorted(set(segments.tolist()) - {-1}):
        members = [i for i in range(len(segments)) if segments[i] == segment]
        means.append([sum(rows[i] for i in members) / len(members) for rows in (points, pixels)])
    return torch.stack([m[0] for m in means]), torch.stack([m[1] for m in means])
