"""The whole LeJEPA loss in one reduction: prediction towards the global views' mean, and SIGReg over all views."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lejepa_scale.distributed import sum_replicated
from lejepa_scale.objective.sigreg import SIGReg


class LossTerms(NamedTuple):
    loss: Float[Tensor, ""]
    prediction: Float[Tensor, ""]
    sigreg: Float[Tensor, ""]


class LeJEPALoss(nn.Module):
    r"""L = (1 - lambda) L_pred + lambda SIGReg (arXiv 2511.08544, Algorithm 2), over the global batch:

        mu_n   = mean of the global views' embeddings of sample n
        L_pred = mean over views, samples and dimensions of (z_vn - mu_n)^2

    No stop-gradient and no teacher. With `predicted` (the output of a JEPA predictor), predicted_vn replaces z_vn in
    L_pred. Values are those of the global batch on every rank; gradients follow SIGReg's convention (W times).
    """

    def __init__(self, sigreg: SIGReg, lambda_: float = 0.05) -> None:
        super().__init__()
        if not 0 <= lambda_ <= 1:
            raise ValueError(f"lambda must lie in [0, 1]; got {lambda_}.")
        self.sigreg, self.lambda_ = sigreg, lambda_

    def forward(
        self,
        z: Float[Tensor, "v n d"],
        num_global: int,
        *,
        step: int,
        predicted: Float[Tensor, "v n d"] | None = None,
    ) -> LossTerms:
        """z: this rank's embeddings, the `num_global` global views first."""
        v, n, d = z.shape
        z = z if z.dtype == torch.float64 else z.float()
        target = z[:num_global].mean(0)  # [N, D]
        squared = ((z if predicted is None else predicted.to(z.dtype)) - target).square().sum()
        sums = self.sigreg.local_sums(z, step)
        packed = torch.cat([sums.flatten(), squared[None], squared.new_tensor([n])])
        total = sum_replicated(packed, self.sigreg.group)
        count = total[-1]
        prediction = total[-2] / (v * d * count)
        sigreg = self.sigreg.statistic(total[:-2].view_as(sums), count)
        return LossTerms((1 - self.lambda_) * prediction + self.lambda_ * sigreg, prediction, sigreg)
