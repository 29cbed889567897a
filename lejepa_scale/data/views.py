"""Multi-crop geometry: which rectangle of the image each view is, cut and resized in uint8. Boxes are a function of
uniform numbers, a row per view; the resizer is torch's antialiased bilinear one for uint8, which agrees with Pillow's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lejepa_scale.config import ViewGroup
from lejepa_scale.data.decode import Enough

_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10
DRAWS = 2 * _ATTEMPTS + 2  # uniform numbers per view
_SPARE = 1.5  # a reduced image keeps this many pixels for each of a view's, along a side


def crop_boxes(height: int, width: int, scale: tuple[float, float], draws: np.ndarray) -> np.ndarray:
    """(top, left, height, width) of random resized crops, int64 [n, 4], from uniform `draws` [n, DRAWS]: area uniform in
    `scale`, log-aspect uniform in [3/4, 4/3], ten attempts, then the centre. The distribution of torchvision's
    RandomResizedCrop."""
    n = len(draws)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, :_ATTEMPTS])
    low, high = (math.log(r) for r in _RATIO)
    ratio = np.exp(low + (high - low) * draws[:, _ATTEMPTS : 2 * _ATTEMPTS])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    chosen = np.arange(n), fits.argmax(1)  # the first that fits
    central = (min(height, round(width / _RATIO[0])), min(width, round(height * _RATIO[1])))
    size = np.where(fits[chosen][:, None], np.stack([h[chosen], w[chosen]], 1), central)
    room = (height, width) - size
    corner = np.where(fits[chosen][:, None], np.floor(draws[:, -2:] * (room + 1)), room // 2)
    return np.concatenate([corner, size], 1).astype(np.int64)


def cut_views(image: np.ndarray, group: ViewGroup, draws: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] and uniform [count, DRAWS] -> uint8 [count, 3, size, size]."""
    out = torch.empty(group.count, 3, group.size, group.size, dtype=torch.uint8)
    boxes = crop_boxes(image.shape[0], image.shape[1], group.scale, draws).tolist()
    for view, (top, left, h, w) in zip(out, boxes, strict=True):
        view.copy_(_resized(image[top : top + h, left : left + w], group.size, group.size))
    return out


def enough(groups: Sequence[ViewGroup]) -> Enough:
    """The resolution from which on no crop that can be drawn loses detail: even the smallest is shrunk by _SPARE."""
    groups = [group for group in groups if group.count]
    return Enough(
        pixels=max((_SPARE * g.size) ** 2 / (_RATIO[0] * g.scale[0]) for g in groups),
        side=max(_SPARE * g.size for g in groups),
    )


def centre_square(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the short side to `size`, cut the middle: uint8 [size, size, 3], for evaluation."""
    h, w = image.shape[:2]
    ratio = size / min(h, w)
    h, w = max(size, round(h * ratio)), max(size, round(w * ratio))
    top, left = (h - size) // 2, (w - size) // 2
    return _resized(image, h, w)[:, top : top + size, left : left + size].permute(1, 2, 0).numpy()


def _resized(image: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 [H, W, 3] -> [3, height, width]."""
    planes = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)
    return torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True).squeeze(0)
