"""Sums of the empirical characteristic function of projections at equally spaced knots, and their gradient, without ever
holding samples x slices x knots. Owns the arithmetic on one rank; knows nothing of ranks, weights or statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lejepa_scale.objective import cpu_kernels

_BLOCK = 1 << 16  # projections worked on at once on a CPU: their eight complex powers stay near the cache
_GRADIENTS = 1 << 18  # gradients of projections that a CPU holds at once, in the cache, ...
_ROWS = 64  # ... and the fewest directions among them, for which the matrix product is still efficient
_LONGEST_SUM = 8192  # a matrix product adds its terms one after another: in fp32 an error of about 1e-6 of the mean


def reference_sums(
    z: Float[Tensor, "v n d"], a: Float[Tensor, "m d"], dt: float, knots: int
) -> Float[Tensor, "2 {knots}-1 v m"]:
    """The textbook form: materializes [V, N, M, K-1]. Differentiable; the oracle of the fused one."""
    t = dt * torch.arange(1, knots, device=z.device, dtype=z.dtype)
    angles = (z @ a.mT).unsqueeze(-1) * t  # [V, N, M, K-1]
    return torch.stack([angles.cos().sum(1), angles.sin().sum(1)]).movedim(-1, 1)


def fused_sums(
    z: Float[Tensor, "v n d"], a: Float[Tensor, "m d"], dt: float, knots: int, backend: str, tf32: bool = False
) -> Float[Tensor, "2 {knots}-1 v m"]:
    """sum_n cos(t_k p_n) and sum_n sin(t_k p_n) of the projections p = z a^T, for t_k = k dt, k = 1 .. knots-1 (k = 0 is
    constant and left out). Differentiable in z; the directions `a` are constants.

    backend: `fused` (eager), `native` (C++, CPU) or `triton` (CUDA). Inside torch.compile all are the same traced code.
    tf32: of the projections and their gradient's product in fp32 on CUDA, what is multiplied is rounded to TF32.

    Time is linear in V N M. The projections are kept for the backward pass, which recomputes the rest: V N M floats, and as
    many again while it runs on CUDA; on a CPU it runs in blocks.
    """
    return _FusedSums.apply(z, a, dt, knots, _arithmetic(backend), tf32)


@dataclass(frozen=True)
class Arithmetic:
    """One implementation of the two inner loops. Rows are (view, direction) pairs.

    sums(p [R, N], dt, knots) -> [2, K-1, R];  gradient(p [R, N], w [2, K-1, R], dt) -> sum_k (w_1k cos - w_0k sin) [R, N]
    """

    sums: Callable[[Tensor, float, int], Tensor]
    gradient: Callable[[Tensor, Tensor, float], Tensor]


class _FusedSums(torch.autograd.Function):
    """Directions lie before samples ([V, M, N]), so that sums run over contiguous memory."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Float[Tensor, "v n d"],
        a: Float[Tensor, "m d"],
        dt: float,
        knots: int,
        arithmetic: Arithmetic,
        tf32: bool,
    ) -> Float[Tensor, "2 {knots}-1 v m"]:
        p = _product(a.expand(len(z), -1, -1), z.mT, tf32)  # [V, M, N]
        ctx.save_for_backward(p, a)
        ctx.dt, ctx.arithmetic, ctx.tf32 = dt, arithmetic, tf32
        return arithmetic.sums(p.flatten(0, 1), dt, knots).unflatten(-1, p.shape[:2])

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Float[Tensor, "2 k v m"]
    ) -> tuple[Float[Tensor, "v n d"], None, None, None, None, None]:
        p, a = ctx.saved_tensors
        t = ctx.dt * torch.arange(1, grad.shape[1] + 1, device=p.device, dtype=p.dtype)
        weights = grad * t[:, None, None]  # [2, K-1, V, M]
        if not _in_blocks(p):
            dp = ctx.arithmetic.gradient(p.flatten(0, 1), weights.flatten(2), ctx.dt).view_as(p)
            return _product(dp.mT, a.expand(len(p), -1, -1), ctx.tf32), None, None, None, None, None
        dz = p.new_zeros(len(p), p.shape[2], a.shape[1])
        rows = max(_ROWS, _GRADIENTS // max(1, p.shape[2]))
        for view, (p_of_view, dz_of_view) in enumerate(zip(p, dz, strict=True)):
            for start in range(0, len(a), rows):
                part = slice(start, start + rows)
                dp = ctx.arithmetic.gradient(p_of_view[part], weights[:, :, view, part], ctx.dt)
                dz_of_view.addmm_(dp.T, a[part])
        return dz, None, None, None, None, None


def _in_blocks(p: Tensor) -> bool:
    """Whether gradients of projections are made, and used, in pieces that stay in a core's cache."""
    return p.device.type == "cpu" and not torch.compiler.is_compiling()


def _product(x: Float[Tensor, "v i j"], y: Float[Tensor, "v j k"], tf32: bool) -> Float[Tensor, "v i k"]:
    if not tf32 or not x.is_cuda:
        return torch.bmm(x, y)
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        return torch.bmm(x, y)
    finally:
        products.fp32_precision = before


# --- Eager: exp(i (a B + b) x) = exp(i a B x) exp(i b x). Some sqrt(K) powers of each kind are made by multiplication, and
# one small matrix product per row combines them, so that a row is swept 2 sqrt(K) times rather than K times.


def _blocked_sums(p: Float[Tensor, "r n"], dt: float, knots: int) -> Float[Tensor, "2 {knots}-1 r"]:
    count = knots - 1
    out = p.new_zeros(count, len(p), dtype=p.dtype.to_complex())
    for rows, _samples, near, far in _powers(p, dt, count):
        out[:, rows] += (far @ near.mT).flatten(1).T[:count]
    return torch.stack([out.real, out.imag])


def _blocked_gradient(p: Float[Tensor, "r n"], weights: Float[Tensor, "2 k r"], dt: float) -> Float[Tensor, "r n"]:
    """Re sum_k (w_1k + i w_0k) exp(i k x)"""
    count = weights.shape[1]
    steps, strides = _grid(count)
    padded = weights.new_zeros(len(p), strides * steps, dtype=p.dtype.to_complex())
    padded[:, :count] = torch.complex(weights[1], weights[0]).T
    mixing = padded.unflatten(1, (strides, steps))  # [R, A, B]
    out = torch.empty_like(p)
    for rows, samples, near, far in _powers(p, dt, count):
        mixed = mixing[rows] @ near  # [R, A, N]
        out[rows, samples] = mixed.mul_(far).real.sum(1)
    return out


def _powers(p: Float[Tensor, "r n"], dt: float, count: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows and samples of a block, and powers of u = exp(i dt p) there: u^b for b = 1 .. steps [R, steps, N], and
    u^(a steps) for a = 0 .. strides-1 [R, strides, N]. The buffers are used again: fresh memory costs more than arithmetic.
    """
    steps, strides = _grid(count)
    buffers: tuple[Tensor, Tensor] | None = None
    for rows, samples in _blocks(p):
        angle = p[rows, samples] * dt
        if buffers is None:
            shape, kind = (len(angle), steps + strides, angle.shape[1]), p.dtype.to_complex()
            buffers = angle.new_empty(shape, dtype=kind).split([steps, strides], 1)
        near, far = (buffer[: len(angle), :, : angle.shape[1]] for buffer in buffers)
        near.real[:, 0], near.imag[:, 0] = angle.cos(), angle.sin()
        for b in range(1, steps):
            torch.mul(near[:, b - 1], near[:, 0], out=near[:, b])
        far[:, 0] = 1.0
        for a in range(1, strides):
            torch.mul(far[:, a - 1], near[:, -1], out=far[:, a])
        yield rows, samples, near, far


def _grid(count: int) -> tuple[int, int]:
    """steps x strides >= count, both near its square root."""
    steps = math.isqrt(count - 1) + 1
    return steps, -(-count // steps)


def _blocks(p: Float[Tensor, "r n"]) -> Iterator[tuple[slice, slice]]:
    """Few enough samples to add in one accumulator, few enough rows to stay in the cache."""
    columns = min(max(1, p.shape[1]), _LONGEST_SUM)
    rows = max(1, _BLOCK // columns) if p.device.type == "cpu" else max(1, len(p))
    for row in range(0, len(p), rows):
        for column in range(0, p.shape[1], columns):
            yield slice(row, row + rows), slice(column, column + columns)


# --- Traced: plain tensor operations for torch.compile, which fuses them into the caller's graph.


def _rotated_sums(p: Float[Tensor, "r n"], dt: float, knots: int) -> Float[Tensor, "2 {knots}-1 r"]:
    angle = p * dt
    cos1, sin1 = angle.cos(), angle.sin()
    cos, sin = cos1, sin1
    sums = [cos.sum(1), sin.sum(1)]
    for _ in range(2, knots):
        cos, sin = cos * cos1 - sin * sin1, sin * cos1 + cos * sin1
        sums += [cos.sum(1), sin.sum(1)]
    return torch.stack([torch.stack(sums[0::2]), torch.stack(sums[1::2])])


def _horner_gradient(p: Float[Tensor, "r n"], weights: Float[Tensor, "2 k r"], dt: float) -> Float[Tensor, "r n"]:
    """Re sum_k (w_1k + i w_0k) exp(i k x) by Horner's rule in exp(i x)."""
    angle = p * dt
    cos1, sin1 = angle.cos(), angle.sin()
    real, imaginary = torch.zeros_like(p), torch.zeros_like(p)
    for k in range(weights.shape[1] - 1, -1, -1):
        real, imaginary = real + weights[1, k].unsqueeze(1), imaginary + weights[0, k].unsqueeze(1)
        real, imaginary = real * cos1 - imaginary * sin1, real * sin1 + imaginary * cos1
    return real


_traced = Arithmetic(_rotated_sums, _horner_gradient)
_fused = Arithmetic(_blocked_sums, _blocked_gradient)
_cpu = Arithmetic(cpu_kernels.sums, cpu_kernels.gradient)


def _arithmetic(backend: str) -> Arithmetic:
    if torch.compiler.is_compiling():
        return _traced
    if backend == "fused":
        return _fused
    return _cpu if backend == "native" else _triton()


def _triton() -> Arithmetic:
    from lejepa_scale.objective import triton_kernels

    return Arithmetic(triton_kernels.sums, triton_kernels.gradient)


def has_triton() -> bool:
    """Whether the package is installed."""
    return find_spec("triton") is not None
