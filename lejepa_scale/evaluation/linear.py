"""A linear classifier on frozen features: multinomial logistic regression, its strength chosen on held-out training rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lejepa_scale.evaluation.features import Features

_PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # from strong to weak, each fit started from the one before


def linear_accuracy(train: Features, test: Features, *, iterations: int = 50) -> tuple[float, float]:
    """(test top-1, chosen L2 penalty). Features are standardized with training statistics; every tenth training row is
    held out to choose the penalty, then all are used. Deterministic."""
    mean, std = train.rows.mean(0), train.rows.std(0).clamp_min(1e-6)
    rows, test_rows = (train.rows - mean) / std, (test.rows - mean) / std
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    held, kept = order[::10], order[torch.arange(len(order)) % 10 != 0]
    best, chosen, weight = -1.0, _PENALTIES[0], torch.zeros(rows.shape[1] + 1, classes)
    for penalty in _PENALTIES:
        weight = _fit(rows[kept], train.labels[kept], weight, penalty, iterations)
        accuracy = _accuracy(rows[held], train.labels[held], weight)
        if accuracy > best:
            best, chosen = accuracy, penalty
    weight = _fit(rows, train.labels, torch.zeros_like(weight), chosen, iterations)
    return _accuracy(test_rows, test.labels, weight), chosen


def _fit(
    x: Float[Tensor, "n e"], y: Int[Tensor, " n"], start: Float[Tensor, "e+1 c"], penalty: float, iterations: int
) -> Float[Tensor, "e+1 c"]:
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Float[Tensor, ""]:
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(x, weight), y) + penalty * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return weight.detach()


def _logits(x: Float[Tensor, "n e"], weight: Float[Tensor, "e+1 c"]) -> Float[Tensor, "n c"]:
    return x @ weight[:-1] + weight[-1]  # the last row is the bias


def _accuracy(x: Float[Tensor, "n e"], y: Int[Tensor, " n"], weight: Float[Tensor, "e+1 c"]) -> float:
    return float((_logits(x, weight).argmax(1) == y).float().mean())
