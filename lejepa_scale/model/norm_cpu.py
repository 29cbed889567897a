"""Batch normalization's passes over memory as C++ (norm.cpp), for a CPU and channels that lie last: half of torch's time,
and sums kept in double. What is not so goes through torch."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lejepa_scale.cpu.compiler import Kernels

KERNELS = Kernels(
    Path(__file__).with_name("norm.cpp"),
    {"statistics": "**ll", "normalize": "*****ll", "gradient_sums": "****ll", "gradient": "*******ll"},
    fallback="batch normalization runs without its C++ kernels",
)


def usable(x: Float[Tensor, "b c *rest"]) -> bool:
    """Whether `x` is rows of channels in memory, and the kernels could be built."""
    if x.device.type != "cpu" or not x.numel() or torch.compiler.is_compiling():
        return False
    return _channels_last(x) and KERNELS.library(x.dtype) is not None


def statistics(x: Float[Tensor, "b c *rest"]) -> Float[Tensor, " 1+2*c"]:
    """The number of values per channel, their means, and the sums of their squared differences from them."""
    out = x.new_empty(1 + 2 * x.shape[1])
    _call("statistics", x, x, out)
    return out


def normalize(
    x: Float[Tensor, "b c *rest"], mean: Float[Tensor, " c"], scale: Float[Tensor, " c"], bias: Float[Tensor, " c"]
) -> Float[Tensor, "b c *rest"]:
    """(x - mean) scale + bias"""
    y = torch.empty_like(x)
    _call("normalize", x, x, mean, scale, bias.contiguous(), y)
    return y


def gradient_sums(
    grad: Float[Tensor, "b c *rest"], x: Float[Tensor, "b c *rest"], mean: Float[Tensor, " c"]
) -> Float[Tensor, "2 c"]:
    """Sums of grad (x - mean) and of grad."""
    out = x.new_empty(2, x.shape[1])
    _call("gradient_sums", x, _like(grad, x), x, mean, out)
    return out


def gradient(
    grad: Float[Tensor, "b c *rest"],
    x: Float[Tensor, "b c *rest"],
    mean: Float[Tensor, " c"],
    slope: Float[Tensor, " c"],
    scale: Float[Tensor, " c"],
    shift: Float[Tensor, " c"],
) -> Float[Tensor, "b c *rest"]:
    """(x - mean) slope + grad scale - shift"""
    dx = torch.empty_like(x)
    _call("gradient", x, _like(grad, x), x, mean, slope, scale, shift, dx)
    return dx


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous() if x.ndim == 2 else x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _like(grad: Float[Tensor, "b c *rest"], x: Float[Tensor, "b c *rest"]) -> Float[Tensor, "b c *rest"]:
    return grad.contiguous(memory_format=torch.contiguous_format if x.ndim == 2 else torch.channels_last)


def _call(name: str, x: Tensor, *tensors: Tensor) -> None:
    width = x.shape[1]
    KERNELS.call(name, x.dtype, *(tensor.data_ptr() for tensor in tensors), x.numel() // width, width)
