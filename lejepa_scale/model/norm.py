"""Batch normalization over the global batch: fp32 statistics, synchronized over ranks, for any input precision."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lejepa_scale.model import norm_cpu
from lejepa_scale.parallel.collectives import all_gather


class BatchNorm(nn.Module):
    """Normalize channel (dim 1) over all other dims and all ranks; drop-in for nn.BatchNorm1d/2d by parameter name.

    Statistics, affine and output are computed in fp32 (fp64 for fp64) whatever the parameters were cast to, and the
    input's dtype is returned. Unequal batches per rank are right. One small collective forward, one backward.
    With `track` the running averages of nn.BatchNorm are kept (identical on all ranks) and used in eval mode; without,
    batch statistics are always used and there is no buffer to go stale. momentum: None averages over all batches alike.
    `drop` and `act` follow, as in timm's BatchNormAct2d.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    running_mean: Float[Tensor, " c"]
    running_var: Float[Tensor, " c"]
    num_batches_tracked: Int[Tensor, ""]

    def __init__(
        self, width: int, eps: float = 1e-5, momentum: float | None = 0.1, track: bool = False, affine: bool = True,
        drop: nn.Module | None = None, act: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.eps, self.momentum, self.track = width, eps, momentum, track
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None
        if track:
            self.register_buffer("running_mean", torch.zeros(width))
            self.register_buffer("running_var", torch.ones(width))
            self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.drop, self.act = drop or nn.Identity(), act or nn.Identity()

    def forward(self, x: Float[Tensor, "b c *rest"]) -> Float[Tensor, "b c *rest"]:
        wide = x if x.dtype == torch.float64 else x.float()
        weight, bias = (
            wide.new_full((wide.shape[1],), neutral) if given is None else given.to(wide.dtype)
            for given, neutral in ((self.weight, 1.0), (self.bias, 0.0))
        )
        if self.training or not self.track:
            y, mean, var, count = _Normalize.apply(wide, weight, bias, self.eps)
            if self.track and self.training:
                self._update(mean, var, count)
        else:
            mean, var = self.running_mean.to(wide.dtype), self.running_var.to(wide.dtype)
            y = F.batch_norm(wide, mean, var, weight, bias, eps=self.eps)
        return self.act(self.drop(y.to(x.dtype)))

    @torch.no_grad()
    def _update(self, mean: Float[Tensor, " c"], var: Float[Tensor, " c"], count: Float[Tensor, ""]) -> None:
        unbiased = var * (count / (count - 1).clamp_min(1))
        self.num_batches_tracked += 1
        share: Any = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        for average, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            average.lerp_(value.to(average.dtype), share)


class _Normalize(torch.autograd.Function):
    """Each half of the work in few passes over memory, with the ranks' statistics exchanged between the halves."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "b c *rest"], weight: Float[Tensor, " c"], bias: Float[Tensor, " c"], eps: float
    ) -> tuple[Float[Tensor, "b c *rest"], Float[Tensor, " c"], Float[Tensor, " c"], Float[Tensor, ""]]:
        ctx.kernels = norm_cpu.usable(x)
        # Chan's combination of (count, mean, M2) per rank: no cancellation when the mean is large
        parts = all_gather(norm_cpu.statistics(x) if ctx.kernels else _statistics(x))  # [W, 1 + 2C]
        counts, means, m2s = parts[:, :1], *parts[:, 1:].chunk(2, dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        var = (m2s + counts * (means - mean).square()).sum(0) / count
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, count)
        if ctx.kernels:
            return norm_cpu.normalize(x, mean, weight * (var + eps).rsqrt(), bias), mean, var, count
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, var, count

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Float[Tensor, "b c *rest"], *_: Tensor
    ) -> tuple[Float[Tensor, "b c *rest"], Float[Tensor, " c"], Float[Tensor, " c"], None]:
        """dx = weight / sigma (grad - sum(grad) / N - y sum(grad y) / N), with y = (x - mean) / sigma."""
        x, weight, mean, var, count = ctx.saved_tensors
        inverse = (var + ctx.eps).rsqrt()
        own_sums = x.new_zeros(2, x.shape[1])  # of grad y and grad on this rank: the affine parameters' gradients
        if ctx.kernels:
            own_sums = norm_cpu.gradient_sums(grad, x, mean)
            own_sums[0] *= inverse
        elif x.numel():
            own_sums = torch.stack(
                torch.ops.aten.native_batch_norm_backward(  # as in training: on CUDA only that takes saved statistics
                    grad, x, weight, None, None, mean, inverse, True, ctx.eps, [False, True, True]
                )[1:]
            )
        of_product, of_grad = all_gather(own_sums).sum(0) / count
        scale = weight * inverse
        slope, shift = -scale * inverse * of_product, scale * of_grad
        if ctx.kernels:
            return norm_cpu.gradient(grad, x, mean, slope, scale, shift), own_sums[0], own_sums[1], None
        shape = [1, -1, *[1] * (x.ndim - 2)]
        dx = x - mean.view(shape)  # first, lest sums over the batch that ought to be zero fill with rounding
        dx.mul_(slope.view(shape)).addcmul_(grad, scale.view(shape)).sub_(shift.view(shape))
        return dx, own_sums[0], own_sums[1], None


def _statistics(x: Float[Tensor, "b c *rest"]) -> Float[Tensor, " 1+2*c"]:
    """Values per channel, means, and sums of squared differences from them."""
    n = x.numel() // x.shape[1]
    if not n:
        mean = var = x.new_zeros(x.shape[1])
    elif x.is_meta or torch.compiler.is_compiling():  # the fast kernel is not known to either
        var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    else:
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    return torch.cat([x.new_full((1,), n), mean, var * n])


def synchronized(module: nn.Module) -> nn.Module:
    """Replace every batch normalization inside `module` (timm's BatchNormAct2d too), keeping names, values and settings."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, _of(child))
        else:
            synchronized(child)
    return module


def _of(theirs: nn.modules.batchnorm._BatchNorm) -> BatchNorm:
    drop, act = getattr(theirs, "drop", None), getattr(theirs, "act", None)
    held = [tensor for tensor in (theirs.weight, theirs.running_mean) if tensor is not None]
    with torch.device(
        held[-1].device if held else "cpu"
    ):  # averages keep their values beside weights on the meta device
        ours = BatchNorm(
            theirs.num_features, theirs.eps, theirs.momentum, theirs.running_mean is not None, theirs.affine, drop, act
        )
    if held:
        ours.to(held[0].dtype).load_state_dict(theirs.state_dict())
    return ours
