"""Shards whose samples have a mask: colours of squares are the classes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from tars import shard

COLOURS = np.array([[220, 30, 30], [30, 200, 40], [40, 60, 220]], np.uint8)
NAMES = (b"red", b"green", b"blue")
SQUARE = 8  # pixels


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def squares(number: int, side: int = 32, ignored: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """An image of coloured squares with some noise, and its mask; with `ignored`, one square is of no class."""
    draw = np.random.default_rng(number)
    ids = draw.integers(0, len(COLOURS), (side // SQUARE, side // SQUARE)).astype(np.uint8)
    ids = np.kron(ids, np.ones((SQUARE, SQUARE), np.uint8))
    image = np.clip(COLOURS[ids] + draw.normal(0, 8, (side, side, 3)), 0, 255).astype(np.uint8)
    mask = ids.copy()
    if ignored:
        mask[:SQUARE, :SQUARE] = 255
    return image, mask


def masked(path: Path, count: int, first: int = 0, side: int = 32, labelled: bool = False) -> str:
    """A shard of such images; a label is the class of the last square."""
    members = {}
    for number in range(first, first + count):
        image, mask = squares(number, side)
        members |= {f"{number:04d}.png": png(image), f"{number:04d}.mask.png": png(mask)}
        if labelled:
            members[f"{number:04d}.cls"] = NAMES[mask[-1, -1]]
    return shard(path, members)
