"""Multi-crop geometry: which rectangle of the image each view is, cut and resized in the image's own type. Boxes are a
function of uniform numbers, a row per view; the resizer is torch's antialiased bilinear one, which agrees with Pillow's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64, Real
from torch import Tensor

from lejepa_scale.config import ViewGroup
from lejepa_scale.data.images.decode import MinResolution

_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10
DRAWS = 2 * _ATTEMPTS + 2  # uniform numbers per view
_LONG = 8  # times the other side
_SPARE = 1.5  # a reduced image keeps this many pixels for each of a view's, along a side


def crop_boxes(
    height: int, width: int, scale: tuple[float, float], draws: Float[np.ndarray, "n draws"]
) -> Int64[np.ndarray, "n 4"]:
    """(top, left, height, width) of random resized crops, from DRAWS uniform numbers each: area uniform in `scale`,
    log-aspect uniform in [3/4, 4/3], ten attempts, then the centre. The distribution of torchvision's RandomResizedCrop."""
    return np.array([_crop_box(height, width, scale, row) for row in draws.tolist()], np.int64)


def _crop_box(height: int, width: int, scale: tuple[float, float], draws: list[float]) -> tuple[int, int, int, int]:
    """One box. In Python's own numbers: the first attempt nearly always fits, and arrays of a few elements are slower."""
    low, high = (math.log(r) for r in _RATIO)
    for attempt in range(_ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[attempt])
        ratio = math.exp(low + (high - low) * draws[_ATTEMPTS + attempt])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = draws[-2] * (height - h + 1), draws[-1] * (width - w + 1)
            return int(top), int(left), h, w
    h, w = min(height, round(width / _RATIO[0])), min(width, round(height * _RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def cut_views(
    image: Real[np.ndarray, "h w c"],
    group: ViewGroup,
    draws: Float[np.ndarray, "{group.count} draws"],
) -> Real[Tensor, "{group.count} c {group.size} {group.size}"]:
    """Crops of an image, of its type, each from DRAWS uniform numbers."""
    kind = torch.uint8 if image.dtype == np.uint8 else torch.float32
    out = torch.empty(group.count, image.shape[2], group.size, group.size, dtype=kind)
    boxes = crop_boxes(image.shape[0], image.shape[1], group.scale, draws).tolist()
    for view, (top, left, h, w) in zip(out, boxes, strict=True):
        view.copy_(_resized(image[top : top + h, left : left + w], group.size, group.size))
    return out


def min_resolution(groups: Sequence[ViewGroup]) -> MinResolution:
    """The resolution from which on no crop that can be drawn loses detail: even the smallest is shrunk by _SPARE."""
    groups = [group for group in groups if group.count]
    return MinResolution(
        pixels=max((_SPARE * g.size) ** 2 / (_RATIO[0] * g.scale[0]) for g in groups),
        side=max(_SPARE * g.size for g in groups),
    )


def centre_square(image: Real[np.ndarray, "h w c"], size: int) -> Real[np.ndarray, "{size} {size} c"]:
    """Resize the short side to `size`, cut the middle, for evaluation. Of a very long image only the middle is resized."""
    h, w = image.shape[:2]
    if max(h, w) > _LONG * min(h, w):
        kept = _LONG * min(h, w)
        top, left = max(0, h - kept) // 2, max(0, w - kept) // 2
        image = image[top : top + kept, left : left + kept]
        h, w = image.shape[:2]
    ratio = size / min(h, w)
    h, w = max(size, round(h * ratio)), max(size, round(w * ratio))
    top, left = (h - size) // 2, (w - size) // 2
    return _resized(image, h, w)[:, top : top + size, left : left + size].permute(1, 2, 0).numpy()


def _resized(image: Real[np.ndarray, "h w c"], height: int, width: int) -> Real[Tensor, "c {height} {width}"]:
    planes = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)
    return torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True).squeeze(0)
