"""The operations of photometric.py as Triton kernels, for images of three channels: every image goes through all of them in
one kernel, but for the mean that contrast needs before and the blur after it. Imported only where Triton is used: on CUDA,
and in Triton's interpreter by the tests."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Real
from torch import Tensor

from lejepa_scale.data.images import photometric
from lejepa_scale.data.images.photometric import BRIGHTNESS, CONTRAST, FLIP, GRAYSCALE, HUE, SIGMA, SOLARIZE
from lejepa_scale.data.images.pixels import RGB, Pixels

_TILE = 512  # pixels per program: 4 per thread of 4 warps, one load of bytes and one store of 16 bytes
_PARTS = 32  # sums of an image's luma at most, which one warp adds up
_LANES = 64  # values of a row per program of the blur; narrow, so that 3 x 98 leave few threads idle
_ROWS = 32  # of an image per program of the blur at most, which reads 6 more

_RED, _GREEN, _BLUE = (tl.constexpr(share) for share in photometric._GRAY)
_BY_BRIGHTNESS, _BY_CONTRAST, _BY_SATURATION, _BY_HUE = (tl.constexpr(float(kind)) for kind in range(4))
# Columns of the table that the kernels read, a row for each image:
_KIND = tl.constexpr(0)  # what jitter does first, second, third and last; -1 for nothing
_FACTOR = tl.constexpr(4)  # by how much, in the same order
_FLIPPED = tl.constexpr(8)
_GRAYED = tl.constexpr(9)
_BEFORE = tl.constexpr(10)  # how many of the four precede contrast; -1 without contrast
_PLACE = tl.constexpr(11)  # among the images that are blurred; -1 without blur
_WEIGHT = tl.constexpr(12)  # of the blur, at distances 0, 1, 2 and 3
_TOP = tl.constexpr(16)  # solarize gives the smaller of x and this - x: 255, or infinity where it is to do nothing
_SCALE = tl.constexpr(17)  # normalization: the factor of each channel, ...
_SHIFT = tl.constexpr(20)  # ... and the addend
_COLUMNS = tl.constexpr(23)


@triton.jit
def _rgb(x, at, plane, inside):  # type: ignore[no-untyped-def]
    r = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    g = tl.load(x + plane + at, mask=inside, other=0).to(tl.float32)
    b = tl.load(x + plane + plane + at, mask=inside, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def _store(to, r, g, b, plane, inside):  # type: ignore[no-untyped-def]
    tl.store(to, r, mask=inside)
    tl.store(to + plane, g, mask=inside)
    tl.store(to + plane + plane, b, mask=inside)


@triton.jit
def _luma(r, g, b):  # type: ignore[no-untyped-def]
    return _RED * r + _GREEN * g + _BLUE * b


@triton.jit
def _mixed(r, g, b, other, factor):  # type: ignore[no-untyped-def]
    """factor x + (1 - factor) other, within 0..255."""
    added = other * (1 - factor)
    r = tl.clamp(r * factor + added, 0.0, 255.0)
    g = tl.clamp(g * factor + added, 0.0, 255.0)
    b = tl.clamp(b * factor + added, 0.0, 255.0)
    return r, g, b


@triton.jit
def _turned(r, g, b, shift):  # type: ignore[no-untyped-def]
    """As photometric._hue, where the formula is explained."""
    value, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
    chroma = value - low
    angle = (g + b - r - low) / tl.maximum(chroma, 1e-6) + 1
    angle = tl.where(g < b, -angle, angle)
    turn = 6 * shift
    lap = tl.where(turn < 0, 6.0, 0.0)
    base = value - 2 * chroma
    r = base + chroma * tl.clamp(tl.abs(tl.abs(angle + turn) - 3), 1.0, 2.0)
    g = base + chroma * tl.clamp(tl.abs(tl.abs(angle + (turn + lap - 2)) - 3), 1.0, 2.0)
    b = base + chroma * tl.clamp(tl.abs(tl.abs(angle + (turn + lap - 4)) - 3), 1.0, 2.0)
    return r, g, b


@triton.jit
def _jittered(r, g, b, kind, factor):  # type: ignore[no-untyped-def]
    """By anything but contrast. One image has one kind: all threads of a program branch alike."""
    if kind == _BY_BRIGHTNESS:
        r, g, b = _mixed(r, g, b, 0.0, factor)
    elif kind == _BY_SATURATION:
        r, g, b = _mixed(r, g, b, _luma(r, g, b), factor)
    elif kind == _BY_HUE:
        r, g, b = _turned(r, g, b, factor)
    return r, g, b


@triton.jit
def _normalized(x, top, scale, shift):  # type: ignore[no-untyped-def]
    """After solarization."""
    return tl.minimum(x, top - x) * scale + shift


@triton.jit
def _luma_kernel(x, table, sums, plane, parts, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of an image's luma as contrast finds it, over `parts` stretches of its pixels."""
    image, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    row = table + image.to(tl.int64) * _COLUMNS
    before = tl.load(row + _BEFORE).to(tl.int32)
    if before < 0:
        return
    x += image.to(tl.int64) * plane * 3
    tiles = tl.cdiv(tl.cdiv(plane, TILE), parts)
    total = tl.zeros([TILE], tl.float32)
    for tile in range(part * tiles, (part + 1) * tiles):
        at = tile * TILE + tl.arange(0, TILE)
        r, g, b = _rgb(x, at, plane, at < plane)
        for slot in range(before):
            r, g, b = _jittered(r, g, b, tl.load(row + _KIND + slot), tl.load(row + _FACTOR + slot))
        total += _luma(r, g, b)  # a padded pixel is black, and jitter other than contrast leaves it so
    tl.store(sums + image.to(tl.int64) * parts + part, tl.sum(total))


@triton.jit
def _pixel_kernel(  # type: ignore[no-untyped-def]
    x, table, sums, sharp, out, plane, width, parts, TILE: tl.constexpr, PARTS: tl.constexpr
):
    """All of an image but its blur: into `out`, or into `sharp` if blur is still to come."""
    tiles = tl.cdiv(plane, TILE)
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = table + image.to(tl.int64) * _COLUMNS
    start = image.to(tl.int64) * plane * 3
    at = tile * TILE + tl.arange(0, TILE)
    inside = at < plane
    if tl.load(row + _FLIPPED) > 0:
        r, g, b = _rgb(x + start, at + (width - 1) - 2 * (at % width), plane, inside)
    else:
        r, g, b = _rgb(x + start, at, plane, inside)
    for slot in range(4):
        kind, factor = tl.load(row + _KIND + slot), tl.load(row + _FACTOR + slot)
        if kind == _BY_CONTRAST:
            part = tl.arange(0, PARTS)
            some = tl.load(sums + image.to(tl.int64) * parts + part, mask=part < parts, other=0.0)
            r, g, b = _mixed(r, g, b, tl.sum(some) / plane, factor)
        else:
            r, g, b = _jittered(r, g, b, kind, factor)
    if tl.load(row + _GRAYED) > 0:
        r = _luma(r, g, b)
        g, b = r, r
    place = tl.load(row + _PLACE)
    if place >= 0:
        _store(sharp + place.to(tl.int64) * plane * 3 + at, r, g, b, plane, inside)
    else:
        top = tl.load(row + _TOP)
        r = _normalized(r, top, tl.load(row + _SCALE), tl.load(row + _SHIFT))
        g = _normalized(g, top, tl.load(row + _SCALE + 1), tl.load(row + _SHIFT + 1))
        b = _normalized(b, top, tl.load(row + _SCALE + 2), tl.load(row + _SHIFT + 2))
        _store(out + start + at, r, g, b, plane, inside)


@triton.jit
def _reflected(i, side):  # type: ignore[no-untyped-def]
    """The index at the border's other side, not counting the border twice. 0 if it is beyond the image even then: of taps
    whose weight is 0."""
    return tl.maximum(side - 1 - tl.abs(side - 1 - tl.abs(i)), 0)


@triton.jit
def _blur_kernel(sharp, table, out, plane, height, width, rows, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Down a strip of an image: each row is blurred along itself, and what it adds to the 7 rows around it is kept in
    registers. A value is read once for every tap along the row, from the nearest cache, and never for those across."""
    strips, bands = tl.cdiv(3 * width, LANES), tl.cdiv(height, rows)
    image, piece = tl.program_id(0) // (strips * bands), tl.program_id(0) % (strips * bands)
    row = table + image.to(tl.int64) * _COLUMNS
    place = tl.load(row + _PLACE)
    if place < 0:
        return
    first, lane = piece // strips * rows, piece % strips * LANES + tl.arange(0, LANES)
    lane = tl.minimum(lane, 3 * width - 1)  # of the three channels' rows, side by side; threads beyond repeat the last
    channel, column = lane // width, lane % width
    sharp += place.to(tl.int64) * plane * 3 + channel.to(tl.int64) * plane
    out += image.to(tl.int64) * plane * 3 + channel.to(tl.int64) * plane + column
    top, scale, shift = tl.load(row + _TOP), tl.load(row + _SCALE + channel), tl.load(row + _SHIFT + channel)
    w0, w1 = tl.load(row + _WEIGHT), tl.load(row + _WEIGHT + 1)
    w2, w3 = tl.load(row + _WEIGHT + 2), tl.load(row + _WEIGHT + 3)
    left3, left2 = _reflected(column - 3, width), _reflected(column - 2, width)
    left1, right1 = _reflected(column - 1, width), _reflected(column + 1, width)
    right2, right3 = _reflected(column + 2, width), _reflected(column + 3, width)
    # unfinished sums of the next six rows: `a` lacks one row, `f` all but one
    a, b, c = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    d, e, f = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for y in range(first - 3, tl.minimum(first + rows, height) + 3):
        line = sharp + _reflected(y, height) * width
        x = w0 * tl.load(line + column)
        x += w1 * (tl.load(line + left1) + tl.load(line + right1))
        x += w2 * (tl.load(line + left2) + tl.load(line + right2))
        x += w3 * (tl.load(line + left3) + tl.load(line + right3))
        whole = a + w3 * x
        a, b, c = b + w2 * x, c + w1 * x, d + w0 * x
        d, e, f = e + w1 * x, f + w2 * x, w3 * x
        tl.store(out + (y - 3) * width, _normalized(whole, top, scale, shift), mask=y >= first + 3)


def fused(
    images: Real[Tensor, "b 3 h w"], parameters: Float32[np.ndarray, "b p"], pixels: Pixels = RGB
) -> Float32[Tensor, "b 3 h w"]:
    """What photometric.apply gives, in one copy to the device and at most three launches: sums of luma if there is contrast,
    all operations but blur, and blur if there is any. Sums are added in a fixed order: the result is reproducible."""
    count, _, height, width = images.shape
    images = images.contiguous()
    out = images.new_empty(images.shape, dtype=torch.float32)
    if not out.numel():
        return out
    rows = _table(parameters, pixels, min(photometric._RADIUS, height - 1, width - 1))
    blurred = int((parameters[:, SIGMA] > 0).sum())
    plane = height * width
    tiles = triton.cdiv(plane, _TILE)
    parts = triton.cdiv(tiles, triton.cdiv(tiles, _PARTS))
    sums, sharp = out.new_empty(count, parts), out.new_empty(blurred, 3, height, width)
    with torch.cuda.device_of(images):
        table = photometric._sent(rows.ravel(), images.device)
        if (rows[:, _BEFORE.value] >= 0).any():
            _luma_kernel[(count * parts,)](images, table, sums, plane, parts, TILE=_TILE, num_warps=4)
        _pixel_kernel[(count * tiles,)](
            images, table, sums, sharp, out, plane, width, parts, TILE=_TILE, PARTS=_PARTS, num_warps=4
        )
        if blurred:
            bands = triton.cdiv(height, _ROWS)
            strips = triton.cdiv(3 * width, _LANES)
            _blur_kernel[(count * bands * strips,)](
                sharp, table, out, plane, height, width, triton.cdiv(height, bands), LANES=_LANES, num_warps=2
            )
    return out


def _table(parameters: Float32[np.ndarray, "b p"], pixels: Pixels, radius: int) -> Float32[np.ndarray, "b columns"]:
    """A row for each image, of the columns above. `radius`: of the blur."""
    kinds = photometric._slots(parameters)
    contrast = kinds == CONTRAST - BRIGHTNESS
    blurred = parameters[:, SIGMA] > 0
    distance = np.arange(photometric._RADIUS + 1)
    weights = np.exp(-0.5 * (distance / np.where(blurred, parameters[:, SIGMA], 1)[:, None]) ** 2) * (
        distance <= radius
    )
    columns = (
        kinds,
        np.take_along_axis(parameters[:, BRIGHTNESS : HUE + 1], np.maximum(kinds, 0), 1),
        parameters[:, [FLIP, GRAYSCALE]],
        np.where(contrast.any(1), contrast.argmax(1), -1)[:, None],
        np.where(blurred, blurred.cumsum() - 1, -1)[:, None],
        weights / (weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdims=True)),
        np.where(parameters[:, SOLARIZE] > 0, 255, np.inf)[:, None],
        np.tile(np.array(photometric._affine(pixels)).T.ravel(), (len(parameters), 1)),
    )
    return np.concatenate(columns, 1, dtype=np.float32)
