"""The two inner loops of `characteristic` as C++, built by the machine's own compiler in a second or two and kept in the
user's cache. Refuses devices other than the CPU."""

from __future__ import annotations

import ctypes
import subprocess
import warnings
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lejepa_scale.compiler import build

_SOURCE = Path(__file__).with_name("native.cpp")
_REALS = {torch.float32: "float", torch.float64: "double"}


def sums(p: Float[Tensor, "r n"], dt: float, knots: int) -> Float[Tensor, "2 k r"]:
    """Cosine and sine sums of each row at angles k dt p, k = 1 .. knots-1."""
    p, out = p.contiguous(), p.new_empty(2, knots - 1, len(p))
    _library(p.dtype).sums(p.data_ptr(), out.data_ptr(), dt, *p.shape, knots - 1, torch.get_num_threads())
    return out


def gradient(p: Float[Tensor, "r n"], weights: Float[Tensor, "2 k r"], dt: float) -> Float[Tensor, "r n"]:
    """sum_k (weights_1k cos - weights_0k sin)(k dt p)."""
    p, weights = p.contiguous(), weights.contiguous()
    out = torch.empty_like(p)
    pointers = p.data_ptr(), weights.data_ptr(), out.data_ptr()
    _library(p.dtype).gradient(*pointers, dt, *p.shape, weights.shape[1], torch.get_num_threads())
    return out


@cache
def available() -> bool:
    """Whether the kernels can be built here; where not, says why, once."""
    try:
        for dtype in _REALS:
            _library(dtype)
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(f"SIGReg runs without its C++ kernels (about 3 times slower): {error}", stacklevel=2)
        return False
    return True


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build(_SOURCE, _REALS[dtype])))
    real = ctypes.c_float if dtype == torch.float32 else ctypes.c_double
    integers = [ctypes.c_long] * 3 + [ctypes.c_int]
    library.sums.argtypes = [ctypes.c_void_p] * 2 + [real, *integers]
    library.gradient.argtypes = [ctypes.c_void_p] * 3 + [real, *integers]
    library.sums.restype = library.gradient.restype = None
    return library
