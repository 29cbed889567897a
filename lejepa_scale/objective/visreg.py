"""VISReg (arXiv 2606.02572): its shape term, a regularizer that compares sorted projections with normal quantiles, and its
scale and centre terms, which may stand beside any regularizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lejepa_scale.objective.comm_cost import traffic
from lejepa_scale.objective.regularizer import Regularizer
from lejepa_scale.objective.sigreg import unit_rows
from lejepa_scale.objective.sorting import sort_rows
from lejepa_scale.parallel.collectives import counts_of_ranks, gather_rows
from lejepa_scale.parallel.process_group import Group, rank, world_size

_EPSILON = 1e-6  # what the published code adds to sigma
_CPU_BLOCK = 1 << 16  # projections sorted at once on a CPU: they and their order stay in its cache, ...
_ROWS = 64  # ... and the fewest directions among them, for which the matrix products are still efficient
_DEVICE_BLOCK = 1 << 24  # elsewhere: some 400 MB in flight, and few launches


class VISReg(Regularizer):
    r"""VISReg's shape term, averaged over views (arXiv 2606.02572), over the global batch of N samples:

        x_n   = (z_n - mu) / sigma, for every dimension, with sigma a constant in the gradient
        p_m   = x a_m^T, for `num_slices` unit directions a_m drawn from (seed, step)
        shape = mean over m and i of (p_m(i) - Phi^-1(i / (N + 1)))^2, where p_m(1) <= ... <= p_m(N)

    sigma is the biased standard deviation plus 1e-6, as in the published code. The term knows nothing of mean and scale: in
    LeJEPALoss VISReg's two terms for these stand beside it at weight 1 (`scale_centre`), and the three are the published
    regularizer. Its gradient grows as 1 / sigma where embeddings collapse: clip the norm of gradients, to 1 as published.
    Equal projections are sorted in the order of samples, so that embeddings that are all the same are parted too.

    Order statistics are no sums over samples. So ranks gather the embeddings, sent as they are, each sorts all of them along
    its share of the directions, and the gradients are reduce-scattered in fp32 (`distinct` in comm_cost.Traffic).

    The projections are made, sorted and used for the gradient in blocks of directions, in the forward pass: what is kept is
    the gradient, [V, N, D]. It can be differentiated once. Raises ValueError for num_slices below 1 and for fewer than 2
    samples. Embeddings that are not finite give NaN.
    """

    scale_centre = 1.0

    def __init__(self, num_slices: int = 4096, group: Group = None, *, joint: bool = False, seed: int = 0) -> None:
        super().__init__(joint=joint, group=group, seed=seed, least=2)
        if num_slices < 1:
            raise ValueError(f"VISReg needs num_slices >= 1; got {num_slices}.")
        self.num_slices = num_slices

    def directions(
        self, step: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "{self.num_slices} {width}"]:
        """Unit rows drawn from (seed, step) alone: the same on every rank, others at the next step, no hidden state."""
        return unit_rows(self.seed, step, self.num_slices, width, device, dtype)

    def traffic(self, views: int, counts: Sequence[int], width: int, itemsize: int = 4) -> int:
        """Bytes that a rank sends for embeddings [views, counts[r], width] on rank r, forward and backward."""
        return traffic(views, counts, width, slices=self.num_slices, knots=1, itemsize=itemsize).distinct

    def reduced(
        self, z: Float[Tensor, "v n d"], extra: Float[Tensor, " e"], *, step: int, counts: Sequence[int] | None = None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " e"]]:
        if world_size(self.group) > 1:
            counts = counts_of_ranks(z.shape[1], self.group) if counts is None else counts
            self._refuse_too_few(z, counts)
            counts = [len(z) * n for n in counts] if self.joint else counts
            z = gather_rows(self._sample(z), counts, same_use=False, group=self.group)
        return super().reduced(z, extra, step=step, counts=[z.shape[1]])

    def local_sums(self, z: Float[Tensor, "v n d"], step: int) -> Float[Tensor, " 1"]:
        """The part of this rank's directions in the value. z: the embeddings of all ranks."""
        a = self.directions(step, z.shape[-1], z.device, z.dtype)
        a = a.tensor_split(world_size(self.group))[rank(self.group)]
        distance = _SortedDistance.apply(standardized(z), a, quantiles(z.shape[1], z.device, z.dtype))
        return distance[None] / (len(z) * z.shape[1] * self.num_slices)

    def statistic(self, sums: Float[Tensor, " 1"], count: Float[Tensor, ""], step: int) -> Float[Tensor, ""]:
        """The sum over all directions, which is the value."""
        return sums[0]


def standardized(z: Float[Tensor, "v n d"]) -> Float[Tensor, "v n d"]:
    """(z - mu) / sigma of every view and dimension. The gradient passes through mu, but not through sigma."""
    z = z - z.detach().mean(1, keepdim=True)  # twice: beside a large mean the first is off by its rounding
    z = z - z.mean(1, keepdim=True)
    return z / (z.detach().square().mean(1, keepdim=True).sqrt() + _EPSILON)


def quantiles(samples: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, " {samples}"]:
    """Phi^-1(i / (N + 1)) for i = 1 .. N."""
    i = torch.arange(1, samples + 1, device=device, dtype=torch.float64)
    return torch.special.ndtri(i / (samples + 1)).to(dtype)


class _SortedDistance(torch.autograd.Function):
    """sum over views, directions and i of (p_(i) - target_i)^2, for the sorted projections p = x a^T. Directions lie before
    samples ([V, M, N]), so that contiguous memory is sorted."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "v n d"], a: Float[Tensor, "m d"], target: Float[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        total, gradient = x.new_zeros(()), torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        for rows in a.split(_directions_at_once(x)):
            part = rows.expand(len(x), -1, -1)
            p = torch.bmm(part, x.mT)  # [V, B, N]
            difference, order = sort_rows(p)
            difference -= target
            total += difference.square().sum()
            if gradient is not None:
                p.scatter_(2, order, difference)  # back to the order of samples
                gradient += torch.bmm(p.mT, part)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, ""]) -> tuple[Float[Tensor, "v n d"], None, None]:
        (gradient,) = ctx.saved_tensors
        return 2 * grad * gradient, None, None


def _directions_at_once(x: Float[Tensor, "v n d"]) -> int:
    rows = x.shape[0] * x.shape[1]
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # which would unroll many blocks
        return max(_ROWS, _CPU_BLOCK // rows)
    return max(1, _DEVICE_BLOCK // rows)


def most_in_flight(rows: int, slices: float, width: int) -> float:
    """Bytes that a forward pass over `rows` embeddings (views by samples) holds at most beside the gradient, on any device:
    a block of projections, sorted ones, their squares and their order; embeddings; directions."""
    block = min(rows * slices, max(_DEVICE_BLOCK, rows))
    return (3 * 4 + 8) * block + 4 * width * (3 * rows + slices)


def scale_and_centre_sums(z: Float[Tensor, "v n d"], origin: Float[Tensor, "v 1 d"]) -> Float[Tensor, "2 v d"]:
    """This rank's part of what `scale_and_centre` needs: sums of the differences from `origin`, and of their squares."""
    z = z - origin
    return torch.stack([z.sum(1), z.square().sum(1)])


def scale_and_centre(
    sums: Float[Tensor, "2 v d"], count: Float[Tensor, ""], origin: Float[Tensor, "v 1 d"]
) -> Float[Tensor, ""]:
    r"""mean over views and dimensions of (1 - sigma_j)^2 + mu_j^2: VISReg's scale and centre terms (arXiv 2606.02572).

    SIGReg's gradient vanishes linearly in the scale of the embeddings at collapse; that of (1 - sigma)^2 does not. sigma is
    the biased standard deviation over the global batch plus 1e-6, as in the published code. `origin` changes no value, being
    the same on every rank and without a gradient; near the mean it keeps a small sigma beside a large mu from drowning in
    rounding. The pull ends where sigma^2 is no number of fp32 any more (sigma < 1e-18): embeddings that are equal have no
    direction in which to part.
    """
    offset, square = sums / count
    sigma = (square - offset.square()).clamp_min(1e-36).sqrt() + _EPSILON
    return ((1 - sigma).square() + (origin.squeeze(1) + offset).square()).mean()
