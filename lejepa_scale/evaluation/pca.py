"""Patch features as colours: their first three principal components over several images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lejepa_scale.model import Encoder


@torch.no_grad()
def dense_features(encoder: Encoder, images: Float[Tensor, "b c s s"], shifts: int) -> Float[Tensor, "b h w e"]:
    """Patch features on a grid `shifts` times finer than the encoder's own: the image is moved by fractions of a patch,
    mirrored at its border, and the maps are interleaved. Costs shifts^2 forwards."""
    side = images.shape[-1]
    coarse = encoder.patch_features(images)
    stride = side // coarse.shape[1]
    shifts = min(shifts, stride)
    reach = stride // 2
    padded = F.pad(images, [reach] * 4, mode="reflect")
    starts = [reach + round((i + 0.5) * stride / shifts - stride / 2) for i in range(shifts)]
    moved = [padded[..., top : top + side, left : left + side] for top in starts for left in starts]
    maps = torch.stack([encoder.patch_features(x) for x in moved])
    return rearrange(maps, "(i j) b h w e -> b (h i) (w j) e", i=shifts)


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
