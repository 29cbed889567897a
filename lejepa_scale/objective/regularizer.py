"""What a term of the objective that needs the whole global batch has to offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lejepa_scale.parallel.collectives import sum_replicated
from lejepa_scale.parallel.process_group import Group, world_size


class Regularizer(nn.Module, ABC):
    """A scalar of the embeddings of all ranks, the same on every rank.

    After `backward`, `z.grad` holds W times the gradient of that value, W being the ranks of `group`: what an engine
    that averages gradients over ranks needs. Ranks may hold unequal numbers of samples, or none.

    With `joint` the views are pooled into one sample of V N; otherwise each view is a sample of N and the V values are
    averaged. Raises ValueError for fewer than `least` samples in all, which have no value, where the total is known.

    scale_centre: the weight of VISReg's scale and centre terms beside it, where LeJEPALoss is given none.
    """

    scale_centre: float = 0.0

    def __init__(self, *, joint: bool, group: Group, seed: int, least: int) -> None:
        super().__init__()
        self.joint, self.group, self.seed, self.least = joint, group, seed, least

    @abstractmethod
    def local_sums(self, z: Float[Tensor, "v n d"], step: int) -> Float[Tensor, "*sums"]:
        """This rank's part of the sums over samples that determine the value. z is in fp32 or fp64."""

    @abstractmethod
    def statistic(self, sums: Float[Tensor, "*sums"], count: Float[Tensor, ""], step: int) -> Float[Tensor, ""]:
        """The value from the sums over `count` samples in all."""

    def forward(
        self, z: Float[Tensor, "*v n d"], *, step: int, counts: Sequence[int] | None = None
    ) -> Float[Tensor, ""]:
        """z: this rank's embeddings, [V, N, D] or [N, D], of any precision. `step` selects the random directions.
        counts: the samples of every rank, where the caller knows them."""
        z = z if z.ndim == 3 else z.unsqueeze(0)
        return self.reduced(z, z.new_zeros(0), step=step, counts=counts)[0]

    def reduced(
        self, z: Float[Tensor, "v n d"], extra: Float[Tensor, " e"], *, step: int, counts: Sequence[int] | None = None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " e"]]:
        """The value, and the caller's own sums `extra` over all ranks, in the same all-reduce."""
        self._refuse_too_few(z, counts)
        z = self._sample(z)
        with torch.autocast(z.device.type, enabled=False):
            sums = self.local_sums(to_float32(z), step)
            packed = torch.cat([sums.flatten(), extra.to(sums.dtype), sums.new_full((1,), z.shape[1])])
            sums_of_all, extra, count = sum_replicated(packed, self.group).split([sums.numel(), len(extra), 1])
            return self.statistic(sums_of_all.view_as(sums), count[0], step), extra

    def _refuse_too_few(self, z: Float[Tensor, "v n d"], counts: Sequence[int] | None) -> None:
        if counts is None and world_size(self.group) > 1:
            return  # unknown without another collective
        samples = (z.shape[1] if counts is None else sum(counts)) * (len(z) if self.joint else 1)
        if samples < self.least:
            raise ValueError(
                f"{type(self).__name__} needs at least {self.least} sample{'s' * (self.least > 1)} over all ranks; got "
                f"{samples}, embeddings of shape {list(z.shape)} here."
            )

    def _sample(self, z: Float[Tensor, "v n d"]) -> Float[Tensor, "samples rows d"]:
        return z.flatten(0, 1).unsqueeze(0) if self.joint else z


def to_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """fp32, or fp64 for fp64: the precision of every statistic."""
    return x if x.dtype == torch.float64 else x.float()
