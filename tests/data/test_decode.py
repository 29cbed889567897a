"""Headers, refusals and reduced decoding."""

from __future__ import annotations

import io
import multiprocessing
import os
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from conftest import script_environment
from PIL import ExifTags, Image, ImageOps

from lejepa_scale.config import ViewGroup, Views
from lejepa_scale.data.images import views as geometry
from lejepa_scale.data.images.decode import DecodeError, MinResolution, decode, dimensions
from lejepa_scale.data.images.pixels import Pixels
from lejepa_scale.data.images.printed import lost, printed


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


def _damaged() -> dict[str, tuple[bytes, str]]:
    """Pictures some of whose pixels are lost, by the reason that is given."""
    pixels = cv2.resize(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8), (160, 160))
    jpg, png = (cv2.imencode(ending, pixels)[1].tobytes() for ending in (".jpg", ".png"))
    restarts = io.BytesIO()
    Image.fromarray(pixels).save(restarts, "JPEG", restart_marker_blocks=4)
    marker = restarts.getvalue().rindex(b"\xff\xd1")
    return {
        "cut, with an end of image put behind it": (
            jpg[: len(jpg) // 2] + b"\xff\xd9",
            "premature end of data segment",
        ),
        "a restart marker of another number": (
            restarts.getvalue()[: marker + 1] + b"\xd5" + restarts.getvalue()[marker + 2 :],
            "found marker 0xd5 instead of RST1",
        ),
        "a flipped byte in a chunk": (png[:5000] + bytes([png[5000] ^ 255]) + png[5001:], "libpng error: "),
        "cut in a chunk": (png[: len(png) // 2], "PNG input buffer is incomplete"),
    }


@pytest.mark.parametrize("name", _damaged())
def test_lost_pixels_are_refused_with_the_decoders_words(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    data, words = _damaged()[name]
    for enough in (None, MinResolution(1, 1)):
        with pytest.raises(DecodeError, match=rf"160 x 160 pixels that is damaged \(.*{words}"):
            decode(data, enough)
    assert capfd.readouterr().err == ""


def test_a_warning_that_costs_no_pixel_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """As a few of ImageNet's images give: bytes before the end, or a colour profile that libpng knows to be wrong."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    jpg, png = (cv2.imencode(ending, pixels)[1].tobytes() for ending in (".jpg", ".png"))
    assert np.array_equal(decode(jpg[:-2] + b"1234" + jpg[-2:]), decode(jpg))
    gamma = b"gAMA" + bytes(4)  # of nought
    with_gamma = png[:33] + struct.pack(">I", 4) + gamma + struct.pack(">I", zlib.crc32(gamma)) + png[33:]
    assert np.array_equal(decode(with_gamma), decode(png))
    assert capfd.readouterr().err == ""


def test_which_words_of_decoders_tell_of_lost_pixels() -> None:
    """All of libjpeg's warnings (jerror.h) that are about the data, and libpng's."""
    of_weight = ["Corrupt JPEG data: bad Huffman code", "Corrupt JPEG data: bad arithmetic code"]
    of_weight += ["Inconsistent progression sequence for component 1 coefficient 2", "libpng error: IDAT: CRC error"]
    of_weight += ["Premature end of JPEG file", "Corrupt JPEG data: premature end of data segment"]
    of_none = [
        "Corrupt JPEG data: 18 extraneous bytes before marker 0xd9",
        "Invalid SOS parameters for sequential JPEG",
    ]
    of_none += ["Unknown Adobe color transform code 3", "libpng warning: iCCP: known incorrect sRGB profile"]
    assert [lost(["libpng warning: x", line]) for line in of_weight] == of_weight
    assert not any(lost([line]) for line in of_none)


def test_a_picture_without_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tifffile makes of headers with several damages, which the mutated files of test_hostile.py found."""
    file = io.BytesIO()
    tifffile.imwrite(file, np.ones((24, 32, 3), np.uint16), photometric="rgb")
    monkeypatch.setattr("lejepa_scale.data.images.decode.read_tiff", lambda *_: np.zeros((24, 0, 3), np.uint16))
    with pytest.raises(DecodeError, match="it has no pixels: 0 x 24"):
        decode(file.getvalue(), pixels=Pixels(3, ((0, 255),)))


def test_opencv_is_silent_about_damage(capfd: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "GIF")
    with pytest.raises(DecodeError):
        decode(file.getvalue()[:200])
    assert capfd.readouterr().err == ""


def test_only_what_decoders_print_is_caught(capfd: pytest.CaptureFixture[str]) -> None:
    """Of two threads, and in a fork, each with its own list; what else comes meanwhile is passed on."""

    def one(number: int) -> list[str]:
        with printed() as lines:
            os.write(2, f"libpng error: {number}\nfor people {number}\n".encode())
            assert not lines
        return lines

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(40))) == [[f"libpng error: {i}"] for i in range(40)]
    child = multiprocessing.get_context("fork").Process(target=one, args=(40,))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert sorted(capfd.readouterr().err.splitlines()) == sorted(f"for people {i}" for i in range(41))


def test_decoding_without_a_standard_error(tmp_path: Path) -> None:
    """As a daemon may have it: closed."""
    data = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    (tmp_path / "a.png").write_bytes(data)
    code = (
        "import os, sys; os.close(2); from lejepa_scale.data.images.decode import decode; "
        f"print(decode(open({str(tmp_path / 'a.png')!r}, 'rb').read()).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=script_environment(), stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"(8, 8, 3)\n"
