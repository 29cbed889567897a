"""Colour operations, drawn per view in the worker and applied in batches on the training device: flip, jitter,
grayscale, blur, solarize, normalization. The distributions of torchvision's transforms. A CPU takes image by image, with the
operations of photometric_cpu.py; a GPU takes a batch as a whole, with the kernels of photometric_triton.py, or with the
operations below: without Triton, and for other than three channels.

Values run from 0 to 255 until they are normalized; every operation here works in place on [n, c, h, w]. Saturation, hue and
grayscale are for c = 3, red, green and blue; the gray of other counts is the mean of their channels.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int, Real, Shaped
from torch import Tensor

from lejepa_scale.config import Augment
from lejepa_scale.data.images import photometric_cpu
from lejepa_scale.data.images.pixels import RGB, Pixels

_GRAY = (0.299, 0.587, 0.114)  # ITU-R 601 luma
_ORDERS = np.array(list(permutations(range(4))))  # orders of brightness, contrast, saturation, hue
_NOTHING = np.array((1, 1, 1, 0), np.float32)  # the factors of these that change nothing
_RADIUS = 3  # of the blur: 7 taps
FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAYSCALE, SIGMA, SOLARIZE, WIDTH = range(10)
DRAWS = 11  # uniform numbers per view


def draw(draws: Float[np.ndarray, "n draws"], augment: Augment) -> Float32[np.ndarray, "n width"]:
    """WIDTH parameters of each view from DRAWS uniform numbers. ORDER is -1 where there is no jitter,
    SIGMA 0 without blur."""
    u = draws.T
    out = np.zeros((len(draws), WIDTH), np.float32)
    out[:, FLIP] = u[0] < augment.flip
    for column, strength, value in (
        (BRIGHTNESS, augment.brightness, u[1]),
        (CONTRAST, augment.contrast, u[2]),
        (SATURATION, augment.saturation, u[3]),
    ):
        low = max(0.0, 1 - strength)
        out[:, column] = low + (1 + strength - low) * value
    out[:, HUE] = augment.hue * (2 * u[4] - 1)
    out[:, ORDER] = np.where(u[5] < augment.jitter, np.floor(u[10] * len(_ORDERS)), -1)
    out[:, GRAYSCALE] = u[6] < augment.grayscale
    out[:, SIGMA] = np.where(u[7] < augment.blur, 0.1 + 1.9 * u[8], 0.0)
    out[:, SOLARIZE] = u[9] < augment.solarize
    return out


def apply(
    images: Real[Tensor, "b c h w"], parameters: Float[Tensor, "b p"], pixels: Pixels = RGB
) -> Float[Tensor, "b c h w"]:
    """Augment and normalize values 0..255. `parameters` stay on the CPU: which images each operation touches is decided
    there, so a CUDA device is never waited for."""
    if images.device.type == "cpu" and images.shape[1] == 3:
        return _one_by_one(images, parameters.numpy(), pixels)
    if images.device.type == "cuda" and images.shape[1] == 3 and _has_triton():
        from lejepa_scale.data.images import photometric_triton

        return photometric_triton.fused(images, parameters.numpy(), pixels)
    return _together(images, parameters.numpy(), pixels)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def normalize(images: Real[Tensor, "b c h w"], pixels: Pixels = RGB) -> Float[Tensor, "b c h w"]:
    """What the encoder expects, without augmentation."""
    x = images.to(torch.float32, copy=True)
    _standardize(x, pixels)
    return x


def _one_by_one(
    images: Real[Tensor, "b 3 h w"], parameters: Float32[np.ndarray, "b p"], pixels: Pixels = RGB
) -> Float32[Tensor, "b 3 h w"]:
    out = torch.empty(images.shape, dtype=torch.float32)
    factors, shifts = zip(*_affine(pixels), strict=True)
    scale = np.concatenate([np.diag(factors), np.array(shifts)[:, None]], 1, dtype=np.float32)
    for image, target, row in zip(images.numpy(), out.numpy(), parameters.tolist(), strict=True):
        order = _ORDERS[int(row[ORDER])].tolist() if row[ORDER] >= 0 else []
        photometric_cpu.augment(
            image,
            flip=row[FLIP] > 0,
            jitter=[(kind, row[BRIGHTNESS + kind]) for kind in order if row[BRIGHTNESS + kind] != _NOTHING[kind]],
            grayscale=row[GRAYSCALE] > 0,
            sigma=row[SIGMA],
            solarize=row[SOLARIZE] > 0,
            gray=_GRAY,
            taps=2 * _RADIUS + 1,
            scale=scale,
            out=target,
        )
    return out


def _together(
    images: Real[Tensor, "b c h w"], parameters: Float32[np.ndarray, "b p"], pixels: Pixels = RGB
) -> Float32[Tensor, "b c h w"]:
    x = images.to(torch.float32, copy=True)
    masks = _masks(parameters)
    active = [step for step in range(len(_STEPS)) if masks[:, step].any()]
    chosen = [np.flatnonzero(masks[:, step]) for step in active]
    values = [parameters[c, _STEPS[step][1]] for c, step in zip(chosen, active, strict=True)]
    if active:  # all numbers go to the device in two copies
        sizes = [len(c) for c in chosen]
        numbers = _sent(np.concatenate(chosen), x.device).split(sizes)
        factors = _sent(np.concatenate(values), x.device).view(-1, 1, 1, 1).split(sizes)
    for i, step in enumerate(active):
        some = x.index_select(0, numbers[i])
        _STEPS[step][0](some, factors[i])
        x.index_copy_(0, numbers[i], some)
    _standardize(x, pixels)
    return x


def _sent(numbers: Shaped[np.ndarray, " n"], device: torch.device) -> Shaped[Tensor, " n"]:
    """On the device, without a wait: a copy from other than page-locked memory would be one."""
    here = torch.from_numpy(numbers)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


def _masks(rows: Float32[np.ndarray, "n p"]) -> Bool[np.ndarray, "n steps"]:
    """Which of _STEPS each image goes through."""
    jitter = (_slots(rows)[:, :, None] == np.arange(4)).reshape(len(rows), 16)
    others = rows[:, [FLIP, GRAYSCALE, SIGMA, SOLARIZE]] > 0
    return np.concatenate([others[:, :1], jitter, others[:, 1:]], 1)


def _slots(rows: Float32[np.ndarray, "n p"]) -> Int[np.ndarray, "n 4"]:
    """What jitter does to each image first, second, third and last: 0 brightness, 1 contrast, 2 saturation, 3 hue, -1
    nothing."""
    orders = _ORDERS[np.maximum(rows[:, ORDER], 0).astype(int)]
    changes = rows[:, BRIGHTNESS : HUE + 1] != _NOTHING
    acts = (rows[:, ORDER, None] >= 0) & np.take_along_axis(changes, orders, 1)
    return np.where(acts, orders, -1)


def _affine(pixels: Pixels) -> list[tuple[float, float]]:
    """(factor, addend) of each channel, from 0..255 to mean 0 and standard deviation 1."""
    return [(1 / (255 * std), -mean / std) for mean, std in zip(pixels.mean, pixels.std, strict=True)]


def _standardize(x: Float[Tensor, "n c h w"], pixels: Pixels) -> None:
    for channel, (factor, addend) in zip(x.unbind(1), _affine(pixels), strict=True):
        channel.mul_(factor).add_(addend)


def _luma(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 1 h w"]:
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    r, g, b = x.unbind(1)
    return (_GRAY[0] * r).add_(g, alpha=_GRAY[1]).add_(b, alpha=_GRAY[2]).unsqueeze(1)


def _flip(x: Float[Tensor, "n c h w"], _: Float[Tensor, "n 1 1 1"]) -> None:
    x.copy_(x.flip(-1))


def _brightness(x: Float[Tensor, "n c h w"], factor: Float[Tensor, "n 1 1 1"]) -> None:
    x.mul_(factor).clamp_(0, 255)


def _contrast(x: Float[Tensor, "n c h w"], factor: Float[Tensor, "n 1 1 1"]) -> None:
    mean = _luma(x.mean((2, 3), keepdim=True))
    x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 255)


def _saturation(x: Float[Tensor, "n 3 h w"], factor: Float[Tensor, "n 1 1 1"]) -> None:
    gray = _luma(x)
    x.mul_(factor).add_(gray.mul_(1 - factor)).clamp_(0, 255)


def _hue(x: Float[Tensor, "n 3 h w"], shift: Float[Tensor, "n 1 1 1"]) -> None:
    """Rotate hue by `shift` turns (within half of one), keeping value v and chroma c = v - m, m the least channel.

    In sixths of a turn, a pixel's angle from red is 1 + (g + b - r - m) / c, towards green where g > b. A channel whose
    own angle is d away is v - c clamp(2 - ||d| - 3|, 0, 1), for any |d| up to 7.
    """
    r, g, b = x.unbind(1)
    value, low = torch.maximum(r, g).maximum(b), torch.minimum(r, g).minimum(b)
    chroma = value - low
    angle = (g + b).sub_(r).sub_(low).div_(chroma.clamp_min(1e-6)).add_(1).copysign_(g - b)  # -3..3
    turn = 6 * shift.squeeze(1)
    lap = 6.0 * (turn < 0)
    distance = torch.empty_like(x)
    for channel, offset in enumerate((turn, turn + (lap - 2), turn + (lap - 4))):
        torch.add(angle, offset, out=distance[:, channel])
    distance.abs_().sub_(3).abs_().clamp_(1, 2)
    base = value.sub_(chroma, alpha=2)
    for channel in range(3):
        torch.addcmul(base, chroma, distance[:, channel], out=x[:, channel])


def _grayscale(x: Float[Tensor, "n 3 h w"], _: Float[Tensor, "n 1 1 1"]) -> None:
    x.copy_(_luma(x).expand_as(x))


def _solarize(x: Float[Tensor, "n c h w"], _: Float[Tensor, "n 1 1 1"]) -> None:
    """Invert from 128 on. For whole numbers that is the smaller of x and 255 - x, which has no jump at the threshold."""
    torch.minimum(x, 255 - x, out=x)


def _blur(x: Float[Tensor, "n c h w"], sigma: Float[Tensor, "n 1 1 1"]) -> None:
    """Separable Gaussian of 7 taps with a standard deviation per image, reflected at the border."""
    radius = min(_RADIUS, x.shape[-1] - 1, x.shape[-2] - 1)
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)  # [n, 1, 1, taps]
    weights = weights / weights.sum(-1, keepdim=True)
    for dim in (-1, -2):
        padded = F.pad(x, (radius, radius, 0, 0) if dim == -1 else (0, 0, radius, radius), mode="reflect")
        size = x.shape[dim]
        x.zero_()
        for tap in range(2 * radius + 1):
            x.addcmul_(padded.narrow(dim, tap, size), weights[..., tap : tap + 1])


# In the order in which they act; the column is that of each operation's number.
_STEPS = (
    (_flip, FLIP),
    *((_brightness, BRIGHTNESS), (_contrast, CONTRAST), (_saturation, SATURATION), (_hue, HUE)) * 4,
    (_grayscale, GRAYSCALE),
    (_blur, SIGMA),
    (_solarize, SOLARIZE),
)
