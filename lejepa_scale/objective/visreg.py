"""VISReg's scale and centre terms (arXiv 2606.02572), which may stand beside any regularizer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def scale_and_centre_sums(z: Float[Tensor, "v n d"]) -> Float[Tensor, "2 v d"]:
    """This rank's part of what `scale_and_centre` needs."""
    return torch.stack([z.sum(1), z.square().sum(1)])


def scale_and_centre(sums: Float[Tensor, "2 v d"], count: Float[Tensor, ""]) -> Float[Tensor, ""]:
    r"""mean over views and dimensions of (1 - sigma_j)^2 + mu_j^2: VISReg's scale and centre terms (arXiv 2606.02572).

    SIGReg's gradient vanishes linearly in the scale of the embeddings at collapse; that of (1 - sigma)^2 does not. sigma is
    the standard deviation over the global batch; its square is clamped at 1e-8, where the gradient is cut.
    """
    mean, square = sums / count
    variance = (square - mean.square()) * count / (count - 1)
    return ((1 - variance.clamp_min(1e-8).sqrt()).square() + mean.square()).mean()
