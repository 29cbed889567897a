"""Colour operations, drawn per view in the worker and applied in batches on the training device: flip, jitter,
grayscale, blur, solarize, normalisation. The distributions of torchvision's transforms."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from lejepa_scale.config import Augment

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as timm's models expect
_GRAY = (0.299, 0.587, 0.114)  # ITU-R 601 luma
_ORDERS = np.array(list(permutations(range(4))))  # orders of brightness, contrast, saturation, hue
_KERNEL = 7  # taps of the blur
FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAYSCALE, SIGMA, SOLARIZE, WIDTH = range(10)


def draw(count: int, augment: Augment, rng: np.random.Generator) -> np.ndarray:
    """Parameters of `count` views, float32 [count, WIDTH]. ORDER is -1 where there is no jitter, SIGMA 0 without blur."""
    u = rng.random((count, 10))
    out = np.zeros((count, WIDTH), np.float32)
    out[:, FLIP] = u[:, 0] < augment.flip
    for column, strength, draws in (
        (BRIGHTNESS, augment.brightness, u[:, 1]),
        (CONTRAST, augment.contrast, u[:, 2]),
        (SATURATION, augment.saturation, u[:, 3]),
    ):
        low = max(0.0, 1 - strength)
        out[:, column] = low + (1 + strength - low) * draws
    out[:, HUE] = augment.hue * (2 * u[:, 4] - 1)
    jittered = u[:, 5] < augment.jitter
    out[:, ORDER] = np.where(jittered, rng.integers(0, len(_ORDERS), count), -1)
    out[:, GRAYSCALE] = u[:, 6] < augment.grayscale
    out[:, SIGMA] = np.where(u[:, 7] < augment.blur, 0.1 + 1.9 * u[:, 8], 0.0)
    out[:, SOLARIZE] = u[:, 9] < augment.solarize
    return out


def apply(images: UInt8[Tensor, "b 3 h w"], parameters: Float[Tensor, "b p"]) -> Float[Tensor, "b 3 h w"]:
    """Augment and normalise. `parameters` stay on the CPU: which images each operation touches is decided there, so a
    CUDA device is never waited for."""
    x = images.float() / 255
    for chosen, _ in _subset(parameters, parameters[:, FLIP] > 0, x.device):
        x[chosen] = x[chosen].flip(-1)
    orders = torch.from_numpy(_ORDERS)[parameters[:, ORDER].long().clamp_min(0)]
    jittered = parameters[:, ORDER] >= 0
    operations = (_brightness, _contrast, _saturation, _hue)
    for slot in range(4):
        for number, (operation, column) in enumerate(zip(operations, range(BRIGHTNESS, HUE + 1), strict=True)):
            for chosen, rows in _subset(parameters, jittered & (orders[:, slot] == number), x.device):
                x[chosen] = operation(x[chosen], rows[:, column].view(-1, 1, 1, 1))
    for chosen, _ in _subset(parameters, parameters[:, GRAYSCALE] > 0, x.device):
        x[chosen] = _luma(x[chosen]).expand(-1, 3, -1, -1)
    for chosen, rows in _subset(parameters, parameters[:, SIGMA] > 0, x.device):
        x[chosen] = _blur(x[chosen], rows[:, SIGMA])
    for chosen, _ in _subset(parameters, parameters[:, SOLARIZE] > 0, x.device):
        x[chosen] = torch.where(x[chosen] >= 128 / 255, 1 - x[chosen], x[chosen])
    return _standardise(x)


def normalise(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """What the encoder expects, without augmentation."""
    return _standardise(images.float() / 255)


def _subset(parameters: Tensor, mask: Tensor, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The chosen images' numbers and parameters, on `device`; nothing where none is chosen."""
    chosen = mask.nonzero().squeeze(1)
    if not len(chosen):
        return []
    return [(chosen.to(device, non_blocking=True), parameters[chosen].to(device, non_blocking=True))]


def _standardise(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


def _luma(x: Tensor) -> Tensor:
    r, g, b = x.unbind(1)
    return (_GRAY[0] * r + _GRAY[1] * g + _GRAY[2] * b).unsqueeze(1)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(x).mean((1, 2, 3), keepdim=True)
    return (mean + factor * (x - mean)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    gray = _luma(x)
    return (gray + factor * (x - gray)).clamp_(0, 1)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate hue by `shift` turns, keeping value and chroma: channel_n = v - c clamp(min(k, 4 - k), 0, 1) with
    k = (n + 6 h) mod 6 for n = 5, 3, 1 (red, green, blue)."""
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    safe = chroma.clamp_min(1e-12)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = hue + 6 * shift.squeeze(1)
    channels = []
    for n in (5, 3, 1):
        k = (hue + n).remainder(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian with a standard deviation per image, reflected at the border."""
    radius = min(_KERNEL // 2, x.shape[-1] - 1)
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).view(len(x), -1, 1, 1, 1)  # [B, taps, 1, 1, 1]
    for dim in (-1, -2):
        padded = F.pad(x, (radius, radius, 0, 0) if dim == -1 else (0, 0, radius, radius), mode="reflect")
        size = x.shape[dim]
        x = torch.zeros_like(x)
        for tap in range(2 * radius + 1):
            x.addcmul_(padded.narrow(dim, tap, size), weights[:, tap])
    return x
