"""Multi-crop geometry: which rectangle of the image each view is, cut and resized in uint8."""

from __future__ import annotations

import math

import cv2
import numpy as np

from lejepa_scale.config import ViewGroup

_RATIO = (3 / 4, 4 / 3)


def crop_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random resized crop: area uniform in `scale`, log-aspect uniform in [3/4, 4/3],
    ten attempts, then the centre. The distribution of torchvision's RandomResizedCrop."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    w = min(width, round(height * _RATIO[1]))
    h = min(height, round(width / _RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def cut_views(image: np.ndarray, group: ViewGroup, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3] -> [count, size, size, 3]."""
    out = np.empty((group.count, group.size, group.size, 3), np.uint8)
    for view in range(group.count):
        top, left, h, w = crop_box(image.shape[0], image.shape[1], group.scale, rng)
        out[view] = resize(image[top : top + h, left : left + w], group.size, group.size)
    return out


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area averaging where the image shrinks (no aliasing), bilinear where it grows."""
    shrinks = image.shape[0] > height or image.shape[1] > width
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def centre_square(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the short side to `size`, cut the middle: uint8 [size, size, 3], for evaluation."""
    h, w = image.shape[:2]
    ratio = size / min(h, w)
    image = resize(image, max(size, round(h * ratio)), max(size, round(w * ratio)))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]
