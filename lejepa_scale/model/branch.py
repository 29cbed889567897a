"""Stochastic depth by subsets: which tokens of a packed row a residual branch processes, and how they leave the row and come
back to it. Owns the passes over the residual stream; refuses to know what a branch computes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int32
from timm.layers import LayerNorm
from torch import Tensor, nn

from lejepa_scale.model.attention import Packing


class Subset(NamedTuple):
    """The tokens of a row that one branch processes: those of k of the n sequences of every group."""

    taken: Int32[Tensor, " k"]  # of every token of the branch, its place in the row
    place: Int32[Tensor, " t"]  # of every token of the row, its place in the branch; -1: left out
    scale: Float[Tensor, " k"]  # n / k of its group: what it contributes is scaled up to keep the mean
    groups: tuple[tuple[int, int, int], ...]  # n, k, tokens of a sequence


def draw(packing: Packing, branches: Sequence[Packing], device: torch.device) -> list[tuple[Subset, Subset] | None]:
    """What the attention and the MLP branch of every block process: sequences drawn at random, as many as `branches` says.
    None for a block that leaves out nothing. In few kernels for all blocks, and without a wait for the device."""
    if all(branch == packing for branch in branches):
        return [None] * len(branches)
    indices, places, first = list[Tensor](), list[Tensor](), 0
    for group, (n, length) in enumerate(packing.groups):
        kept, before = _bounds(tuple(branches), group, device)  # [blocks, 1, 1, 1]
        order = torch.rand(len(branches), 2, n, device=device).argsort(-1)
        rank = order.argsort(-1).int().unsqueeze(-1)
        within = torch.arange(length, device=device, dtype=torch.int32)
        indices.append((order.int().unsqueeze(-1) * length + (within + first)).flatten(2))  # [blocks, 2, n length]
        places.append(torch.where(rank < kept, before + rank * length + within, -1).flatten(2))
        first += n * length
    sizes = [[k * length for k, length in branch.groups] for branch in branches]
    parts = [
        part[block, b, :size]
        for block, row in enumerate(sizes)
        for b in (0, 1)
        for part, size in zip(indices, row, strict=True)
    ]
    index = iter(torch.cat(parts).split([branch.tokens for branch in branches for _ in (0, 1)]))
    place = torch.cat(places, 2)  # [blocks, 2, T]
    found: list[tuple[Subset, Subset] | None] = []
    for block, branch in enumerate(branches):
        groups = tuple((n, k, length) for (n, length), (k, _) in zip(packing.groups, branch.groups, strict=True))
        scale = _scale(groups, device)
        two = tuple(Subset(next(index), place[block, b], scale, groups) for b in (0, 1))
        found.append(None if branch == packing else cast(tuple[Subset, Subset], two))
    return found


@lru_cache(maxsize=256)
def _bounds(
    branches: tuple[Packing, ...], group: int, device: torch.device
) -> tuple[Int32[Tensor, "blocks 1 1 1"], Int32[Tensor, "blocks 1 1 1"]]:
    """For every block, the sequences that it keeps of a group, and its tokens of the groups before."""
    kept = [branch.groups[group][0] for branch in branches]
    before = [Packing(branch.groups[:group]).tokens for branch in branches]
    both = torch.tensor([kept, before], dtype=torch.int32).to(device)[..., None, None, None]
    return both[0], both[1]


@lru_cache(maxsize=256)
def _scale(groups: tuple[tuple[int, int, int], ...], device: torch.device) -> Float[Tensor, " k"]:
    return torch.cat([torch.full((k * length,), n / k) for n, k, length in groups]).to(device)


def enter(
    x: Float[Tensor, "t e"], subset: Subset, norm: nn.Module | None
) -> tuple[Float[Tensor, "k e"], Float[Tensor, "t e"]]:
    """The tokens of the branch, normalized where it begins with a `norm`; and the row, to go past the branch to `leave`,
    which makes one pass of both gradients."""
    if norm is not None and _has_kernels(x) and type(norm) in (nn.LayerNorm, LayerNorm) and norm.weight is not None:
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        return _TakeNormalized.apply(x, norm.weight, norm.bias, norm.eps, dtype, subset)
    own, x = _Take.apply(x, *subset)
    return (own if norm is None else norm(own)), x


def leave(
    x: Float[Tensor, "t e"], own: Float[Tensor, "k e"], gamma: Float[Tensor, " e"] | None, subset: Subset
) -> Float[Tensor, "t e"]:
    """The residual sum: what comes out of the branch, times its layer scale and the subset's, on its tokens of the row."""
    if _has_kernels(x):
        return _GiveScaled.apply(x, own, gamma, subset)
    return _Give.apply(x, own if gamma is None else own * gamma, *subset)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "t e"], index: Tensor, place: Tensor, scale: Tensor, groups: Any
    ) -> tuple[Float[Tensor, "k e"], Float[Tensor, "t e"]]:
        ctx.save_for_backward(index, place)
        return x.index_select(0, index), x.view_as(x)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, of_own: Float[Tensor, "k e"], of_row: Float[Tensor, "t e"]
    ) -> tuple[Float[Tensor, "t e"] | None, ...]:
        index, place = ctx.saved_tensors
        return _sum(of_row, of_own, index, place), None, None, None, None


class _Give(torch.autograd.Function):
    """torch's own `index_add` would keep what it adds for the backward pass, which needs its shape alone: a branch's whole
    output, in every block."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "t e"],
        own: Float[Tensor, "k e"],
        index: Tensor,
        place: Tensor,
        scale: Tensor,
        groups: Any,
    ) -> Float[Tensor, "t e"]:
        ctx.save_for_backward(index, scale)
        ctx.dtype, ctx.groups = own.dtype, groups
        if torch.compiler.is_compiling():
            return _sum(x, own * scale[:, None], index, place)
        out, start = x.clone(), 0
        for n, k, length in groups:
            part = slice(start, start := start + k * length)
            out.index_add_(0, index[part], own[part].to(x.dtype), alpha=n / k)
        return out

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Float[Tensor, "t e"]
    ) -> tuple[Float[Tensor, "_t_or_k e"] | None, ...]:
        index, scale = ctx.saved_tensors
        own = grad.index_select(0, index)
        if torch.compiler.is_compiling():
            own = own * scale[:, None]
        else:
            for (n, k, _), part in zip(ctx.groups, own.split([k * length for _, k, length in ctx.groups]), strict=True):
                part.mul_(n / k)
        return grad, own.to(ctx.dtype), None, None, None, None


def _sum(
    row: Float[Tensor, "t e"], own: Float[Tensor, "k e"], index: Int32[Tensor, " k"], place: Int32[Tensor, " t"]
) -> Float[Tensor, "t e"]:
    """`row`, with `own` added on its tokens."""
    if torch.compiler.is_compiling():  # which joins a gather with what is around it, and scatters by atomic operations
        there = own.index_select(0, place.clamp_min(0))
        return row + torch.where(place[:, None] >= 0, there, 0).to(row.dtype)
    return row.index_add(0, index, own.to(row.dtype))


class _TakeNormalized(torch.autograd.Function):
    """Layer normalization of the tokens that leave the row, and in the backward pass its gradient on those of the row's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "t e"],
        weight: Float[Tensor, " e"],
        bias: Float[Tensor, " e"] | None,
        eps: float,
        dtype: torch.dtype,
        subset: Subset,
    ) -> tuple[Float[Tensor, "k e"], Float[Tensor, "t e"]]:
        y, rows, statistics = _kernels().take(x, subset.taken, weight, bias, eps, dtype)
        ctx.save_for_backward(rows, statistics, weight, subset.place)
        ctx.has_bias = bias is not None
        return y, x.view_as(x)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, of_own: Float[Tensor, "k e"], of_row: Float[Tensor, "t e"]
    ) -> tuple[Float[Tensor, "..."] | None, ...]:
        rows, statistics, weight, place = ctx.saved_tensors
        of_x, of_weight, of_bias = _kernels().take_backward(of_own, of_row, rows, statistics, weight, place)
        return of_x, of_weight, of_bias if ctx.has_bias else None, None, None, None


class _GiveScaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "t e"], own: Float[Tensor, "k e"], gamma: Float[Tensor, " e"] | None, subset: Subset
    ) -> Float[Tensor, "t e"]:
        ctx.save_for_backward(subset.taken, subset.scale, gamma, None if gamma is None else own)
        ctx.dtype = own.dtype
        return _kernels().give(x, own, gamma, subset.place, subset.scale)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Float[Tensor, "t e"]
    ) -> tuple[Float[Tensor, "..."] | None, ...]:
        index, scale, gamma, own = ctx.saved_tensors
        of_own, of_gamma = _kernels().give_backward(grad, own, gamma, index, scale, ctx.dtype)
        return grad, of_own, None if gamma is None else of_gamma, None


def _has_kernels(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype != torch.float64 and not torch.compiler.is_compiling() and _has_triton()


@lru_cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@lru_cache
def _kernels() -> Any:
    from lejepa_scale.model import branch_triton  # which defines them

    return getattr(torch.ops, branch_triton.LIBRARY.ns)
