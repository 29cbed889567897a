"""VISReg's scale and centre terms (arXiv 2606.02572), which may stand beside any regularizer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def scale_and_centre_sums(z: Float[Tensor, "v n d"], origin: Float[Tensor, "v 1 d"]) -> Float[Tensor, "2 v d"]:
    """This rank's part of what `scale_and_centre` needs: sums of the differences from `origin`, and of their squares."""
    z = z - origin
    return torch.stack([z.sum(1), z.square().sum(1)])


def scale_and_centre(
    sums: Float[Tensor, "2 v d"], count: Float[Tensor, ""], origin: Float[Tensor, "v 1 d"]
) -> Float[Tensor, ""]:
    r"""mean over views and dimensions of (1 - sigma_j)^2 + mu_j^2: VISReg's scale and centre terms (arXiv 2606.02572).

    SIGReg's gradient vanishes linearly in the scale of the embeddings at collapse; that of (1 - sigma)^2 does not. sigma is
    the standard deviation over the global batch. `origin` changes no value, being the same on every rank and without a
    gradient; near the mean it keeps a small sigma beside a large mu from drowning in rounding. The pull ends where sigma^2
    is no number of fp32 any more (sigma < 1e-18): embeddings that are equal have no direction in which to part.
    """
    offset, square = sums / count
    variance = (square - offset.square()) * count / (count - 1)
    return ((1 - variance.clamp_min(1e-36).sqrt()).square() + (origin.squeeze(1) + offset).square()).mean()
