"""Encoded bytes to an RGB array, with OpenCV's libjpeg-turbo, libpng and libwebp. Looks at the header first: an image of
too many pixels is refused, and a JPEG that is far larger than its views need is decoded at half its size, or less."""

from __future__ import annotations

import io
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lejepa_scale.config import Data
from lejepa_scale.data.faults import SampleFault

MAX_PIXELS: int = Data.model_fields["max_pixels"].default
_REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


class DecodeError(SampleFault):
    """The bytes are not an image that can be read, or one that should not be."""


@dataclass(frozen=True)
class MinResolution:
    """A resolution that every use of an image can do with."""

    pixels: float  # width x height
    side: float  # the shorter one

    def reduction(self, height: int, width: int) -> int:
        """The largest of 1, 2, 4, 8 by which both sides can be divided."""
        fits = (f for f in (8, 4, 2) if height * width >= f * f * self.pixels and min(height, width) >= f * self.side)
        return next(fits, 1)


def decode(
    data: bytes, enough: MinResolution | None = None, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "h w 3"]:
    """RGB; grey and transparent images are converted, EXIF orientation is applied.

    A JPEG may come back smaller by a whole factor (libjpeg's scaled inverse transform) where `enough` allows it. Raises
    DecodeError, also for a JPEG that is cut short.
    """
    factor = 1
    if (size := dimensions(data)) is not None:
        if size[0] * size[1] > max_pixels:
            raise DecodeError(
                f"{size[1]} x {size[0]} = {size[0] * size[1]} pixels, more than data.max_pixels = {max_pixels}"
            )
        if _is_jpeg(data):
            if data.rfind(b"\xff\xd9") < _frame_header(data):
                raise DecodeError(
                    f"a JPEG of {size[1]} x {size[0]} pixels that is cut short: {len(data)} bytes, no end"
                )
            factor = enough.reduction(*size) if enough is not None else 1
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[factor]) if data else None
    except cv2.error as error:
        raise DecodeError(str(error).strip()) from error
    if image is None:
        raise DecodeError(f"{len(data)} bytes that no decoder recognizes")
    return image if factor == 1 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def dimensions(data: bytes) -> tuple[int, int] | None:
    """(height, width) as stored, from the header alone; None where it is not understood. Raises DecodeError where
    that says more pixels than Pillow would open."""
    if _is_jpeg(data):
        at = _frame_header(data)
        if at < 0:
            return None
        return int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
    if data[:16] == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" and len(data) >= 24:
        return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except Image.DecompressionBombError as error:
        raise DecodeError(str(error)) from error
    except (OSError, ValueError, SyntaxError):
        return None


def _is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def _frame_header(data: bytes) -> int:
    """Where the segment with a JPEG's size begins (SOF0 to SOF15); -1 where there is none. Other segments are stepped
    over, so that a thumbnail inside one is not mistaken for the image."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return at
        if marker == 0xFF:  # padding
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # without content
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return -1
