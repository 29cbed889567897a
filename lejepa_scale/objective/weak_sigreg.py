"""Weak-SIGReg: a relative of SIGReg that looks at second moments alone (arXiv 2603.05924)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lejepa_scale.objective.regularizer import Regularizer
from lejepa_scale.objective.sigreg import normal
from lejepa_scale.parallel.collectives import mean_of_rows
from lejepa_scale.parallel.process_group import Group


class WeakSIGReg(Regularizer):
    r"""|| Cov(z S) - I ||_F, averaged over views (arXiv 2603.05924), over the global batch.

    S [D, sketch] has independent entries N(0, 1/D), drawn from (seed, step); S = I where D <= sketch. Cov is the
    unbiased covariance. Cheaper than SIGReg and blind to anything but second moments: it prevents collapse, not skew or
    tails. Its scale is another than SIGReg's, and so is the lambda that suits it. Raises ValueError for a sketch below
    1 and for fewer than 2 samples.
    """

    def __init__(self, sketch: int = 64, group: Group = None, *, joint: bool = False, seed: int = 0) -> None:
        super().__init__(joint=joint, group=group, seed=seed, least=2)
        if sketch < 1:
            raise ValueError(f"WeakSIGReg needs a sketch of at least 1; got {sketch}.")
        self.sketch = sketch

    def local_sums(self, z: Float[Tensor, "v n d"], step: int) -> Float[Tensor, "v s1 s"]:
        """Row 0: sums. Rows 1 to s: sums of products. Of differences from the mean over all ranks, of which a covariance
        knows nothing, and beside which a small one would drown in rounding."""
        z = z - mean_of_rows(z, self.group)
        width = z.shape[-1]
        if width > self.sketch:
            z = z @ normal(self.seed, step, width, self.sketch, z.device, z.dtype) / width**0.5
        return torch.cat([z.sum(1, keepdim=True), z.mT @ z], 1)

    def statistic(self, sums: Float[Tensor, "v s1 s"], count: Float[Tensor, ""], step: int) -> Float[Tensor, ""]:
        """|| Cov - I ||_F of each view, averaged, with the unbiased covariance of `count` samples."""
        mean = sums[:, :1] / count
        covariance = (sums[:, 1:] - count * mean.mT @ mean) / (count - 1)
        identity = torch.eye(sums.shape[2], device=sums.device, dtype=sums.dtype)
        return torch.linalg.matrix_norm(covariance - identity).mean()
