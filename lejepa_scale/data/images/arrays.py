"""Images of any number of bands and bits: NumPy arrays and TIFF files. Shapes are looked at before anything is read."""

from __future__ import annotations

import io
import logging

import numpy as np
import tifffile
from jaxtyping import Shaped

from lejepa_scale.data.images.pixels import DecodeError, Pixels, as_channels, too_many
from lejepa_scale.data.io import npy

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, either byte order
_ALPHA = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
_SAMPLES: dict[int, int] = {  # of a pixel, but for transparency
    tifffile.PHOTOMETRIC.MINISWHITE: 1,
    tifffile.PHOTOMETRIC.MINISBLACK: 1,
    tifffile.PHOTOMETRIC.RGB: 3,
    tifffile.PHOTOMETRIC.PALETTE: 1,
    tifffile.PHOTOMETRIC.SEPARATED: 4,
    tifffile.PHOTOMETRIC.YCBCR: 3,
}
_AS_STORED = tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB  # whose values need no conversion

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what cannot be read is raised, and named with its sample


def is_npy(data: bytes) -> bool:
    """Whether the bytes begin as numpy.save writes."""
    return data.startswith(npy.MAGIC)


def is_tiff(data: bytes) -> bool:
    """Whether the bytes begin as a TIFF file does."""
    return data[:4] in _TIFF


def read_npy(data: bytes, pixels: Pixels, max_pixels: int) -> Shaped[np.ndarray, "h w c"]:
    """An array [H, W], [H, W, C] or [C, H, W]. Raises DecodeError: also for one that is cut short or holds objects."""
    try:
        array = npy.read(data)
    except ValueError as error:
        raise DecodeError(str(error)) from error
    shape = array.shape
    if len(shape) not in (2, 3) or 0 in shape:
        raise DecodeError(f"an array {_shape(shape)}: an image is [H, W], [H, W, C] or [C, H, W]")
    if array.ndim == 2:
        array = array[:, :, None]
    elif shape[-1] not in (pixels.channels, 1) and shape[0] in (pixels.channels, 1):
        array = array.transpose(1, 2, 0)
    _bounded(array.shape[0], array.shape[1], max_pixels)
    return as_channels(_native(array), pixels)


def read_tiff(data: bytes, pixels: Pixels, max_pixels: int) -> Shaped[np.ndarray, "h w c"] | None:
    """The first image of the file with all of its bands, which may be planes or pages; None for an 8-bit picture, whose
    colours a decoder of pictures knows. Raises DecodeError."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            series, page = file.series[0], file.pages.first
            height, width, bands = _layout(series)
            _bounded(height, width, max_pixels)
            colours, alpha = _SAMPLES.get(page.photometric), sum(kind in _ALPHA for kind in page.extrasamples)
            eight = page.bitspersample <= 8 and series.dtype in (np.uint8, np.bool_)
            lies = page.tags.valueof("Orientation", 1)
            orientation = lies if pixels.upright else 1
            if (
                bands == colours and eight and pixels.channels in (1, 3) and orientation == lies
            ):  # OpenCV turns every TIFF
                return None
            kept = bands - alpha if bands - alpha == colours and bands != pixels.channels else bands
            if page.photometric not in _AS_STORED or page.bitspersample < 8:
                name = getattr(page.photometric, "name", page.photometric)
                raise DecodeError(
                    f"a TIFF of {bands} band(s) of {page.bitspersample} bits as {name}: write it as MINISBLACK or RGB, of 8 "
                    "bits or more"
                )
            if kept != pixels.channels and (kept, pixels.channels) != (1, 3):  # before anything is read
                raise DecodeError(
                    f"it has {kept} bands ({_shape(series.shape)}), not data.channels = {pixels.channels}"
                )
            at = series.axes.index("Y"), series.axes.index("X")
            array = np.moveaxis(series.asarray(), at, (0, 1)).reshape(height, width, bands)[:, :, :kept]
    except DecodeError:
        raise
    except Exception as error:  # tifffile and its codecs raise many kinds for damaged files
        raise DecodeError(f"a TIFF that cannot be read: {str(error) or type(error).__name__}") from error
    return as_channels(_native(oriented(array, orientation)), pixels)


def _layout(series: tifffile.TiffPageSeries) -> tuple[int, int, int]:
    """Height, width and bands, which are the only other axis there may be."""
    sides = dict(zip(series.axes, series.shape, strict=True))
    if not {"Y", "X"} <= sides.keys():
        raise DecodeError(f"a TIFF of {_shape(series.shape)} ({series.axes}), which is no image")
    height, width = sides.pop("Y"), sides.pop("X")
    bands = [side for side in sides.values() if side > 1]
    if len(bands) > 1:
        raise DecodeError(
            f"a TIFF of several images: {_shape(series.shape)} ({series.axes}). Write one for each sample"
        )
    return height, width, bands[0] if bands else 1


def _bounded(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise too_many(height, width, max_pixels)


def _native(array: Shaped[np.ndarray, "h w c"]) -> Shaped[np.ndarray, "h w c"]:
    """In this machine's order of bytes."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def oriented(image: Shaped[np.ndarray, "..."], orientation: int) -> Shaped[np.ndarray, "..."]:
    """Upright, from how EXIF and TIFF say that it lies: 1 to 8 (TIFF 6.0, Orientation). Other numbers say nothing."""
    if orientation not in range(2, 9):
        return image
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    vertical, horizontal = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return image[:: -1 if vertical else 1, :: -1 if horizontal else 1]
