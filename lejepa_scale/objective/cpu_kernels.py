"""The two inner loops of `characteristic` as C++ (cpu_kernels.cpp). Refuses devices other than the CPU."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lejepa_scale.cpu.compiler import Kernels

KERNELS = Kernels(
    Path(__file__).with_suffix(".cpp"),
    {"sums": "**rlll", "gradient": "***rlll"},
    fallback="SIGReg runs without its C++ kernels (about 3 times slower)",
)


def sums(p: Float[Tensor, "r n"], dt: float, knots: int) -> Float[Tensor, "2 {knots}-1 r"]:
    """Cosine and sine sums of each row at angles k dt p, k = 1 .. knots-1."""
    p, out = p.contiguous(), p.new_empty(2, knots - 1, len(p))
    KERNELS.call("sums", p.dtype, p.data_ptr(), out.data_ptr(), dt, *p.shape, knots - 1)
    return out


def gradient(p: Float[Tensor, "r n"], weights: Float[Tensor, "2 k r"], dt: float) -> Float[Tensor, "r n"]:
    """sum_k (weights_1k cos - weights_0k sin)(k dt p)."""
    p, weights = p.contiguous(), weights.contiguous()
    out = torch.empty_like(p)
    KERNELS.call("gradient", p.dtype, p.data_ptr(), weights.data_ptr(), out.data_ptr(), dt, *p.shape, weights.shape[1])
    return out


def available() -> bool:
    """Whether the kernels can be built here; where not, says why, once."""
    return KERNELS.library(torch.float32) is not None and KERNELS.library(torch.float64) is not None
