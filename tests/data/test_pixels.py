"""Images of any number of bands and bits: what their values become, and what is refused. The truth is the array that was
written, Pillow, torchvision, NumPy."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import torchvision.transforms.v2.functional as reference
import webdataset as wds
from PIL import Image, ImageOps

from lejepa_scale.cli.main import main
from lejepa_scale.config import Augment, BatchPlan, Data, ViewGroup
from lejepa_scale.data import Loader, evaluation_batches, open_mixture
from lejepa_scale.data.images import photometric, views
from lejepa_scale.data.images.decode import decode
from lejepa_scale.data.images.pixels import RGB, DecodeError, Pixels, of_run
from lejepa_scale.data.make import sources
from lejepa_scale.data.statistics import Moments, pixel_statistics
from lejepa_scale.errors import UserError

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)
BANDS = np.dstack([RAMP, RAMP[::-1], RAMP.T, RAMP[:, ::-1], RAMP // 2])  # none like another, [64, 64, 5]
TWELVE = ((0.0, 4095.0),)


def tiff(image: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    options = {"photometric": "minisblack", "planarconfig": "contig", **options}
    if image.ndim == 2 or image.shape[2] == 1:
        options.pop("planarconfig")
    tifffile.imwrite(out, image, **options)
    return out.getvalue()


def npy(image: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, image, **options)
    return out.getvalue()


def pillow(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


STORED = {
    "npy": npy(BANDS),
    "npy-planes": npy(np.ascontiguousarray(BANDS.transpose(2, 0, 1))),
    "npy-fortran": npy(np.asfortranarray(BANDS)),
    "npy-big-endian": npy(BANDS.astype(">u2")),
    "npy-float": npy(BANDS.astype(np.float32)),
    "npy-double": npy(BANDS.astype(np.float64)),
    "npy-int32": npy(BANDS.astype(np.int32)),
    "tiff": tiff(BANDS),
    "tiff-big-endian": tiff(BANDS, byteorder=">"),
    "tiff-big": tiff(BANDS, bigtiff=True),
    "tiff-lzw": tiff(BANDS, compression="lzw", predictor=True),
    "tiff-deflate": tiff(BANDS, compression="zlib", predictor=True),
    "tiff-zstd": tiff(BANDS, compression="zstd"),
    "tiff-tiles": tiff(BANDS, tile=(16, 32), compression="zlib"),
    "tiff-planes": tiff(BANDS.transpose(2, 0, 1), planarconfig="separate"),
    "tiff-pages": tiff(BANDS.transpose(2, 0, 1), planarconfig=None),
    "tiff-float": tiff(BANDS.astype(np.float32), compression="zlib", predictor=True),
}


@pytest.mark.parametrize("kind", STORED)
def test_every_grey_level_of_every_band_arrives(kind: str) -> None:
    image = decode(STORED[kind], pixels=Pixels(5, TWELVE))
    assert (image.dtype, image.shape) == (np.float32, (64, 64, 5))
    np.testing.assert_allclose(image, BANDS * (255 / 4095), atol=2e-5)
    assert [len(np.unique(image[:, :, band])) for band in range(5)] == [4096] * 4 + [2048]


@pytest.mark.parametrize(
    ("data", "channels"),
    [
        (pillow(Image.fromarray(RAMP), "PNG"), 1),
        (tiff(RAMP), 1),
        (tiff(RAMP[:, :, None]), 1),
        (npy(RAMP), 1),
        (npy(RAMP[None]), 1),
        (b"P5\n64 64\n4095\n" + RAMP.astype(">u2").tobytes(), 1),
        (pillow(Image.fromarray(RAMP), "PNG"), 3),  # grey: the same in red, green and blue
        (tiff(RAMP), 3),
        (npy(RAMP), 3),
    ],
    ids=["png-1", "tiff-1", "tiff-1-axis", "npy-1", "npy-1-axis", "pgm-1", "png-3", "tiff-3", "npy-3"],
)
def test_twelve_bits_in_sixteen(data: bytes, channels: int) -> None:
    """As 8 bits a ramp of 4096 levels is 16 of them."""
    image = decode(data, pixels=Pixels(channels, TWELVE))
    np.testing.assert_allclose(image, np.dstack([RAMP * (255 / 4095)] * channels), atol=2e-5)
    with pytest.raises(DecodeError, match=r"uint16, from 0 to 4095, and nothing says .* range: \[LOW, HIGH\]"):
        decode(data, pixels=Pixels(channels))


@pytest.mark.parametrize("kind", ["png", "tif", "npy"])
@pytest.mark.parametrize(("channels", "bits"), [(1, 12), (3, 16), (4, 10), (4, 8), (1, 8)])
def test_what_shards_make_writes_is_what_is_read(kind: str, channels: int, bits: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 2**bits, (9, 7, channels)).astype(np.uint8 if bits == 8 else np.uint16)
    pixels = Pixels(channels, None if bits == 8 else ((0, 2**bits - 1),))
    found = decode(sources.encode(image, kind, 90), pixels=pixels)
    np.testing.assert_allclose(found, image * (1 if bits == 8 else 255 / (2**bits - 1)), atol=2e-5)
    assert found.dtype == (np.uint8 if bits == 8 else np.float32)


def test_a_range_for_each_channel_is_windowed_and_clipped() -> None:
    """Radar in decibels beside reflectances: [-25, 0] and [0, 10000]."""
    radar, reflectance = np.array([[-30, -25, -12.5, 0, 3.0]]), np.array([[0, 5000, 10000, 12000, 2500.0]])
    pixels = Pixels(2, ((-25, 0), (0, 10000)))
    found = decode(npy(np.dstack([radar, reflectance])), pixels=pixels)
    np.testing.assert_allclose(found[0, :, 0], [0, 0, 127.5, 255, 255], atol=1e-5)
    np.testing.assert_allclose(found[0, :, 1], [0, 127.5, 255, 255, 63.75], atol=1e-5)
    hounsfield = decode(npy(np.array([[-1024, -160, 40, 240, 3000]], np.int16)), pixels=Pixels(1, ((-160, 240),)))
    np.testing.assert_allclose(hounsfield.ravel(), [0, 0, 127.5, 255, 255], atol=1e-5)


def test_large_whole_numbers_keep_their_differences() -> None:
    """In float32 neighbours beyond 2^24 are the same."""
    values = 2**30 + np.arange(256, dtype=np.uint32).reshape(16, 16)
    found = decode(npy(values), pixels=Pixels(1, ((2**30, 2**30 + 255),)))
    np.testing.assert_allclose(found[:, :, 0], values - 2**30, atol=1e-4)


RGBA8 = (np.dstack([BANDS[:, :, :4]]) // 16).astype(np.uint8)


def test_a_fourth_band_is_not_dropped_without_a_word() -> None:
    """Transparency is, as it always was; a band that is none is not."""
    band = tiff(RGBA8, photometric="rgb", extrasamples=["unspecified"])
    for data in (band, tiff(RGBA8), npy(RGBA8)):
        assert np.array_equal(decode(data, pixels=Pixels(4)), RGBA8)
        with pytest.raises(DecodeError, match=r"4 bands .*not data\.channels = 3"):
            decode(data)
    for data in (
        tiff(RGBA8, photometric="rgb", extrasamples=["unassalpha"]),
        tiff(RGBA8, photometric="rgb", extrasamples=["unassalpha"], compression="lzw"),
        pillow(Image.fromarray(RGBA8), "PNG"),
    ):
        assert np.array_equal(decode(data), RGBA8[:, :, :3])
        assert np.array_equal(decode(data, pixels=Pixels(4)), RGBA8)
    deep = tiff(BANDS[:, :, :4], photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_allclose(decode(deep, pixels=Pixels(3, TWELVE)), BANDS[:, :, :3] * (255 / 4095), atol=2e-5)
    np.testing.assert_allclose(decode(deep, pixels=Pixels(4, TWELVE)), BANDS[:, :, :4] * (255 / 4095), atol=2e-5)


def test_pictures_of_eight_bits_are_what_they_were() -> None:
    """TIFF in the ways that photographs come in, against Pillow."""
    image = Image.fromarray(RGBA8[:, :, :3])
    for options in ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}, {"compression": "packbits"}):
        assert np.array_equal(decode(pillow(image, "TIFF", **options)), RGBA8[:, :, :3])
    grey, palette, bits = image.convert("L"), image.quantize(64), image.convert("1")
    for other in (grey, palette, bits):
        assert np.array_equal(decode(pillow(other, "TIFF")), np.array(other.convert("RGB")))
    assert np.array_equal(decode(pillow(grey, "TIFF"), pixels=Pixels(1))[:, :, 0], np.array(grey))
    inverted = tiff(np.array(grey), photometric="miniswhite")
    assert np.array_equal(decode(inverted)[:, :, 0], 255 - np.array(grey))


def test_colours_become_grey_for_one_channel() -> None:
    """ITU-R 601 luma, as Pillow has it."""
    smooth = Image.fromarray(np.dstack([np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (64, 1))] * 3))
    smooth = Image.merge(
        "RGB", (smooth.getchannel(0), smooth.getchannel(0).rotate(90), smooth.getchannel(0).rotate(180))
    )
    for kind, options, atol in (("PNG", {}, 1), ("TIFF", {}, 1), ("JPEG", {"quality": 98}, 3)):
        found = decode(pillow(smooth, kind, **options), pixels=Pixels(1))
        assert found.shape == (64, 64, 1)
        assert np.abs(found[:, :, 0].astype(int) - np.array(smooth.convert("L"))).max() <= atol


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_to_any_bands(orientation: int) -> None:
    image = RGBA8[:40, :24]
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(pillow(Image.fromarray(image), "PNG", exif=exif))))
    assert np.array_equal(decode(pillow(Image.fromarray(image), "PNG", exif=exif), pixels=Pixels(4)), np.array(upright))
    deep = tiff(image.astype(np.uint16) * 16, extratags=[(274, "H", 1, orientation, True)])
    found = decode(deep, pixels=Pixels(4, ((0, 4080),)))
    np.testing.assert_allclose(found, np.array(upright), atol=1e-4)


CUT = tiff(BANDS)
LYING = npy(RAMP).replace(b"(64, 64)", b"(99999, 9)")
REFUSED = {
    "objects": (npy(np.array([{}, 1], dtype=object), allow_pickle=True), "whole or floating-point numbers"),
    "fields": (npy(np.zeros((4, 4), [("a", "u1")])), "whole or floating-point numbers"),
    "complex": (npy(np.zeros((4, 4), np.complex64)), "complex64"),
    "truth": (npy(np.zeros((4, 4), bool)), "bool"),
    "vector": (npy(np.zeros(768, np.float32)), r"an array 768: an image is \[H, W\]"),
    "empty": (npy(np.zeros((0, 4, 3), np.uint8)), "0 x 4 x 3"),
    "four axes": (npy(np.zeros((1, 4, 4, 3), np.uint8)), "1 x 4 x 4 x 3"),
    "cut array": (npy(RAMP)[:-1], "needs 8192 bytes, and 8191 are there"),
    "long array": (npy(RAMP) + b"x", "needs 8192 bytes, and 8193 are there"),
    "lying array": (LYING, "needs 1799982 bytes"),
    "cut header": (npy(RAMP)[:20], "header"),
    "bands of an array": (npy(BANDS), r"5 bands \(64 x 64 x 5\), not data\.channels = 3"),
    "bands of a TIFF": (tiff(BANDS), r"5 bands .*not data\.channels = 3"),
    "pages": (STORED["tiff-pages"], r"5 bands \(5 x 64 x 64\)"),
    "a stack of pictures": (
        tiff(np.stack([RGBA8[:, :, :3]] * 4), photometric="rgb"),
        "several images: 4 x 64 x 64 x 3",
    ),
    "inverted": (tiff(RAMP, photometric="miniswhite"), "16 bits as MINISWHITE"),
    "cut TIFF": (CUT[: len(CUT) // 2], "a TIFF that cannot be read"),
    "cut packed TIFF": (STORED["tiff-zstd"][: len(STORED["tiff-zstd"]) // 2], "a TIFF that cannot be read"),
    "no TIFF": (b"II*\0" + b"\xff" * 40, "a TIFF that cannot be read"),
    "no bytes": (b"", "0 bytes that no decoder recognizes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    data, words = REFUSED[name]
    with pytest.raises(DecodeError, match=words):
        decode(data, pixels=Pixels(5, TWELVE) if name.startswith("cut") else RGB)


@pytest.mark.parametrize(
    ("data", "channels", "words"),
    [
        (pillow(Image.fromarray(RGBA8[:, :, :2], "LA"), "PNG"), 4, "2 bands"),
        (pillow(Image.fromarray(RGBA8[:, :, :3]).quantize(8), "PNG"), 4, "palette"),
        (pillow(Image.fromarray(RGBA8[:, :, :3]), "JPEG"), 4, "3 bands"),
        (pillow(Image.new("CMYK", (8, 8)), "JPEG"), 4, "3 bands"),
        (pillow(Image.new("CMYK", (8, 8)), "TIFF"), 4, "SEPARATED"),
        (pillow(Image.fromarray(RGBA8[:, :, 0]), "PNG"), 4, "1 bands"),
        (pillow(Image.new("1", (8, 8)), "TIFF"), 4, "1 bits"),
        (npy(RGBA8[:, :, :3]), 1, "3 bands"),
    ],
    ids=["grey and alpha", "palette", "jpeg", "cmyk jpeg", "cmyk tiff", "grey", "one bit", "array"],
)
def test_pictures_of_other_bands_are_refused(data: bytes, channels: int, words: str) -> None:
    with pytest.raises(DecodeError, match=words):
        decode(data, pixels=Pixels(channels))


def test_grey_and_transparency_are_two_bands() -> None:
    data = pillow(Image.fromarray(RGBA8[:, :, :2], "LA"), "PNG")
    assert np.array_equal(decode(data, pixels=Pixels(2)), RGBA8[:, :, :2])
    assert np.array_equal(decode(data, pixels=Pixels(1)), RGBA8[:, :, :1])


def test_values_that_cannot_be_what_the_range_says() -> None:
    with pytest.raises(DecodeError, match=r"8 bits, and the range of its source ends at 4095"):
        decode(npy(RGBA8[:, :, :3]), pixels=Pixels(3, TWELVE))
    broken = RAMP.astype(np.float32)
    broken[3, 4], broken[5, 6] = np.nan, np.inf
    with pytest.raises(DecodeError, match=r"2 of its 4096 values are not finite"):
        decode(npy(broken), pixels=Pixels(1, TWELVE))
    with pytest.raises(DecodeError, match=r"from 1000 to 4095, and 0\.0% of them lie in the range .* \[0, 1\]"):
        decode(npy(RAMP.clip(1000)), pixels=Pixels(1, ((0, 1),)))
    dark = decode(npy(np.zeros((8, 8), np.uint16)), pixels=Pixels(1, TWELVE))  # no data: within the range
    assert not dark.any()


def test_sizes_are_looked_at_before_anything_is_read() -> None:
    for data in (npy(BANDS), tiff(BANDS), STORED["tiff-pages"], pillow(Image.fromarray(RAMP), "PNG")):
        with pytest.raises(DecodeError, match=r"64 x 64 = 4096 pixels, more than data\.max_pixels = 4095"):
            decode(data, None, 4095, Pixels(5, TWELVE))


@pytest.mark.parametrize("channels", [1, 2, 5, 13])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_crops_of_any_bands_against_torchvision(channels: int, kind: type) -> None:
    image = (np.random.default_rng(0).random((50, 70, channels)) * 255).astype(kind)
    group = ViewGroup(count=3, size=16, scale=(0.3, 1.0))
    draws = np.random.default_rng(1).random((3, views.DRAWS))
    found = views.cut_views(image, group, draws)
    assert found.dtype == (torch.uint8 if kind == np.uint8 else torch.float32)
    for view, (top, left, h, w) in zip(found, views.crop_boxes(50, 70, group.scale, draws), strict=True):
        planes = torch.from_numpy(image).permute(2, 0, 1).double()
        expected = reference.resized_crop(planes, int(top), int(left), int(h), int(w), [16, 16], antialias=True)
        torch.testing.assert_close(view.double(), expected, rtol=0, atol=1.01 if kind == np.uint8 else 1e-3)


def rows(count: int, **columns: float) -> torch.Tensor:
    row = np.zeros((count, photometric.WIDTH), np.float32)
    row[:, [photometric.BRIGHTNESS, photometric.CONTRAST, photometric.SATURATION]] = 1
    row[:, photometric.ORDER] = -1
    for name, value in columns.items():
        row[:, getattr(photometric, name.upper())] = value
    return torch.from_numpy(row)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_intensity_geometry_and_blur_for_any_bands(channels: int) -> None:
    """Against torchvision, which has contrast for one channel alone: there its gray is the channel, here the mean of all."""
    x = torch.rand(4, channels, 12, 12) * 255
    mean, std = [0.1 * (i + 1) for i in range(channels)], [0.2 + 0.05 * i for i in range(channels)]
    pixels = Pixels(channels, TWELVE, tuple(mean), tuple(std))

    def close(parameters: torch.Tensor, expected: torch.Tensor) -> None:
        found, given = photometric.apply(x, parameters, pixels), x.clone()
        torch.testing.assert_close(found, reference.normalize(expected / 255, mean, std), rtol=0, atol=2e-5)
        torch.testing.assert_close(x, given, rtol=0, atol=0)  # the batch is left as it is

    close(rows(4), x)
    close(rows(4, flip=1), x.flip(-1))
    close(rows(4, order=0, brightness=1.3), (x * 1.3).clamp(0, 255))
    gray = x.mean((1, 2, 3), keepdim=True)
    close(rows(4, order=0, contrast=0.6), 0.6 * x + 0.4 * gray)
    if channels == 1:
        close(rows(4, order=0, contrast=1.4), 255 * reference.adjust_contrast(x / 255, 1.4))
    close(rows(4, sigma=1.1), reference.gaussian_blur(x, [7, 7], [1.1, 1.1]))
    close(rows(4, solarize=1), torch.minimum(x, 255 - x))
    torch.testing.assert_close(
        photometric.normalize(x, pixels), reference.normalize(x / 255, mean, std), rtol=0, atol=2e-5
    )


def test_values_of_more_bits_go_through_both_paths() -> None:
    x = torch.rand(6, 3, 20, 20) * 255
    drawn = photometric.draw(np.random.default_rng(0).random((6, photometric.DRAWS)), Augment())
    here, there = photometric._one_by_one(x, drawn), photometric._together(x, drawn)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-3)
    assert len(here.unique()) > 5000  # 20 levels are not lost to 8 bits on the way


@pytest.mark.unchecked
def test_a_normalization_for_other_channels_is_no_normalization() -> None:
    with pytest.raises(ValueError, match="zip"):
        photometric.normalize(torch.zeros(1, 4, 2, 2), RGB)


def written(path: Path, images: list[np.ndarray], kind: str = "npy", labels: bool = True) -> Path:
    path.mkdir()
    with wds.TarWriter(str(path / "a.tar")) as tar:
        for i, image in enumerate(images):
            tar.write(
                {"__key__": f"{i:03d}", kind: sources.encode(image, kind, 90), **({"cls": i % 2} if labels else {})}
            )
    return path


def test_a_loader_mixes_sources_of_several_depths(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    deep = written(tmp_path / "deep", [rng.integers(0, 4096, (24, 24, 3)).astype(np.uint16) for _ in range(6)], "tif")
    plain = written(tmp_path / "plain", [rng.integers(0, 256, (24, 24, 3)).astype(np.uint8) for _ in range(6)], "png")
    data = Data.model_validate(
        {
            "shards": [{"shards": str(deep), "range": [0, 4095]}, {"shards": str(plain)}],
            "views": {"global": {"count": 2, "size": 24, "scale": [1, 1]}, "local": {"count": 0}},
        }
    )
    plan = BatchPlan(micro_batch=4, ranks=1, accumulation=1)
    batches = []
    for workers in (0, 2):
        with Loader(open_mixture(data), data.model_copy(update={"workers": workers}), plan, seed=0) as loader:
            batches.append(next(iter(loader)))
    first, second = batches
    assert first.views[0].dtype == torch.float32
    torch.testing.assert_close(first.views[0], second.views[0], rtol=0, atol=0)
    fractions = [bool((view != view.round()).any()) for view in first.views[0][0]]
    assert any(fractions)
    assert not all(fractions)  # 8-bit images keep whole values, where a crop keeps its size
    assert float(first.views[0].amax()) > 250
    only = Data.model_validate({**data.model_dump(by_alias=True), "shards": [{"shards": str(plain)}]})
    with Loader(open_mixture(only), only, plan, seed=0) as loader:
        assert next(iter(loader)).views[0].dtype == torch.uint8


def test_arrays_are_images_where_there_are_no_pictures(tmp_path: Path) -> None:
    shard = written(tmp_path / "arrays", [BANDS] * 5)
    assert open_mixture(Data.model_validate({"shards": str(shard), "channels": 5})).num_samples == 5
    images, _ = next(iter(evaluation_batches(str(shard), image_size=64, batch_size=5, pixels=Pixels(5, TWELVE))))
    np.testing.assert_allclose(images[0], BANDS.transpose(2, 0, 1) * (255 / 4095), atol=2e-5)
    (tmp_path / "both").mkdir()
    with wds.TarWriter(str(tmp_path / "both/a.tar")) as tar:  # features beside the images that they are of
        for i in range(3):
            tar.write({"__key__": str(i), "npy": npy(np.zeros(768)), "jpg": sources.encode(RGBA8[:, :, :3], "jpg", 90)})
        tar.write({"__key__": "alone", "npy": npy(np.zeros(768))})
    mixture = open_mixture(Data.model_validate({"shards": str(tmp_path / "both")}))
    images, _ = next(iter(evaluation_batches(str(tmp_path / "both"), image_size=64, batch_size=9)))
    assert (mixture.num_samples, len(images)) == (4, 3)  # the fourth's image is missing


def test_a_folder_of_arrays_becomes_shards(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.npy").write_bytes(npy(BANDS))
    source = sources.folder(tmp_path, None, True)
    assert [(s.key, s.extension, s.label) for s in source.samples] == [("a_x", "npy", 0), ("b_x", "npy", 1)]
    (tmp_path / "a/x.png").write_bytes(pillow(Image.fromarray(RGBA8), "PNG"))
    assert [s.extension for s in sources.folder(tmp_path, None, True).samples] == ["png"]


def test_statistics_against_numpy(tmp_path: Path) -> None:
    """Also where the mean is far from 0: one pass over squares would lose the deviation."""
    rng = np.random.default_rng(0)
    images = [(60000 + rng.normal(0, 3, (31 + i, 17, 2))).round().astype(np.uint16) for i in range(7)]
    shards = written(tmp_path / "s", images, labels=False)
    every = np.concatenate([image.reshape(-1, 2) for image in images]).astype(np.float64)
    found = pixel_statistics([str(shards)], Pixels(2, ((0, 65535),)), images=100)
    assert (found.images, found.of, found.kinds, found.bits, found.clipped) == (7, 7, ["uint16"], 16, 0)
    np.testing.assert_allclose(found.mean, every.mean(0) / 65535, rtol=1e-6)
    np.testing.assert_allclose(found.std, every.std(0) / 65535, rtol=1e-3)  # float32 of 0..255
    np.testing.assert_allclose(found.quantiles[1], np.quantile(every, 0.5, axis=0), atol=1)
    np.testing.assert_allclose((found.low, found.high), (every.min(0), every.max(0)))
    assert pixel_statistics([str(shards)], Pixels(2)).mean is None
    clipped = pixel_statistics([str(shards)], Pixels(2, ((60000, 65535),)), images=100).clipped
    assert clipped == pytest.approx((every < 60000).mean(), abs=1e-9)
    exact = Moments()
    for image in images:
        exact.add(image.reshape(-1, 2).astype(np.float64))
    np.testing.assert_allclose(exact.std, every.std(0), rtol=1e-12)
    with pytest.raises(UserError, match=r"none of 7 images can be used; .*2 bands"):
        pixel_statistics([str(shards)], RGB)


def test_evaluation_takes_the_range_of_the_run() -> None:
    one = {"shards": "a", "range": [0, 4095]}
    assert of_run(Data.model_validate({"shards": [one, {**one, "shards": "b"}]})) == Pixels(3, TWELVE)
    several = Data.model_validate({"shards": [one, {"shards": "b"}]})
    with pytest.raises(
        UserError, match=re.escape("several value ranges: say which these shards have (--range LOW HIGH)")
    ):
        of_run(several)
    assert of_run(several, ((0, 1),)).range == ((0, 1),)


def test_a_channel_of_one_value_is_said_and_has_a_std_that_a_run_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [np.dstack([np.arange(100, dtype=np.uint16).reshape(10, 10), np.full((10, 10), 7, np.uint16)])] * 3
    shards = written(tmp_path / "s", images, labels=False)
    assert main(["shards", "statistics", str(shards), "--channels", "2", "--range", "0", "100"]) == 0
    printed = capsys.readouterr().out
    assert "channel 1 has one value in all of these images, 0.07 of the range" in printed
    assert "data.std=[0.2887, 1]" in printed  # sqrt((100^2 - 1) / 12) / 100, and the one that is written
