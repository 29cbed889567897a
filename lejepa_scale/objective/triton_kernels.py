"""The two inner loops of `characteristic` as Triton kernels, one tile of projections in registers. Imported only where
Triton is used: on CUDA, and in Triton's interpreter by the tests."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

_TILE = 512  # samples per program: 16 per thread of one warp, so that a sum over them needs no shared memory


@triton.jit
def _sums_kernel(p, out, rows, samples, DT: tl.constexpr, KNOTS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    row, tile = tl.program_id(0), tl.program_id(1)
    n = tile * TILE + tl.arange(0, TILE)
    inside = n < samples
    angle = tl.load(p + row.to(tl.int64) * samples + n, mask=inside, other=0.0) * DT
    cos1, sin1 = tl.cos(angle), tl.sin(angle)
    # a padded sample keeps cos = 0 under every rotation, since both its parts start at zero
    cos, sin = tl.where(inside, cos1, 0.0), tl.where(inside, sin1, 0.0)
    out += tile.to(tl.int64) * 2 * (KNOTS - 1) * rows + row
    for k in tl.static_range(KNOTS - 1):
        tl.store(out + k * rows, tl.sum(cos))
        tl.store(out + (KNOTS - 1 + k) * rows, tl.sum(sin))
        cos, sin = cos * cos1 - sin * sin1, sin * cos1 + cos * sin1


@triton.jit
def _gradient_kernel(p, w, out, rows, samples, DT: tl.constexpr, KNOTS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    row, tile = tl.program_id(0), tl.program_id(1)
    n = tile * TILE + tl.arange(0, TILE)
    inside = n < samples
    start = row.to(tl.int64) * samples
    angle = tl.load(p + start + n, mask=inside, other=0.0) * DT
    cos1, sin1 = tl.cos(angle), tl.sin(angle)
    real, imaginary = tl.zeros_like(angle), tl.zeros_like(angle)
    w += row
    for i in tl.static_range(KNOTS - 1):  # Horner's rule in exp(i angle), from the last knot to the first
        k = KNOTS - 2 - i
        real += tl.load(w + (KNOTS - 1 + k) * rows)
        imaginary += tl.load(w + k * rows)
        real, imaginary = real * cos1 - imaginary * sin1, real * sin1 + imaginary * cos1
    tl.store(out + start + n, real, mask=inside)


def sums(p: Float[Tensor, "r n"], dt: float, knots: int) -> Float[Tensor, "2 {knots}-1 r"]:
    """Cosine and sine sums. Partial sums of the tiles are added in a fixed order: the result is reproducible."""
    rows, samples = p.shape
    tiles = triton.cdiv(samples, _TILE)
    out = p.new_empty(tiles, 2, knots - 1, rows)
    if out.numel():
        _sums_kernel[(rows, tiles)](p, out, rows, samples, DT=dt, KNOTS=knots, TILE=_TILE, num_warps=1)
    return out.sum(0)


def gradient(p: Float[Tensor, "r n"], weights: Float[Tensor, "2 k r"], dt: float) -> Float[Tensor, "r n"]:
    """sum_k (weights_1k cos - weights_0k sin)(k dt p)."""
    rows, samples = p.shape
    out = torch.empty_like(p)
    if out.numel():
        _gradient_kernel[(rows, triton.cdiv(samples, _TILE))](
            p, weights.contiguous(), out, rows, samples, DT=dt, KNOTS=weights.shape[1] + 1, TILE=_TILE, num_warps=1
        )
    return out
