"""`branch`'s passes over the residual stream as Triton kernels: a token is read and written once, by one program. Imported
only where Triton is used: on CUDA, and in Triton's interpreter by the tests. They are operators of torch, which knows the
shapes of what they make without running them.

The sums over tokens that gradients of weights are, every program adds up for its own tokens in fp32; torch adds those of the
programs. Nothing is added by atomic operations: results are reproducible."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

_WAVES = 6  # programs on each processor where each goes through many tokens: as many as its registers hold


@triton.jit
def _take_kernel(  # type: ignore[no-untyped-def]
    x, index, weight, bias, y, rows, statistics, width, kept, eps, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr
):
    own = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < width
    token = tl.load(x + tl.load(index + own).to(tl.int64) * width + column, mask=inside, other=0.0)
    value = token.to(tl.float32)
    mean = tl.sum(value, 0) / width
    centred = tl.where(inside, value - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    out = centred * inverse * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    start = own.to(tl.int64) * width
    tl.store(rows + start + column, token, mask=inside)
    tl.store(y + start + column, out, mask=inside)
    tl.store(statistics + own, mean)
    tl.store(statistics + kept + own, inverse)


@triton.jit
def _take_backward_kernel(  # type: ignore[no-untyped-def]
    of_own, of_row, rows, statistics, weight, place, out, of_weight, of_bias, width, tokens, kept, WIDTH: tl.constexpr
):
    first = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    sum_of_weight, sum_of_bias = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for turn in range(tl.cdiv(tokens - first, tl.num_programs(0))):
        token = first + turn * tl.num_programs(0)
        at = token.to(tl.int64) * width + column
        gradient = tl.load(of_row + at, mask=inside, other=0.0).to(tl.float32)
        own = tl.load(place + token)
        if own >= 0:
            here = own.to(tl.int64) * width + column
            mean, inverse = tl.load(statistics + own), tl.load(statistics + kept + own)
            normal = (tl.load(rows + here, mask=inside, other=0.0).to(tl.float32) - mean) * inverse
            given = tl.load(of_own + here, mask=inside, other=0.0).to(tl.float32)
            sum_of_weight += given * normal
            sum_of_bias += given
            given *= w
            along = tl.sum(tl.where(inside, given * normal, 0.0), 0) / width
            gradient += inverse * (given - tl.sum(given, 0) / width - normal * along)
        tl.store(out + at, gradient, mask=inside)
    start = first.to(tl.int64) * width
    tl.store(of_weight + start + column, sum_of_weight, mask=inside)
    tl.store(of_bias + start + column, sum_of_bias, mask=inside)


@triton.jit
def _give_kernel(  # type: ignore[no-untyped-def]
    x, own, gamma, place, scale, out, width, HAS_GAMMA: tl.constexpr, WIDTH: tl.constexpr
):
    token = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < width
    at = token.to(tl.int64) * width + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    from_own = tl.load(place + token)
    if from_own >= 0:
        added = tl.load(own + from_own.to(tl.int64) * width + column, mask=inside, other=0.0).to(tl.float32)
        added *= tl.load(scale + from_own)
        if HAS_GAMMA:
            added *= tl.load(gamma + column, mask=inside, other=0.0).to(tl.float32)
        value += added
    tl.store(out + at, value, mask=inside)


@triton.jit
def _give_backward_kernel(  # type: ignore[no-untyped-def]
    grad, own, gamma, index, scale, of_own, of_gamma, width, kept, HAS_GAMMA: tl.constexpr, WIDTH: tl.constexpr
):
    first = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < width
    if HAS_GAMMA:
        factor = tl.load(gamma + column, mask=inside, other=0.0).to(tl.float32)
        sum_of_gamma = tl.zeros((WIDTH,), tl.float32)
    for turn in range(tl.cdiv(kept - first, tl.num_programs(0))):
        token = first + turn * tl.num_programs(0)
        there = tl.load(index + token).to(tl.int64) * width + column
        here = token.to(tl.int64) * width + column
        gradient = tl.load(grad + there, mask=inside, other=0.0).to(tl.float32) * tl.load(scale + token)
        if HAS_GAMMA:
            sum_of_gamma += gradient * tl.load(own + here, mask=inside, other=0.0).to(tl.float32)
            gradient *= factor
        tl.store(of_own + here, gradient, mask=inside)
    if HAS_GAMMA:
        tl.store(of_gamma + first.to(tl.int64) * width + column, sum_of_gamma, mask=inside)


def take(
    x: Float[Tensor, "t e"],
    index: Int32[Tensor, " k"],
    weight: Float[Tensor, " e"],
    bias: Float[Tensor, " e"] | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "k e"], Float[Tensor, "k e"], Float[Tensor, "2 k"]]:
    """Layer normalization of the tokens at `index`, in `dtype`; and for the backward pass those tokens, and the means and
    inverse deviations of them."""
    x, kept, width = x.contiguous(), len(index), x.shape[1]
    y, rows = x.new_empty(kept, width, dtype=dtype), x.new_empty(kept, width)
    statistics = x.new_empty(2, kept, dtype=torch.float32)
    if kept:
        given = weight if bias is None else bias
        _take_kernel[(kept,)](
            x, index, weight, given, y, rows, statistics, width, kept, eps, HAS_BIAS=bias is not None, **_shape(width)
        )
    return y, rows, statistics


def take_backward(
    of_own: Float[Tensor, "k e"],
    of_row: Float[Tensor, "t e"],
    rows: Float[Tensor, "k e"],
    statistics: Float[Tensor, "2 k"],
    weight: Float[Tensor, " e"],
    place: Int32[Tensor, " t"],
) -> tuple[Float[Tensor, "t e"], Float[Tensor, " e"], Float[Tensor, " e"]]:
    """The gradient of `take`'s input added to the row's; and those of weight and bias."""
    of_own, of_row, (tokens, width) = of_own.contiguous(), of_row.contiguous(), of_row.shape
    programs = _programs(tokens, of_row.device)
    out, sums = torch.empty_like(of_row), of_row.new_empty(2, programs, width, dtype=torch.float32)
    _take_backward_kernel[(programs,)](
        of_own, of_row, rows, statistics, weight, place, out, *sums, width, tokens, len(rows), **_shape(width)
    )
    of_weight, of_bias = sums.sum(1).to(weight.dtype)
    return out, of_weight, of_bias


def give(
    x: Float[Tensor, "t e"],
    own: Float[Tensor, "k e"],
    gamma: Float[Tensor, " e"] | None,
    place: Int32[Tensor, " t"],
    scale: Float[Tensor, " k"],
) -> Float[Tensor, "t e"]:
    """The residual sum: `own` times `gamma` and `scale`, on its tokens of the row."""
    x, own, out = x.contiguous(), own.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    given = x if gamma is None else gamma
    _give_kernel[(len(x),)](
        x, own, given, place, scale, out, x.shape[1], HAS_GAMMA=gamma is not None, **_shape(x.shape[1])
    )
    return out


def give_backward(
    grad: Float[Tensor, "t e"],
    own: Float[Tensor, "k e"] | None,
    gamma: Float[Tensor, " e"] | None,
    index: Int32[Tensor, " k"],
    scale: Float[Tensor, " k"],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "k e"], Float[Tensor, " _e_or_0"]]:
    """The gradients of `give`'s `own`, in `dtype`, and of `gamma`: of no elements where there is none."""
    grad, kept, width = grad.contiguous(), len(index), grad.shape[1]
    of_own, programs = grad.new_empty(kept, width, dtype=dtype), _programs(kept, grad.device)
    if gamma is None or own is None:
        given, partial = (of_own, of_own), grad.new_empty(programs, 0)
    else:
        given, partial = (own.contiguous(), gamma), grad.new_empty(programs, width, dtype=torch.float32)
    _give_backward_kernel[(programs,)](
        grad, *given, index, scale, of_own, partial, width, kept, HAS_GAMMA=gamma is not None, **_shape(width)
    )
    return of_own, partial.sum(0).to(grad.dtype if gamma is None else gamma.dtype)


def _shape(width: int) -> dict[str, Any]:
    """A power of two of columns, and 8 or 16 of them for every thread."""
    columns = triton.next_power_of_2(width)
    return {"WIDTH": columns, "num_warps": min(8, max(1, columns // 256))}


def _programs(tokens: int, device: torch.device) -> int:
    return max(1, min(tokens, _WAVES * _processors(device)))


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


# What each operator makes, in shapes: of `new_empty` and its like alone.
_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "take(Tensor x, Tensor index, Tensor weight, Tensor? bias, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)": (
        take,
        lambda x, index, weight, bias, eps, dtype: (
            x.new_empty(len(index), x.shape[1], dtype=dtype),
            x.new_empty(len(index), x.shape[1]),
            x.new_empty(2, len(index), dtype=torch.float32),
        ),
    ),
    "take_backward(Tensor of_own, Tensor of_row, Tensor rows, Tensor statistics, Tensor weight, Tensor place)"
    " -> (Tensor, Tensor, Tensor)": (
        take_backward,
        lambda of_own, of_row, rows, statistics, weight, place: (
            of_row.new_empty(of_row.shape),
            torch.empty_like(weight),
            torch.empty_like(weight),
        ),
    ),
    "give(Tensor x, Tensor own, Tensor? gamma, Tensor place, Tensor scale) -> Tensor": (
        give,
        lambda x, own, gamma, place, scale: x.new_empty(x.shape),
    ),
    "give_backward(Tensor grad, Tensor? own, Tensor? gamma, Tensor index, Tensor scale, ScalarType dtype)"
    " -> (Tensor, Tensor)": (
        give_backward,
        lambda grad, own, gamma, index, scale, dtype: (
            grad.new_empty(len(index), grad.shape[1], dtype=dtype),
            grad.new_empty(0) if gamma is None else torch.empty_like(gamma),
        ),
    ),
}
LIBRARY = torch.library.Library("lejepa_branch", "DEF")
for _schema, (_kernel, _shapes) in _OPERATORS.items():
    _name = LIBRARY.define(_schema)
    for _device in ("CUDA", "CPU"):  # the latter in the interpreter
        LIBRARY.impl(_name, _kernel, _device)
    LIBRARY.impl(_name, _shapes, "Meta")
