"""The whole LeJEPA loss: prediction towards the global views' mean, and a regularizer over all views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lejepa_scale.objective.regularizer import Regularizer, to_float32
from lejepa_scale.objective.visreg import scale_and_centre, scale_and_centre_sums
from lejepa_scale.parallel.collectives import mean_of_rows


class LossTerms(NamedTuple):
    """Scalars of the global batch: the weighted sum, and its two terms before they are weighted."""

    loss: Float[Tensor, ""]
    prediction: Float[Tensor, ""]
    sigreg: Float[Tensor, ""]


class LeJEPALoss(nn.Module):
    r"""L = (1 - lambda) L_pred + lambda R (arXiv 2511.08544, Algorithm 2), over the global batch:

        mu_n   = mean of the global views' embeddings of sample n
        L_pred = mean over views, samples and dimensions of (z_vn - mu_n)^2
        R      = the regularizer, SIGReg in the paper

    weighting: "convex" as above, or "additive": L = L_pred + lambda R (equal up to a factor, at lambda / (1 - lambda)).
    prediction: "mean" over dimensions as above, or their "sum": D times as much.
    scale_centre: adds this much of VISReg's scale and centre terms to R, at one more small all-reduce. None: what the
    regularizer asks for, 1 for VISReg and 0 for the others.

    No stop-gradient and no teacher. With `predicted` (the output of a JEPA predictor), predicted_vn replaces z_vn in
    L_pred. Values are those of the global batch on every rank; gradients follow Regularizer's convention (W times).
    Raises ValueError for a weight or a name that has no meaning.
    """

    def __init__(
        self,
        regularizer: Regularizer,
        lambda_: float = 0.05,
        *,
        weighting: Literal["convex", "additive"] = "convex",
        prediction: Literal["mean", "sum"] = "mean",
        scale_centre: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= lambda_ <= 1:
            raise ValueError(f"lambda must lie in [0, 1]; got {lambda_}.")
        scale_centre = regularizer.scale_centre if scale_centre is None else scale_centre
        if not scale_centre >= 0:
            raise ValueError(f"scale_centre must not be negative; got {scale_centre}.")
        if weighting not in ("convex", "additive") or prediction not in ("mean", "sum"):
            raise ValueError(
                "LeJEPALoss knows weighting convex and additive, prediction mean and sum; got "
                f"{weighting!r} and {prediction!r}."
            )
        self.regularizer, self.lambda_, self.scale_centre = regularizer, lambda_, scale_centre
        self.weighting, self.prediction = weighting, prediction

    def forward(
        self,
        z: Float[Tensor, "v n d"],
        num_global: int,
        *,
        step: int,
        predicted: Float[Tensor, "v n d"] | None = None,
        counts: Sequence[int] | None = None,
        lambda_: float | None = None,
    ) -> LossTerms:
        """z: this rank's embeddings, the `num_global` global views first. counts: as for Regularizer. lambda_: of this step,
        in place of the loss's own. Raises ValueError where there are too few samples for the regularizer."""
        lambda_ = self.lambda_ if lambda_ is None else lambda_
        views, n, width = z.shape
        x = to_float32(z)
        target = x[:num_global].mean(0)  # [N, D]
        squared = ((x if predicted is None else to_float32(predicted)) - target).square().sum()
        sums = [squared[None], squared.new_full((1,), n)]
        if self.scale_centre:
            origin = mean_of_rows(x, self.regularizer.group)
            sums.append(scale_and_centre_sums(x, origin).flatten())
        regularizer, total = self.regularizer.reduced(z, torch.cat(sums), step=step, counts=counts)
        count = total[1]
        prediction = total[0] / (views * count * (width if self.prediction == "mean" else 1))
        if self.scale_centre:
            moments = total[2:].view(2, views, width)
            regularizer = regularizer + self.scale_centre * scale_and_centre(moments, count, origin)
        share = 1 - lambda_ if self.weighting == "convex" else 1.0
        return LossTerms(share * prediction + lambda_ * regularizer, prediction, regularizer)
