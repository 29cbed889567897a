"""Batch normalisation over the global batch: fp32 statistics, synchronised over ranks, for any input precision."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lejepa_scale.distributed import all_gather, all_reduce_sum


class BatchNorm(nn.Module):
    """Normalise channel (dim 1) over all other dims and all ranks; drop-in for nn.BatchNorm1d/2d by parameter name.

    Statistics, affine and output are computed in fp32 (fp64 for fp64) whatever the parameters were cast to, and the
    input's dtype is returned. Unequal batches per rank are right. One small collective forward, one backward.
    With `track` the running averages of nn.BatchNorm are kept (identical on all ranks) and used in eval mode; without,
    batch statistics are always used and there is no buffer to go stale. `act` follows, as in timm's BatchNormAct2d.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, width: int, eps: float = 1e-5, momentum: float = 0.1, track: bool = False, act: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.eps, self.momentum, self.track = eps, momentum, track
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        if track:
            self.register_buffer("running_mean", torch.zeros(width))
            self.register_buffer("running_var", torch.ones(width))
            self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.act = act or nn.Identity()

    def forward(self, x: Float[Tensor, "b c *rest"]) -> Float[Tensor, "b c *rest"]:
        wide = x if x.dtype == torch.float64 else x.float()
        shape = _per_channel(x)
        if self.training or not self.track:
            y, mean, var, count = _Standardise.apply(wide, self.eps)
            if self.track and self.training:
                self._update(mean, var, count)
        else:
            mean, var = self.running_mean.to(wide.dtype), self.running_var.to(wide.dtype)
            y = (wide - mean.view(shape)) * (var.view(shape) + self.eps).rsqrt()
        y = y * self.weight.to(wide.dtype).view(shape) + self.bias.to(wide.dtype).view(shape)
        return self.act(y.to(x.dtype))

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        unbiased = var * (count / (count - 1).clamp_min(1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked += 1


class _Standardise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims, shape = _all_but_channel(x), _per_channel(x)
        n = x.numel() // x.shape[1]
        mean = x.mean(dims) if n else x.new_zeros(x.shape[1])
        m2 = (x - mean.view(shape)).square().sum(dims)
        # Chan's combination of (count, mean, M2) per rank: no cancellation when the mean is large
        parts = all_gather(torch.cat([x.new_tensor([n]), mean, m2]))  # [W, 1 + 2C]
        counts, means, m2s = parts[:, :1], *parts[:, 1:].chunk(2, dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        var = (m2s + counts * (means - mean).square()).sum(0) / count
        inverse = (var + eps).rsqrt()
        y = (x - mean.view(shape)) * inverse.view(shape)
        ctx.save_for_backward(y, inverse, count)
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        y, inverse, count = ctx.saved_tensors
        dims, shape = _all_but_channel(grad), _per_channel(grad)
        sums = all_reduce_sum(torch.stack([grad.sum(dims), (grad * y).sum(dims)])) / count
        return inverse.view(shape) * (grad - sums[0].view(shape) - y * sums[1].view(shape)), None


def synchronised(module: nn.Module) -> nn.Module:
    """Replace every nn.BatchNorm1d/2d inside `module` (timm's BatchNormAct2d too), keeping names and values."""
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
            new = BatchNorm(child.num_features, child.eps, child.momentum or 0.1, True, getattr(child, "act", None))
            new.to(child.weight.dtype).load_state_dict(child.state_dict())
            setattr(module, name, new)
        else:
            synchronised(child)
    return module


def _all_but_channel(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _per_channel(x: Tensor) -> list[int]:
    return [1, x.shape[1], *[1] * (x.ndim - 2)]
