"""Patch features as colours: their first three principal components over several images."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def pca_maps(features: Float[Tensor, "b h w e"]) -> Float[Tensor, "b h w 3"]:
    """RGB in 0..1. Each component is scaled between its 2nd and 98th percentile; signs are fixed by the largest entry."""
    rows = features.flatten(0, 2).float()
    rows = rows - rows.mean(0)
    _, _, axes = torch.linalg.svd(rows, full_matrices=False)
    axes = axes[:3]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    projected = rows @ axes.T
    low, high = projected.quantile(0.02, 0), projected.quantile(0.98, 0)
    return ((projected - low) / (high - low).clamp_min(1e-9)).clamp(0, 1).view(*features.shape[:3], 3)
