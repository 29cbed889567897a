"""How many directions features use, from the spectrum of their covariance, without labels."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lejepa_scale.parallel.collectives import all_reduce_sum


def effective_rank(rows: Float[Tensor, "b d"]) -> float:
    """exp of the entropy of the normalized singular values of all ranks' centred rows (RankMe, arXiv 2210.02885):
    1 for a collapsed batch, up to D for an isotropic one, NaN where a row is not finite."""
    return effective_rank_of(covariance(rows))


def covariance(rows: Float[Tensor, "b d"]) -> Float[Tensor, "d d"]:
    """Sum of products of all ranks' centred rows, in double."""
    rows = rows.double()
    sums = all_reduce_sum(torch.cat([rows.sum(0), rows.new_full((1,), len(rows))]))
    rows = rows - sums[:-1] / sums[-1]
    return all_reduce_sum(rows.T @ rows)


def effective_rank_of(covariance: Float[Tensor, "d d"]) -> float:
    """As `effective_rank`, of rows with this covariance."""
    if not torch.isfinite(covariance).all():
        return math.nan
    return rank_of_spectrum(torch.linalg.eigvalsh(covariance))


def rank_of_spectrum(eigenvalues: Float[Tensor, " d"]) -> float:
    """As `effective_rank`, of rows whose covariance has these, in any order and scale."""
    spectrum = eigenvalues.clamp_min(0).sqrt()
    p = spectrum / spectrum.sum().clamp_min(1e-30)
    return float(torch.exp(-(p * p.clamp_min(1e-30).log()).sum()))


def eigenvalues(rows: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Of the covariance of the rows of this process (divided by n - 1), largest first, in double."""
    rows = rows.double()
    rows = rows - rows.mean(0)
    return torch.linalg.eigvalsh(rows.T @ rows / max(1, len(rows) - 1)).flip(0).clamp_min(0)


def rankme(rows: Float[Tensor, "n d"]) -> float:
    """As published (arXiv 2210.02885, equations 1 and 2): exp of the entropy of the normalized singular values of the rows
    as they are, not centred, with 1e-7 added to each share. NaN where a row is not finite."""
    gram = rows.double().T @ rows.double()
    if not torch.isfinite(gram).all():
        return math.nan
    spectrum = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = spectrum / spectrum.sum().clamp_min(1e-30) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def alpha_req(spectrum: Float[Tensor, " d"]) -> float:
    """The exponent a of a power law i^-a of the eigenvalues (arXiv 2202.05808), by least squares in logarithms from the
    eleventh to the five-hundredth of those above 1e-12 of the largest; of fewer than 22, over all. NaN for fewer than 3."""
    kept = spectrum[spectrum > 1e-12 * spectrum[0]].double()
    first = 10 if len(kept) >= 22 else 0
    kept = kept[first:500]
    if len(kept) < 3:
        return math.nan
    x = torch.arange(first + 1, first + 1 + len(kept), dtype=torch.float64).log()
    y, x = kept.log() - kept.log().mean(), x - x.mean()
    return float(-(x @ y) / (x @ x))


class Lidar:
    """LiDAR (arXiv 2312.04000, section 4): exp of the entropy of the eigenvalues of the between-image scatter of features,
    whitened by the scatter within views of an image. Adds up over batches and ranks; never holds a feature."""

    def __init__(self, delta: float = 1e-4, epsilon: float = 1e-7) -> None:
        self.delta, self.epsilon = delta, epsilon
        self._sums: Tensor | None = None  # of all ranks: between, within, and the mean's sum below them
        self._images = self._views = 0.0

    def add(self, features: Float[Tensor, "v b d"]) -> None:
        """Of every view of so many images on this rank."""
        x = features.double()
        means = x.mean(0)  # [B, D]
        apart = (x - means).flatten(0, 1)
        sums = torch.cat([means.T @ means, apart.T @ apart, means.sum(0, keepdim=True)])
        self._sums = sums if self._sums is None else self._sums + sums
        self._images += x.shape[1]
        self._views = x.shape[0]

    def value(self) -> float:
        """Over all ranks, which all call; NaN for fewer than two images or views, and where a feature is not finite."""
        assert self._sums is not None
        counts = self._sums.new_tensor([self._images])
        sums, images = all_reduce_sum(self._sums), float(all_reduce_sum(counts))
        if images < 2 or self._views < 2 or not torch.isfinite(sums).all():
            return math.nan
        width = sums.shape[1]
        between, within, mean = sums[:width], sums[width : 2 * width], sums[-1] / images
        between = (between - images * mean[:, None] * mean) / (images - 1)
        within = within / (images * (self._views - 1)) + self.delta * torch.eye(width).to(sums)
        values, axes = torch.linalg.eigh(within)
        whitening = (axes * values.clamp_min(1e-30).rsqrt()) @ axes.T
        spectrum = torch.linalg.eigvalsh(whitening @ between @ whitening).clamp_min(0)
        p = spectrum / spectrum.sum().clamp_min(1e-30) + self.epsilon
        return float(torch.exp(-(p * p.log()).sum()))
