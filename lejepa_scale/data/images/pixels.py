"""What the values of an image mean: how many channels it has, which interval of values is black to white, and what the
encoder expects of them. Every image is brought to 0..255, in which crops and colours work, whatever it was stored as."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32, Float64, Shaped, UInt8

from lejepa_scale.config import Data
from lejepa_scale.data.faults import SampleFault
from lejepa_scale.errors import UserError

MEAN: tuple[float, ...] = Data.model_fields["mean"].default  # ImageNet's, as timm's models expect
STD: tuple[float, ...] = Data.model_fields["std"].default
Ranges = tuple[tuple[float, float], ...]
_WITHIN = 0.01  # of an image's values lie in the range that was declared, at least
_REMEDY = "as in data.shards=[{shards: PATH, range: [LOW, HIGH]}]; `lejepa shards statistics` shows what the values are"


class DecodeError(SampleFault):
    """The bytes are not an image that can be read, or one that should not be."""


@dataclass(frozen=True)
class Pixels:
    """Of one source. range: the stored values (low, high) that become 0 and 255, for all channels or a pair for each; None:
    8-bit images, as they are. mean, std: of each channel, as a share of the range, by which the encoder's input is
    standardized; those of ImageNet are for 3 channels. Raises UserError for ranges that are not one or `channels` pairs
    with low < high."""

    channels: int = 3
    range: Ranges | None = None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    upright: bool = True  # turned as the file's orientation says

    def __post_init__(self) -> None:
        if self.range is None:
            return
        if len(self.range) not in (1, self.channels):
            raise UserError(
                f"a range of {len(self.range)} intervals, {_pairs(self)}: one is for all channels, or {self.channels} for "
                "each."
            )
        for low, high in self.range:
            if not -math.inf < low < high < math.inf:
                raise UserError(f"a range must satisfy low < high, got [{low:g}, {high:g}].")

    @property
    def bounds(self) -> Float64[np.ndarray, "2 _c"]:
        """Lows and highs, of all channels or of each. Only where there is a range."""
        return np.array(self.range, np.float64).T


RGB = Pixels()


def of_sources(data: Data) -> list[Pixels]:
    """Of each source of the data section."""
    return [Pixels(data.channels, source.ranges, data.mean, data.std, data.exif) for source in data.shards]


def of_run(data: Data, value_range: Ranges | None = None) -> Pixels:
    """Of images that a run did not name, for evaluation: as those of its sources, but for another range. Raises UserError
    where its sources have several."""
    kinds = sorted(set(of_sources(data)), key=str)
    if value_range is not None:
        return replace(kinds[0], range=value_range)
    if len(kinds) > 1:
        raise UserError("the run's sources have several value ranges: say which these shards have (--range LOW HIGH).")
    return kinds[0]


def dtype_of_views(data: Data) -> torch.dtype:
    """Of the crops of all sources, which meet in one batch: whole numbers where all images are stored with 8 bits."""
    return torch.uint8 if all(source.range is None for source in data.shards) else torch.float32


def scaled(
    image: Shaped[np.ndarray, "h w c"], pixels: Pixels
) -> UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"]:
    """Values 0..255: of the range, clipped to it, or those of 8 bits as they are. Raises DecodeError where nothing says what
    the values mean, where they are not numbers, or where what is said cannot be true of them."""
    kind = image.dtype
    if kind.kind not in "uif":
        raise DecodeError(f"its values are {kind}, which no image here can have: whole or floating-point numbers can")
    if pixels.range is None:
        if kind == np.uint8:
            return image
        raise DecodeError(f"{_described(image)}, and nothing says what they mean: give its source a range, {_REMEDY}")
    low, high = pixels.bounds
    if kind == np.uint8 and high.max() > np.iinfo(np.uint8).max:
        raise DecodeError(
            f"its values have 8 bits, and the range of its source ends at {high.max():g}: put 8-bit images into a source of "
            "their own, without range"
        )
    if kind.kind == "f" and not np.isfinite(image).all():
        raise DecodeError(
            f"{int((~np.isfinite(image)).sum())} of its {image.size} values are not finite: write it with numbers there"
        )
    inside = np.logical_and(image >= low, image <= high).mean()
    if inside < _WITHIN:
        raise DecodeError(
            f"{_described(image)}, and {inside:.1%} of them lie in the range of its source, {_pairs(pixels)}: mend that, "
            f"{_REMEDY}"
        )
    exact = np.float32 if kind.itemsize <= 2 or kind == np.float32 else np.float64
    out = np.clip(image.astype(exact), low.astype(exact), high.astype(exact))
    out -= low.astype(exact)
    out *= (255 / (high - low)).astype(exact)
    return out.astype(np.float32, copy=False)


def too_many(height: int, width: int, max_pixels: int) -> DecodeError:
    """The refusal of an image by its size."""
    return DecodeError(f"{width} x {height} = {height * width} pixels, more than data.max_pixels = {max_pixels}")


def as_channels(image: Shaped[np.ndarray, "h w c"], pixels: Pixels) -> Shaped[np.ndarray, "h w {pixels.channels}"]:
    """One band is that of all three colours; else there are as many as the run has channels. Raises DecodeError."""
    height, width, count = image.shape
    if count == 1 and pixels.channels == 3:
        return np.repeat(image, 3, axis=2)
    if count != pixels.channels:
        raise DecodeError(f"it has {count} bands ({height} x {width} x {count}), not data.channels = {pixels.channels}")
    return image


def _described(image: Shaped[np.ndarray, "h w c"]) -> str:
    return f"its values are {image.dtype}, from {image.min():g} to {image.max():g}"


def _pairs(pixels: Pixels) -> str:
    return " ".join(f"[{low:g}, {high:g}]" for low, high in pixels.range or ())
