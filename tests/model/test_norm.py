"""Batch normalization against torch's, and over unequal ranks against one process."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICES
from ranks import run_ranks
from timm.layers import BatchNormAct2d
from torch import nn

from lejepa_scale.cpu import compiler
from lejepa_scale.model import norm_cpu
from lejepa_scale.model.norm import BatchNorm, synchronized
from lejepa_scale.parallel import process_group


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize(
    "shape", [(20, 6), (5, 6, 4, 3), (70, 21), (9, 37, 5, 4)]
)  # blocks and vectors, and what is left
def test_equals_torch(shape: tuple[int, ...], layout: str, device: str) -> None:
    theirs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1], device=device).double()
    nn.init.normal_(theirs.weight)
    ours = synchronized(nn.Sequential(copy.deepcopy(theirs)))[0]
    assert isinstance(ours, BatchNorm)
    x = torch.randn(shape, dtype=torch.float64, device=device) * 3 + 100
    if layout == "channels last" and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
        assert norm_cpu.usable(x) or x.is_cuda or shutil.which("g++") is None
    weight = torch.randn(shape, dtype=torch.float64, device=device)
    gradients = []
    for module in (theirs, ours):
        y = x.clone().requires_grad_()
        (module(y) * weight).sum().backward()
        gradients.append([y.grad, module.weight.grad, module.bias.grad])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("settings", [
    {"momentum": None}, {"momentum": 0.0}, {"affine": False}, {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
])  # fmt: skip
@pytest.mark.parametrize("kind", [
    nn.BatchNorm2d,
    partial(BatchNormAct2d, act_layer=nn.PReLU),
    partial(BatchNormAct2d, act_layer=nn.Tanh, drop_layer=partial(nn.Threshold, 0.5, 3.0)),  # not after the activation
])  # fmt: skip
def test_every_setting_is_kept(kind: Callable[..., nn.Module], settings: dict[str, Any]) -> None:
    """Three batches in training, which averages with and without a momentum tell apart, and one in evaluation."""
    theirs = nn.Sequential(kind(4, **settings)).double()
    ours = synchronized(copy.deepcopy(theirs))
    assert isinstance(ours[0], BatchNorm)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64) * 2 + 1
    for _ in range(3):
        torch.testing.assert_close(ours(x), theirs(x))
        x = x + 1
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("shape", [(300, 21), (128, 12, 24, 24)])
def test_native_statistics_are_more_accurate_than_torchs(shape: tuple[int, ...]) -> None:
    """In fp32 with a mean of 100 deviations; the same for any number of threads."""
    x = (torch.randn(shape) + 100).contiguous(
        memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format
    )
    if not norm_cpu.usable(x):
        pytest.skip("no C++ compiler")
    n = x.numel() // shape[1]
    var, mean = torch.var_mean(x.double(), [0, *range(2, x.ndim)], correction=0)
    found = norm_cpu.statistics(x)
    assert found[0] == n
    torch.testing.assert_close(found[1 : 1 + shape[1]].double(), mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(found[1 + shape[1] :].double() / n, var, rtol=1e-6, atol=0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(norm_cpu.statistics(x), found)
    torch.set_num_threads(before)


def test_without_a_compiler_torch_does_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x = torch.randn(20, 6)
    expected = BatchNorm(6)(x)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "which", lambda name: None)
    norm_cpu.KERNELS._loaded.clear()
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        torch.testing.assert_close(BatchNorm(6)(x), expected)
    norm_cpu.KERNELS._loaded.clear()


@pytest.mark.parametrize("device", DEVICES)
def test_low_precision_input_keeps_fp32_statistics(device: str) -> None:
    norm = BatchNorm(4).to(device, torch.bfloat16)
    x = (torch.randn(512, 4, device=device) + 200).bfloat16().requires_grad_()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    assert float(y.detach().float().std()) == pytest.approx(1, abs=0.02)
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert norm.bias.grad is not None
    assert bool(norm.bias.grad.isfinite().all())


def _on_rank(module: nn.Module, x: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, ...]:
    module = copy.deepcopy(module)  # arguments arrive in memory that the ranks share
    start = sum(counts[: process_group.rank()])
    mine = x[start : start + counts[process_group.rank()]].clone().requires_grad_()
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
