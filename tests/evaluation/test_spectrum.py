"""Measures without labels, against scipy, numpy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ranks import run_ranks
from scipy import linalg, stats

from lejepa_scale.evaluation.spectrum import Lidar, alpha_req, effective_rank, eigenvalues, rank_of_spectrum, rankme
from lejepa_scale.parallel.process_group import rank, world_size


def test_eigenvalues_are_those_of_numpys_covariance() -> None:
    rows = torch.randn(50, 7) * torch.arange(1, 8) + 3
    expected = np.linalg.eigvalsh(np.cov(rows.double().numpy().T))[::-1]
    assert eigenvalues(rows).numpy() == pytest.approx(expected, rel=1e-9)


def test_rankme_is_the_entropy_of_singular_values() -> None:
    rows = torch.randn(40, 9) + 0.5
    p = linalg.svdvals(rows.double().numpy())
    p = p / p.sum() + 1e-7
    assert rankme(rows) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-9)
    assert rankme(torch.eye(16)) == pytest.approx(16, rel=1e-4)
    assert rankme(torch.ones(10, 8)) == pytest.approx(1, abs=1e-3)
    assert math.isnan(rankme(torch.full((4, 3), torch.nan)))


def test_the_rank_of_a_spectrum_is_that_of_its_rows() -> None:
    rows = torch.randn(60, 5) * torch.tensor([1.0, 2, 3, 4, 0])
    assert rank_of_spectrum(eigenvalues(rows)) == pytest.approx(effective_rank(rows), rel=1e-6)
    p = np.sqrt([16.0, 4.0, 0.0])
    assert rank_of_spectrum(torch.tensor([4.0, 16.0, 0.0])) == pytest.approx(float(np.exp(stats.entropy(p))))


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("width", [8, 64, 700])
def test_alpha_req_finds_the_exponent(exponent: float, width: int) -> None:
    spectrum = 3 * torch.arange(1, width + 1, dtype=torch.float64) ** -exponent
    assert alpha_req(spectrum) == pytest.approx(exponent)
    noisy = spectrum * torch.exp(0.1 * torch.randn(width).double())
    first, last = (10, 500) if width >= 22 else (0, width)
    index = np.log(np.arange(first + 1, min(last, width) + 1))
    slope = stats.linregress(index, noisy[first:last].log().numpy()).slope
    assert alpha_req(noisy) == pytest.approx(-slope)


def test_alpha_req_leaves_out_what_is_zero() -> None:
    spectrum = torch.cat([torch.arange(1, 41, dtype=torch.float64) ** -1.5, torch.zeros(30, dtype=torch.float64)])
    assert alpha_req(spectrum) == pytest.approx(1.5)
    assert math.isnan(alpha_req(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)))


def reference(x: np.ndarray, delta: float = 1e-4, epsilon: float = 1e-7) -> float:
    """By the generalized eigenvalues of the two scatters. x: [V, B, D]."""
    means = x.mean(0)
    between = np.cov(means.T)
    apart = (x - means).reshape(-1, x.shape[2])
    within = apart.T @ apart / (x.shape[1] * (x.shape[0] - 1)) + delta * np.eye(x.shape[2])
    values = linalg.eigh(between, within, eigvals_only=True).clip(0)
    p = values / values.sum() + epsilon
    return float(np.exp(-(p * np.log(p)).sum()))


def views(count: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(count, 6, generator=generator) * torch.tensor([3.0, 2, 1, 1, 0.1, 0.1])
    return means + 0.3 * torch.randn(5, count, 6, generator=generator) + 2


def test_lidar_is_the_entropy_of_generalized_eigenvalues() -> None:
    x, lidar = views(), Lidar()
    for part in x.split([7, 7, 10], dim=1):
        lidar.add(part)
    assert lidar.value() == pytest.approx(reference(x.double().numpy()), rel=1e-6)
    one = Lidar()
    one.add(views()[:, :1])
    assert math.isnan(one.value())


def _lidar_of_a_part() -> float:
    lidar = Lidar()
    for part in views().tensor_split(world_size(), dim=1)[rank()].split(3, dim=1):
        lidar.add(part)
    return lidar.value()


def test_lidar_is_that_of_all_ranks() -> None:
    expected = reference(views().double().numpy())
    assert run_ranks(_lidar_of_a_part, 2) == pytest.approx([expected] * 2, rel=1e-6)
