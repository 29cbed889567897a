"""The operations of photometric.py for a CPU: OpenCV's vectorized float kernels, one image at a time, so that it stays in
the core's cache. Values run from 0 to 255 until they are normalized."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float32, Real

Pixels = Float32[np.ndarray, "h w 3"]


def augment(
    image: Real[np.ndarray, "3 h w"], *, flip: bool, jitter: list[tuple[int, float]], grayscale: bool, sigma: float,
    solarize: bool, gray: tuple[float, ...], taps: int, scale: Float32[np.ndarray, "3 4"],
    out: Float32[np.ndarray, "3 h w"],
) -> None:  # fmt: skip
    """Into `out`.

    jitter: (0 brightness, 1 contrast, 2 saturation, 3 hue; its factor) in the order in which they act; hue's factor is in
    turns. gray: luma of red, green and blue. scale: the affine map of colours that comes last.
    """
    packed = cv2.merge(list(image))
    x = (cv2.flip(packed, 1) if flip else packed).astype(np.float32)
    for kind, factor in jitter:
        x = _JITTER[kind](x, factor, gray)
    if grayscale:
        x = cv2.transform(x, _rows(gray))
    if sigma > 0:
        x = cv2.GaussianBlur(x, (taps, taps), sigma, borderType=cv2.BORDER_REFLECT_101)
    if solarize:  # for whole numbers that is inversion from 128 on
        x = cv2.min(x, 255 - x)
    cv2.split(cv2.transform(x, scale), list(out))


def _brightness(x: Pixels, factor: float, _: tuple[float, ...]) -> Pixels:
    return _within(np.multiply(x, np.float32(factor), out=x), factor)


def _contrast(x: Pixels, factor: float, gray: tuple[float, ...]) -> Pixels:
    mean = np.dot(cv2.mean(x)[:3], gray)
    return _within(cv2.addWeighted(x, factor, x, 0, float(mean) * (1 - factor), dst=x), factor)


def _saturation(x: Pixels, factor: float, gray: tuple[float, ...]) -> Pixels:
    mixed = factor * np.eye(3, dtype=np.float32) + (1 - factor) * _rows(gray)
    return _within(cv2.transform(x, mixed), factor)


def _hue(x: Pixels, shift: float, _: tuple[float, ...]) -> Pixels:
    hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)  # hue in degrees
    hue = hsv[..., 0]
    np.add(hue, np.float32(360 * (shift % 1)), out=hue)  # OpenCV takes angles above 360, but none below 0
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=x)


def _within(x: Pixels, factor: float) -> Pixels:
    """Clamped to 0..255; a factor of at most 1 mixes values of that range."""
    if factor <= 1:
        return x
    cv2.threshold(x, 255, 255, cv2.THRESH_TRUNC, dst=x)
    return cv2.threshold(x, 0, 255, cv2.THRESH_TOZERO, dst=x)[1]


def _rows(gray: tuple[float, ...]) -> Float32[np.ndarray, "3 3"]:
    return np.tile(np.array(gray, np.float32), (3, 1))


_JITTER = (_brightness, _contrast, _saturation, _hue)
