"""Weighted nearest neighbours on cosine similarity, without training."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lejepa_scale.evaluation.features import Features


def knn_accuracy(
    train: Features, test: Features, *, k: int = 20, temperature: float = 0.07, chunk: int = 1024
) -> float:
    """Top-1 accuracy of a vote of the k nearest training rows, weighted by exp(cosine / temperature) (Wu et al. 2018,
    as used by DINO). Memory: chunk x training rows."""
    k = min(k, len(train.rows))
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    bank = F.normalize(train.rows, dim=1)
    hits = 0
    for rows, labels in zip(test.rows.split(chunk), test.labels.split(chunk), strict=True):
        similarity, nearest = (F.normalize(rows, dim=1) @ bank.T).topk(k, dim=1)
        weights = torch.exp((similarity - 1) / temperature)
        votes = torch.zeros(len(rows), classes, dtype=weights.dtype).scatter_add_(1, train.labels[nearest], weights)
        hits += int((votes.argmax(1) == labels).sum())
    return hits / len(test.rows)
