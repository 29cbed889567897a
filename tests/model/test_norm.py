"""Batch normalisation against torch's, and over unequal ranks against one process."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import run_ranks
from torch import nn

from lejepa_scale import distributed
from lejepa_scale.model.norm import BatchNorm, synchronised


@pytest.mark.parametrize("shape", [(20, 6), (5, 6, 4, 3)])
def test_equals_torch(shape: tuple[int, ...]) -> None:
    theirs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(6).double()
    nn.init.normal_(theirs.weight)
    ours = synchronised(nn.Sequential(copy.deepcopy(theirs)))[0]
    assert isinstance(ours, BatchNorm)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 100
    weight = torch.randn(shape, dtype=torch.float64)
    gradients = []
    for module in (theirs, ours):
        y = x.clone().requires_grad_()
        (module(y) * weight).sum().backward()
        gradients.append([y.grad, module.weight.grad, module.bias.grad])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_low_precision_input_keeps_fp32_statistics() -> None:
    norm = BatchNorm(4).bfloat16()
    x = (torch.randn(512, 4) + 200).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    assert float(y.float().std()) == pytest.approx(1, abs=0.02)


def _on_rank(module: nn.Module, x: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, ...]:
    module = copy.deepcopy(module)  # arguments arrive in memory that the ranks share
    start = sum(counts[: distributed.rank()])
    mine = x[start : start + counts[distributed.rank()]].clone().requires_grad_()
    y = module(mine)
    y.square().mul(torch.arange(x.shape[1])).sum().backward()
    return y.detach(), mine.grad, module.running_var


def test_unequal_ranks_equal_one_process() -> None:
    counts = [3, 11]
    module = BatchNorm(5, track=True).double()
    x = torch.randn(14, 5, dtype=torch.float64) + 7
    results = run_ranks(_on_rank, 2, module, x, counts)
    y, gradient, running = _on_rank(copy.deepcopy(module), x, [14])
    torch.testing.assert_close(torch.cat([r[0] for r in results]), y)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), gradient)
    for result in results:
        torch.testing.assert_close(result[2], running)
