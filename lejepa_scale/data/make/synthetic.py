"""Rendered scenes whose class is the silhouette of one object; colour, texture, place, size, angle and background vary
freely, so that raw pixels say little about the class. A pure function of (seed, index)."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt

_OVERSAMPLE = 2
Rng = np.random.Generator
Outline = Float[np.ndarray, "corners 2"]


def _regular(corners: int, phase: float = 0.0) -> Outline:
    angle = np.arange(corners) * 2 * math.pi / corners + phase
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def _star(points: int, inner: float) -> Outline:
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return _regular(2 * points, -math.pi / 2) * radius[:, None]


def _heart() -> Outline:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], 1) / 17


def _crescent() -> Outline:
    outer = np.linspace(math.radians(40), math.radians(320), 32)
    inner = outer[::-1]
    return np.concatenate(
        [np.stack([np.cos(outer), np.sin(outer)], 1), np.stack([0.45 + 0.72 * np.cos(inner), 0.72 * np.sin(inner)], 1)]
    )


def _cross(arm: float = 0.33) -> Outline:
    a = arm
    return np.array(
        [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    )


def _arrow() -> Outline:
    return np.array([(0, -1), (0.85, 0), (0.3, 0), (0.3, 1), (-0.3, 1), (-0.3, 0), (-0.85, 0)])


def _hourglass() -> Outline:
    return np.array([(-0.8, -1), (0.8, -1), (0.12, 0), (0.8, 1), (-0.8, 1), (-0.12, 0)])


# Each outline lies in the unit disc or just beyond; a second outline is a hole.
_OUTLINES: dict[str, tuple[Outline, ...]] = {
    "disc": (_regular(48),),
    "square": (_regular(4, math.pi / 4) * 1.15,),
    "triangle": (_regular(3, -math.pi / 2) * 1.15,),
    "star": (_star(5, 0.42) * 1.1,),
    "cross": (_cross(),),
    "ring": (_regular(48), _regular(48) * 0.55),
    "crescent": (_crescent(),),
    "heart": (_heart(),),
    "arrow": (_arrow(),),
    "hourglass": (_hourglass(),),
}
CLASSES: tuple[str, ...] = tuple(_OUTLINES)


def render(
    index: int, size: int, seed: int, channels: int = 3, bits: int = 8
) -> tuple[UInt[np.ndarray, "{size} {size} {channels}"], int]:
    """Scene `index`: (image, class), RGB or any number of channels, whose values fill `bits` bits. Classes take turns."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, index))))
    label = index % len(CLASSES)
    object_colour, ground_colour = _contrasting(rng, channels)
    scene = _textured(size, ground_colour, rng)
    paint = _textured(size, object_colour, rng)
    mask = _mask(CLASSES[label], size, rng)
    image = scene + mask[:, :, None] * (paint - scene)
    image += rng.normal(0, rng.uniform(0, 8), image.shape)
    if bits == 8:
        return image.clip(0, 255).astype(np.uint8), label
    return np.rint(image.clip(0, 255) * ((2**bits - 1) / 255)).astype(np.uint16), label


def _contrasting(rng: Rng, channels: int) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """Two colours whose brightness differs enough for the outline to be seen; either may be the lighter."""
    while True:
        a, b = rng.uniform(0, 255, channels), rng.uniform(0, 255, channels)
        if abs(a.mean() - b.mean()) > 45:
            return a, b


def _mask(name: str, size: int, rng: Rng) -> Float32[np.ndarray, "{size} {size}"]:
    """Anti-aliased silhouette, in 0..1."""
    fine = size * _OVERSAMPLE
    radius = fine * rng.uniform(0.22, 0.36)
    angle = math.radians(rng.uniform(-25, 25))
    squeeze = rng.uniform(0.85, 1.0)
    slack = fine / 2 - radius * 0.95
    centre = fine / 2 + rng.uniform(-1, 1, 2) * slack
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    mask = np.zeros((fine, fine), np.uint8)
    for i, outline in enumerate(_OUTLINES[name]):
        corners = (outline * (squeeze, 1.0)) @ turn.T * radius + centre
        cv2.fillPoly(mask, [np.round(corners * 16).astype(np.int32)], 0 if i else 255, shift=4)
    return cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _textured(size: int, colour: Float[np.ndarray, " c"], rng: Rng) -> Float32[np.ndarray, "{size} {size} c"]:
    """Colours around `colour`; their mean stays near it, so that contrast survives."""
    pattern = _PATTERNS[rng.integers(len(_PATTERNS))](size, rng)  # [size, size] in -1..1
    tint = rng.uniform(-1, 1, len(colour)) * rng.uniform(10, 40)
    return (colour + pattern[:, :, None] * tint).astype(np.float32)


def _waves(size: int, rng: Rng) -> tuple[Float[np.ndarray, "{size} {size}"], Float[np.ndarray, "{size} {size}"]]:
    """Coordinates along and across a random direction, in periods of a random length."""
    angle, periods = rng.uniform(0, math.pi), rng.uniform(3, 8)
    y, x = np.mgrid[0:size, 0:size] * (periods / size)
    return x * math.cos(angle) + y * math.sin(angle) + rng.random(), y * math.cos(angle) - x * math.sin(angle)


def _plain(size: int, rng: Rng) -> Float[np.ndarray, "{size} {size}"]:
    return np.zeros((size, size))


def _gradient(size: int, rng: Rng) -> Float[np.ndarray, "{size} {size}"]:
    along, _ = _waves(size, rng)
    span = along - along.min()
    return 2 * span / max(float(span.max()), 1e-6) - 1


def _stripes(size: int, rng: Rng) -> Float[np.ndarray, "{size} {size}"]:
    along, _ = _waves(size, rng)
    return np.sin(2 * math.pi * along)


def _checks(size: int, rng: Rng) -> Float[np.ndarray, "{size} {size}"]:
    along, across = _waves(size, rng)
    return np.where((np.floor(along) + np.floor(across)) % 2 == 0, 1.0, -1.0)


def _dots(size: int, rng: Rng) -> Float[np.ndarray, "{size} {size}"]:
    along, across = _waves(size, rng)
    return np.where((along % 1 - 0.5) ** 2 + (across % 1 - 0.5) ** 2 < 0.09, 1.0, -1.0)


def _blobs(size: int, rng: Rng) -> Float[np.ndarray, "{size} {size}"]:
    cells = int(rng.integers(3, 8))
    return cv2.resize(rng.uniform(-1, 1, (cells, cells)), (size, size), interpolation=cv2.INTER_CUBIC)


_PATTERNS: tuple[Callable[[int, Rng], np.ndarray], ...] = (_plain, _gradient, _stripes, _checks, _dots, _blobs)
