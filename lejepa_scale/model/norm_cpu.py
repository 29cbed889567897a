"""Batch normalisation's passes over memory as C++ (norm.cpp), for a CPU and channels that lie last: half of torch's time,
and sums kept in double. What is not so goes through torch."""

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

_SOURCE = Path(__file__).with_name("norm.cpp")
_REALS = {torch.float32: "float", torch.float64: "double"}
_TENSORS = {"moments": 2, "normalise": 5, "gradient_sums": 4, "gradient": 7}


def usable(x: Tensor) -> bool:
    """Whether `x` is rows of channels in memory, and the kernels could be built."""
    if x.device.type != "cpu" or x.dtype not in _REALS or not x.numel() or torch.compiler.is_compiling():
        return False
    return _channels_last(x) and _library(x.dtype) is not None


def moments(x: Float[Tensor, "b c *rest"]) -> Float[Tensor, " 1+2*c"]:
    """The number of values per channel, their means, and the sums of their squared differences from them."""
    out = x.new_empty(1 + 2 * x.shape[1])
    _call("moments", x, x, out)
    return out


def normalise(x: Float[Tensor, "b c *rest"], mean: Tensor, scale: Tensor, bias: Tensor) -> Float[Tensor, "b c *rest"]:
    """(x - mean) scale + bias"""
    y = torch.empty_like(x)
    _call("normalise", x, x, mean, scale, bias.contiguous(), y)
    return y


def gradient_sums(
    grad: Float[Tensor, "b c *rest"], x: Float[Tensor, "b c *rest"], mean: Tensor
) -> Float[Tensor, "2 c"]:
    """Sums of grad (x - mean) and of grad."""
    out = x.new_empty(2, x.shape[1])
    _call("gradient_sums", x, _like(grad, x), x, mean, out)
    return out


def gradient(
    grad: Float[Tensor, "b c *rest"],
    x: Float[Tensor, "b c *rest"],
    mean: Tensor,
    slope: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> Float[Tensor, "b c *rest"]:
    """(x - mean) slope + grad scale - shift"""
    dx = torch.empty_like(x)
    _call("gradient", x, _like(grad, x), x, mean, slope, scale, shift, dx)
    return dx


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous() if x.ndim == 2 else x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _like(grad: Tensor, x: Tensor) -> Tensor:
    return grad.contiguous(memory_format=torch.contiguous_format if x.ndim == 2 else torch.channels_last)


def _call(name: str, x: Tensor, *tensors: Tensor) -> None:
    width = x.shape[1]
    pointers = [tensor.data_ptr() for tensor in tensors]
    getattr(_library(x.dtype), name)(*pointers, x.numel() // width, width, torch.get_num_threads())


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """None, and a warning, where the machine has no compiler."""
    try:
        library = ctypes.CDLL(str(build(_SOURCE, _REALS[dtype])))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(f"batch normalisation runs without its C++ kernels: {error}", stacklevel=2)
        return None
    for name, tensors in _TENSORS.items():
        function = getattr(library, name)
        function.argtypes = [ctypes.c_void_p] * tensors + [ctypes.c_long] * 2 + [ctypes.c_int]
        function.restype = None
    return library
