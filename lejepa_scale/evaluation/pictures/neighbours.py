"""Which images are alike to an encoder, and how many directions its features use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor

from lejepa_scale.evaluation.knn import rounded_cosines
from lejepa_scale.evaluation.spectrum import covariance, effective_rank_of

_CHUNK = 1024  # rows at a time
_UNITS = 1 << 24  # of rounded_cosines
_NEVER = -(1 << 62)  # below any cosine


@dataclass(frozen=True)
class Neighbours:
    """The rows nearest to every row but itself, nearest first."""

    rows: Int[Tensor, "n k"]
    cosines: Float64[Tensor, "n k"]
    mean_cosine: float  # of two different rows
    agreement: float | None  # labelled rows whose nearest labelled neighbour has their label
    chance: float | None  # of two labelled rows to have the same one


def neighbours(rows: Float[Tensor, "n e"], labels: Int[Tensor, " n"], count: int) -> Neighbours:
    """By cosine, ties to the smaller row. labels: -1 where unknown. There are at least 2 rows; k is smaller where there are
    few."""
    nearest, cosines, agreed = list[Tensor](), list[Tensor](), list[Tensor]()
    known = labels >= 0
    for start in range(0, len(rows), _CHUNK):
        units = rounded_cosines(rows[start : start + _CHUNK], rows, torch.float64, None)  # [c, n]
        own = torch.arange(start, start + len(units))
        units[torch.arange(len(units)), own] = _NEVER
        order = units.neg().sort(dim=1, stable=True).indices
        nearest.append(order[:, : min(count, len(rows) - 1)])
        cosines.append(units.gather(1, nearest[-1]).double() / _UNITS)
        among = units.masked_fill(~known, _NEVER)
        agreed.append(labels[among.argmax(1)] == labels[own])
    unit = F.normalize(rows.double(), dim=1)
    n = len(rows)
    mean = float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1)))
    agreement = chance = None
    if int(known.sum()) > 1:
        agreement = float(torch.cat(agreed)[known].double().mean())
        counts, total = labels[known].unique(return_counts=True)[1].double(), int(known.sum())
        chance = float((counts * (counts - 1)).sum() / (total * (total - 1)))
    return Neighbours(torch.cat(nearest), torch.cat(cosines), mean, agreement, chance)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of the covariance as shares of their sum, largest first; those of as many samples of an isotropic Gaussian
    of the same width; and the effective ranks of both."""

    shares: list[float]
    of_gaussian: list[float]
    effective_rank: float
    rank_of_gaussian: float
    samples: int
    width: int


def spectrum(rows: Float[Tensor, "n e"]) -> Spectrum:
    """Of at least 2 rows. n samples have n - 1 directions at most, so no more eigenvalues are there."""
    drawn = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for x in (rows, drawn):
        products = covariance(x)
        values = torch.linalg.eigvalsh(products).flip(0).clamp_min(0)[: min(len(rows) - 1, rows.shape[1])]
        found.append(((values / values.sum().clamp_min(1e-300)).tolist(), effective_rank_of(products)))
    (shares, rank), (of_gaussian, rank_of_gaussian) = found
    return Spectrum(shares, of_gaussian, rank, rank_of_gaussian, *rows.shape)
