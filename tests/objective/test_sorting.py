"""Sorted rows against torch's stable sort, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lejepa_scale.objective.sorting import sort_rows


def same(p: torch.Tensor) -> None:
    values, order = sort_rows(p)
    expected, places = p.sort(dim=-1, stable=True)
    assert values.dtype == p.dtype
    assert torch.equal(values, expected)
    assert torch.equal(order, places)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [0, 1, 2, 3, 64, 127, 128, 129, 1000, 4097])
def test_rows_of_any_length(samples: int, dtype: torch.dtype) -> None:
    p = torch.randn(2, 3, samples, generator=torch.Generator().manual_seed(samples), dtype=dtype)
    before = p.clone()
    same(p)
    same(p.mT.contiguous().mT)
    assert torch.equal(p, before)


@pytest.mark.parametrize("scale", [1.0, 1e-44, 1e38, 1e-20])
def test_equal_values_keep_their_order(scale: float) -> None:
    """Of either sign, the smallest and the largest numbers too: 300 values, of which most are there many times."""
    p = torch.randint(-3, 4, (5, 300), generator=torch.Generator().manual_seed(0)) * torch.tensor(scale)
    assert len(p.unique()) in (5, 7)
    same(p)


def test_zeros_have_no_sign() -> None:
    p = torch.tensor([[0.0, -0.0, 1e-45, -0.0, 0.0, -1e-45, -0.0]])
    same(p)
    assert sort_rows(p)[1].tolist() == [[5, 0, 1, 3, 4, 6, 2]]


def test_neighbours_are_told_apart() -> None:
    """Floats of which each is the next after the one before: what is stored below their bits must not change their order."""
    bits = np.arange(1 << 12, dtype=np.int32) + np.float32(1.0).view(np.int32)
    p = torch.from_numpy(bits.view(np.float32))[torch.randperm(len(bits), generator=torch.Generator().manual_seed(0))]
    same(torch.stack([p, -p]))


def test_what_is_no_number_is_last() -> None:
    values, order = sort_rows(torch.tensor([[1.0, torch.nan, -1.0], [torch.nan, -torch.nan, torch.nan]]))
    assert order[0, :2].tolist() == [2, 0]
    assert values[0, :2].tolist() == [-1.0, 1.0]
    assert values.isnan().sum() == 4
    assert 0 <= order.min() <= order.max() <= 2
