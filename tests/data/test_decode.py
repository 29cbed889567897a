"""Headers, refusals and reduced decoding."""

from __future__ import annotations

import io
import struct
import time
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from lejepa_scale.config import ViewGroup, Views
from lejepa_scale.data.images import views as geometry
from lejepa_scale.data.images.decode import DecodeError, MinResolution, decode, dimensions
from lejepa_scale.data.images.pixels import Pixels


def picture(height: int, width: int) -> np.ndarray:
    """Coarse and fine detail and some noise, uint8 RGB [h, w, 3]; red on the left, blue on the right."""
    rng = np.random.default_rng(0)
    layers = [(0.5, 100), (0.3, 20), (0.15, 5), (0.05, 1)]
    x = sum(
        share
        * cv2.resize(rng.uniform(0, 255, (height // s, width // s, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
        for share, s in layers
    )
    x[:, : width // 2, 0] += 60
    x[:, width // 2 :, 2] += 60
    return x.clip(0, 255).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


IMAGE = picture(120, 200)
LARGE = picture(1400, 2100)
LARGE_JPEG = encoded(LARGE, quality=92)
ENOUGH = geometry.min_resolution([Views().global_, Views().local])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}),
        ("JPEG", {"exif": Image.Exif()}), ("JPEG", {"comment": b"\xff\xc0" * 40}),
    ],
)  # fmt: skip
def test_header_and_pixels(kind: str, options: dict) -> None:
    data = encoded(IMAGE, kind, **options)
    assert dimensions(data) == (120, 200)
    if kind in ("JPEG", "PNG"):
        assert dimensions(data[:1000]) == (120, 200)  # nothing but the header is read
    image = decode(data, ENOUGH)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - IMAGE).mean() < (6 if kind == "JPEG" else 0.01)
    assert image[:, :100, 0].mean() > image[:, :100, 2].mean()  # red, not blue


def test_a_thumbnail_is_not_mistaken_for_the_image() -> None:
    plain, thumbnail = encoded(IMAGE), encoded(IMAGE[:16, :16])
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    data = plain[:2] + segment + plain[2:]
    assert dimensions(data) == (120, 200)
    assert decode(data).shape == (120, 200, 3)
    with pytest.raises(DecodeError, match="cut short"):  # though the thumbnail has an end
        decode(data[:-200])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_colour_models_become_rgb(mode: str) -> None:
    image = Image.fromarray(IMAGE).convert(mode)
    data = encoded(image, "JPEG" if mode in ("L", "CMYK") else "PNG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode(data) - expected).mean() < (0.01 if mode in ("RGBA", "P") else 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_what_is_cut_short_is_refused(kind: str, share: float) -> None:
    data = encoded(IMAGE, kind)
    with pytest.raises(DecodeError):
        decode(data[: int(share * len(data))])


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"<html>not found</html>", b"\xff\xd8\xff\xe0" + b"\0" * 100])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(data)


def test_too_many_pixels_are_refused_before_decoding() -> None:
    """A small file that claims 3.6 gigapixels, as PNG and as JPEG."""
    png = bytearray(encoded(IMAGE, "PNG"))
    png[16:24] = (60000).to_bytes(4, "big") * 2
    jpeg = bytearray(encoded(IMAGE))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = (60000).to_bytes(2, "big") * 2
    started = time.monotonic()
    for data in (png, jpeg):
        with pytest.raises(
            DecodeError, match=r"60000 x 60000 = 3600000000 pixels, more than data.max_pixels = 80000000"
        ):
            decode(bytes(data))
    assert time.monotonic() - started < 1
    with pytest.raises(DecodeError, match="200 x 120 = 24000 pixels"):
        decode(encoded(IMAGE), max_pixels=23_999)
    assert decode(encoded(IMAGE), max_pixels=24_000).shape == IMAGE.shape


def test_reduction_leaves_every_crop_its_pixels() -> None:
    """Whatever is drawn, each view has at least 1.5 pixels of the reduced image for each of its own, along a side."""
    assert ENOUGH.reduction(375, 500) == 1
    rng = np.random.default_rng(0)
    for shape in ((1400, 2100), (3000, 4000), (900, 9000), (2448, 2448), (6000, 8000)):
        factor = ENOUGH.reduction(*shape)
        assert factor == ENOUGH.reduction(*shape[::-1])
        for group in (Views().global_, Views().local):
            boxes = geometry.crop_boxes(
                shape[0] // factor, shape[1] // factor, group.scale, rng.random((2000, geometry.DRAWS))
            )
            if factor > 1:
                assert boxes[:, 2:].min() >= 1.5 * group.size - 1
    assert [ENOUGH.reduction(h, 4 * h // 3) for h in (500, 1500, 3000, 6000)] == [1, 2, 4, 8]


def test_a_reduced_image_gives_nearly_the_same_views() -> None:
    """The same boxes up to a pixel of the reduced image, and the same pixels within 1.5 levels on average; a JPEG alone."""
    small = decode(LARGE_JPEG, ENOUGH)
    assert small.shape == (700, 1050, 3)
    assert decode(LARGE_JPEG).shape == LARGE.shape
    assert decode(encoded(LARGE[:1400:2], "PNG"), MinResolution(1, 1)).shape == (700, 2100, 3)
    for group in (Views().global_, Views().local):
        draws = np.random.default_rng(3).random((group.count, geometry.DRAWS))
        boxes = [geometry.crop_boxes(*x.shape[:2], group.scale, draws) for x in (decode(LARGE_JPEG), small)]
        assert np.abs(boxes[0] - 2 * boxes[1]).max() <= 4
        top, left, h, w = (2 * boxes[1]).T
        exact = [
            geometry._resized(decode(LARGE_JPEG)[t : t + a, x : x + b], group.size, group.size)
            for t, x, a, b in zip(top, left, h, w, strict=True)
        ]
        difference = (geometry.cut_views(small, group, draws).int() - torch.stack(exact).int()).abs().double()
        assert difference.mean() < 1.5
        assert difference.quantile(0.99) < 8


def test_orientation_is_applied_at_every_size() -> None:
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    data = encoded(LARGE, exif=exif)
    assert decode(data).shape == (2100, 1400, 3)
    assert decode(data, ENOUGH).shape == (1050, 700, 3)
    assert dimensions(data) == (1400, 2100)


def test_resolution_follows_the_most_demanding_group() -> None:
    fine, coarse = ViewGroup(count=1, size=200, scale=(0.1, 1)), ViewGroup(count=1, size=50, scale=(0.1, 1))
    assert geometry.min_resolution([fine, coarse]) == geometry.min_resolution([fine])
    assert geometry.min_resolution([ViewGroup(count=0, size=999, scale=(0.1, 1)), coarse]) == geometry.min_resolution(
        [coarse]
    )


ORIENTED = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "AVIF": {"quality": 90}}


@pytest.mark.parametrize("name", ORIENTED)
def test_every_format_is_turned_by_one_rule(name: str) -> None:
    """Against Pillow's own transposition; as they are stored, against the picture that was written."""
    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[:20], pixels[:, :32, 1], pixels[4:12, 40:60] = (200, 30, 30), 180, (0, 0, 255)
    for orientation in range(1, 9):
        exif, file = Image.Exif(), io.BytesIO()
        exif[ExifTags.Base.Orientation] = orientation
        Image.fromarray(pixels).save(file, name, exif=exif, **ORIENTED[name])
        data = file.getvalue()
        with Image.open(file) as stored:
            expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
        found = decode(data)
        assert found.shape == expected.shape, orientation
        assert np.abs(found.astype(int) - expected).mean() < 1, orientation
        as_stored = decode(data, pixels=Pixels(upright=False))
        assert as_stored.shape == pixels.shape
        assert np.abs(as_stored.astype(int) - pixels).mean() < 4, orientation


@pytest.mark.parametrize("name", ["GIF", "AVIF", "JPEG2000", "PPM", "BMP", "WEBP"])
def test_less_usual_formats_are_those_of_pillow(name: str) -> None:
    pixels = (np.indices((24, 36)).sum(0)[:, :, None] * np.array([3, 2, 1])).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, name)
    with Image.open(file) as stored:
        expected = np.asarray(stored.convert("RGB")).astype(int)
    assert np.abs(decode(file.getvalue()) - expected).max() <= 1


def test_the_first_picture_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (20, 16), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert decode(file.getvalue())[0, 0].tolist() == [255, 0, 0]


def of_size(name: str, side: int) -> bytes:
    """A picture whose header says that it has so many pixels a side."""
    if name == "PPM":
        return b"P6 %d %d 255\n" % (side, side) + bytes(300)
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, name)
    data = bytearray(file.getvalue())
    if name == "BMP":
        data[18:26] = struct.pack("<ii", side, side)
    elif name == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    elif name == "PNG":
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", side, side)
        data[20:20] = b"\x00\x00"  # after the first segment: libjpeg steps over it
    return bytes(data)


@pytest.mark.parametrize("name", ["PPM", "BMP", "GIF", "PNG", "JPEG"])
def test_max_pixels_holds_for_every_format_and_is_the_only_limit(name: str) -> None:
    with pytest.raises(DecodeError, match=r"20000 x 20000 = 400000000 pixels, more than data\.max_pixels = 80000000"):
        decode(of_size(name, 20_000))
    assert dimensions(of_size(name, 20_000)) == (20_000, 20_000)  # beyond Pillow's own limit
    assert dimensions(of_size(name, 16)) == (16, 16)


@pytest.mark.parametrize("ending", [".hdr", ".pfm", ".pam", ".sr"])
def test_formats_whose_size_is_not_known_beforehand_are_refused(ending: str) -> None:
    pixels = np.zeros((8, 8, 3), np.float32 if ending in (".hdr", ".pfm") else np.uint8)
    with pytest.raises(DecodeError, match="no decoder recognizes"):
        decode(cv2.imencode(ending, pixels)[1].tobytes())


def test_opencv_is_silent_about_damage(capfd: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "GIF")
    with pytest.raises(DecodeError):
        decode(file.getvalue()[:200])
    assert capfd.readouterr().err == ""
