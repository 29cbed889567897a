"""Encoded bytes to an array of values 0..255: pictures with OpenCV's libjpeg-turbo, libpng and libwebp, other bands and more
bits by arrays.py. Looks at the header first: an image of too many pixels is refused, and a JPEG that is far larger than its
views need is decoded at half its size, or less."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from PIL import ExifTags, Image

from lejepa_scale.config import Data
from lejepa_scale.data.images.arrays import is_npy, is_tiff, oriented, read_npy, read_tiff
from lejepa_scale.data.images.pixels import RGB, DecodeError, Pixels, as_channels, scaled, too_many
from lejepa_scale.data.images.printed import lost, printed

MAX_PIXELS: int = Data.model_fields["max_pixels"].default
_REDUCED = {  # by channels
    1: {2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8},
    3: {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8},
}
_WHOLE = {1: cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH, 3: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH}
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF", "JPEG2000")  # whose sizes Pillow finds
_AVIF = (b"ftypavif", b"ftypavis", b"ftypmif1")
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PALETTE, _GREY_AND_ALPHA, _RGBA = 3, 4, 6  # PNG's colour types

Image.init()  # the formats that it knows
cv2.utils.logging.setLogLevel(
    cv2.utils.logging.LOG_LEVEL_SILENT
)  # what cannot be read is raised, and named with its sample


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
    data: bytes, enough: MinResolution | None = None, max_pixels: int = MAX_PIXELS, pixels: Pixels = RGB
) -> UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"]:
    """An image with the channels of `pixels`, values 0..255: uint8, or float32 where the source has a value range.

    Of pictures, grey is made RGB for 3 channels, RGB grey for 1, transparency dropped for either; they are turned upright by
    their EXIF or TIFF orientation where `pixels` says so. A JPEG may come back smaller by a whole factor (libjpeg's scaled
    inverse transform) where `enough` allows it. Raises DecodeError: also for one that is cut short, has other bands, or
    values of which nothing says what they mean.
    """
    return scaled(stored(data, enough, max_pixels, pixels), pixels)


def stored(
    data: bytes, enough: MinResolution | None = None, max_pixels: int = MAX_PIXELS, pixels: Pixels = RGB
) -> Shaped[np.ndarray, "h w {pixels.channels}"]:
    """The same image with the values that it is stored with. Raises DecodeError, too."""
    image = None
    if is_npy(data):
        image = read_npy(data, pixels, max_pixels)
    elif is_tiff(data):
        image = read_tiff(data, pixels, max_pixels)
    image = _picture(data, enough, max_pixels, pixels) if image is None else image
    if not image.size:
        raise DecodeError(f"it has no pixels: {image.shape[1]} x {image.shape[0]}")
    return image


def _picture(
    data: bytes, enough: MinResolution | None, max_pixels: int, pixels: Pixels
) -> Shaped[np.ndarray, "h w {pixels.channels}"]:
    factor, channels = 1, pixels.channels
    size = dimensions(data)
    if size is None:
        raise DecodeError(f"{len(data)} bytes that no decoder recognizes")
    if size[0] * size[1] > max_pixels:
        raise too_many(*size, max_pixels)
    if _is_jpeg(data):
        if data.rfind(b"\xff\xd9") < _frame_header(data):
            raise DecodeError(f"a JPEG of {size[1]} x {size[0]} pixels that is cut short: {len(data)} bytes, no end")
        factor = enough.reduction(*size) if enough is not None and channels in _REDUCED else 1
    flags = _WHOLE.get(channels, cv2.IMREAD_UNCHANGED) if factor == 1 else _REDUCED[channels][factor]
    try:
        with printed() as lines:
            image = cv2.imdecode(
                np.frombuffer(data, np.uint8), flags | (0 if pixels.upright else cv2.IMREAD_IGNORE_ORIENTATION)
            )
    except cv2.error as error:
        raise DecodeError(str(error).strip()) from error
    if damage := lost(lines):
        raise DecodeError(f"a picture of {size[1]} x {size[0]} pixels that is damaged ({damage})")
    if image is None:
        raise DecodeError(f"{len(data)} bytes that no decoder recognizes")
    if channels not in _WHOLE:
        return _with_alpha(data, image, pixels)
    if factor > 1 and channels == 3:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    elif pixels.upright and data[4:12] in _AVIF:  # which OpenCV leaves as it is stored
        image = np.ascontiguousarray(oriented(image, _orientation(data)))
    return image if channels == 3 else image[:, :, None]


def _with_alpha(
    data: bytes, image: Shaped[np.ndarray, "..."], pixels: Pixels
) -> Shaped[np.ndarray, "h w {pixels.channels}"]:
    """The stored bands in their order, from what OpenCV gives unchanged: blue first, not upright, and four bands also of a
    grey picture with transparency, or of one with a palette."""
    bands = image.reshape(*image.shape[:2], -1)
    colour_type = data[25] if data.startswith(_PNG) else _RGBA
    if colour_type == _PALETTE:
        raise DecodeError(f"it has a palette of colours, not data.channels = {pixels.channels}")
    if bands.shape[2] == 4:
        bands = bands[:, :, 2:] if colour_type == _GREY_AND_ALPHA else cv2.cvtColor(bands, cv2.COLOR_BGRA2RGBA)
    return as_channels(oriented(bands, _orientation(data)) if pixels.upright else bands, pixels)


def _orientation(data: bytes) -> int:
    """How it lies, 1 to 8 as EXIF counts them; 1 where nothing says so."""
    try:
        header = _header(data)
        with warnings.catch_warnings(action="ignore"):
            return 1 if header is None else int(header.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as below
        return 1


def dimensions(data: bytes) -> tuple[int, int] | None:
    """(height, width) as stored, from the header alone; None where it is not understood."""
    if _is_jpeg(data):
        at = _frame_header(data)
        if at < 0:
            return None
        return int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
    if data[:16] == _PNG and len(data) >= 24:
        return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    header = _header(data)
    return None if header is None else (header.height, header.width)


def _header(data: bytes) -> Image.Image | None:
    """Pillow's view of a header, of any size: `Image.open` itself has a limit of its own."""
    with warnings.catch_warnings(action="ignore"):  # of damaged tags, by no name
        for name in _FORMATS:
            factory, accept = Image.OPEN[name]
            try:
                if accept is None or accept(data[:16]):
                    return factory(io.BytesIO(data), "")
            except Exception:  # its formats raise all sorts for damaged headers
                continue
    return None


def _is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def _frame_header(data: bytes) -> int:
    """Where the segment with a JPEG's size begins (SOF0 to SOF15); -1 where there is none. Other segments are stepped
    over, so that a thumbnail inside one is not mistaken for the image, and bytes between segments, as libjpeg does."""
    at = data.find(b"\xff", 2)
    while at >= 0 and at + 9 <= len(data):
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return at
        if marker == 0xFF:  # padding
            at += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # without content
            at = data.find(b"\xff", at + 2)
        else:
            at = data.find(b"\xff", at + 2 + int.from_bytes(data[at + 2 : at + 4], "big"))
    return -1
