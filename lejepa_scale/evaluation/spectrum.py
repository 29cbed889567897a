"""How many directions features use, from the spectrum of their covariance."""

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
    spectrum = torch.linalg.eigvalsh(covariance).clamp_min(0).sqrt()
    p = spectrum / spectrum.sum().clamp_min(1e-30)
    return float(torch.exp(-(p * p.clamp_min(1e-30).log()).sum()))
