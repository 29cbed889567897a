"""Where images come from before they are shards: scenes, folders, tars, torchvision and Hugging Face datasets."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import tifffile

from lejepa_scale.data.index.scan import ARRAYS, IMAGE_EXTENSIONS, PICTURES
from lejepa_scale.data.make import synthetic
from lejepa_scale.data.make.writer import Sample
from lejepa_scale.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Samples to be written, how many (None: unknown) and the names of the classes (empty: no labels)."""

    samples: Iterator[Sample]
    total: int | None
    classes: tuple[str, ...] = ()


def scenes(
    count: int, size: int, seed: int, image_format: str, quality: int, channels: int = 3, bits: int = 8
) -> Source:
    """`count` rendered scenes of `size` px, with their classes (see synthetic.py). quality: of JPEG, 1 to 100. Raises
    UserError where the format does not hold so many channels or bits."""
    jpg, png = image_format == "jpg", image_format == "png"
    if (jpg and (channels != 3 or bits > 8)) or (png and channels not in (1, 3, 4)):
        raise UserError(
            f"--format {image_format} cannot hold {channels} channels of {bits} bits: png holds 1, 3 or 4, tif and npy any."
        )

    def samples() -> Iterator[Sample]:
        for i in range(count):
            image, label = synthetic.render(i, size, seed, channels, bits)
            yield Sample(f"{i:08d}", image_format, encode(image, image_format, quality), label)

    return Source(samples(), count, synthetic.CLASSES)


def folder(root: Path, shuffle: int | None, labelled: bool) -> Source:
    """Every image below `root`; its class is the first folder of its path, where all images lie in folders.
    shuffle: the seed of their order; None: sorted. Raises UserError where there is no image."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder.")
    paths = sorted(p for p in root.rglob("*") if p.is_file())
    parts = _images({str(p.relative_to(root)): p for p in paths})
    names, classes = _classes(list(parts), f"folder {root}", labelled)
    keys = _keys(list(parts))

    def samples() -> Iterator[Sample]:
        for name in _shuffled(list(parts), shuffle):
            yield Sample(keys[name], _extension(name), parts[name].read_bytes(), names[name])

    return Source(samples(), len(parts), classes)


def tar(path: Path, prefix: str, shuffle: int | None, labelled: bool) -> Source:
    """A plain tar of an image folder; `prefix` selects members and is cut off their names. shuffle: as for
    `folder`. Raises UserError where it is no tar or holds no image."""
    if not path.is_file():
        raise UserError(f"{path} is not a file.")
    try:
        archive = tarfile.open(path)
        members = _images(
            {
                m.name.removeprefix("./").removeprefix(prefix).lstrip("/"): m
                for m in archive.getmembers()
                if m.isfile() and m.name.removeprefix("./").startswith(prefix)
            }
        )
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a readable tar file: {error}.") from error
    names, classes = _classes(sorted(members), f"tar {path}" + (f" under {prefix}" if prefix else ""), labelled)
    keys = _keys(sorted(members))

    def samples() -> Iterator[Sample]:
        with archive:
            for name in _shuffled(sorted(members), shuffle):
                file = archive.extractfile(members[name])
                assert file is not None
                yield Sample(keys[name], _extension(name), file.read(), names[name])

    return Source(samples(), len(members), classes)


def torchvision(name: str, root: Path, split: str | None, download: bool, image_format: str, quality: int) -> Source:
    """Any torchvision dataset of (PIL image, int). Raises UserError where torchvision has no such dataset, or
    refuses to open it."""
    import torchvision.datasets as datasets

    kind = getattr(datasets, name, None)
    if kind is None:
        raise UserError(f"torchvision has no dataset {name}; see torchvision.datasets for the names.")
    arguments: dict[str, Any] = {"root": str(root)}
    parameters = kind.__init__.__code__.co_varnames
    if split is not None:
        arguments |= {"train": split == "train"} if "train" in parameters else {"split": split}
    if download and "download" in parameters:
        arguments["download"] = True
    if "root" not in parameters:
        arguments.pop("root")
    try:
        dataset = kind(**arguments)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise UserError(f"torchvision.datasets.{name}({arguments}) failed: {error}") from error

    def samples() -> Iterator[Sample]:
        for i in range(len(dataset)):
            image, label = dataset[i]
            yield Sample(
                f"{i:08d}", image_format, encode(np.asarray(image.convert("RGB")), image_format, quality), int(label)
            )

    return Source(samples(), len(dataset), tuple(str(c) for c in getattr(dataset, "classes", ())))


def huggingface(
    name: str, split: str, image_key: str, label_key: str | None, image_format: str, quality: int
) -> Source:
    """A Hugging Face dataset, streamed; encoded images are kept as they are where the dataset holds them. Raises
    UserError where the package is missing, the dataset cannot be opened or has no such column."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("this source needs the package: pip install datasets.") from error
    try:
        stream = datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # the hub client raises many kinds
        raise UserError(f"cannot open the Hugging Face dataset {name}, split {split}: {error}") from error
    if image_key not in (stream.features or {image_key: None}):
        raise UserError(f"{name} has no column {image_key}; it has {', '.join(stream.features)}. Use --image-key.")
    feature = (stream.features or {}).get(label_key)
    stream = stream.cast_column(image_key, datasets.Image(decode=False))

    def samples() -> Iterator[Sample]:
        from PIL import Image

        for i, row in enumerate(stream):
            data, label = row[image_key]["bytes"], row.get(label_key) if label_key else None
            if data is None:
                data = Path(row[image_key]["path"]).read_bytes()
            extension = (Image.open(io.BytesIO(data)).format or "").lower().replace("jpeg", "jpg")
            if extension not in IMAGE_EXTENSIONS:
                image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                extension, data = image_format, encode(image, image_format, quality)
            yield Sample(f"{i:08d}", extension, data, None if label is None else int(label))

    return Source(samples(), None, tuple(getattr(feature, "names", ()) or ()))


def encode(image: np.ndarray, image_format: str, quality: int) -> bytes:
    """[H, W, C] of uint8 or uint16, as jpg, png, tif or npy; red, green and blue come first."""
    if image_format == "npy":
        file = io.BytesIO()
        np.save(file, image)
        return file.getvalue()
    if image_format == "tif":
        file, several = io.BytesIO(), image.shape[2] > 1
        tifffile.imwrite(
            file,
            image if several else image[:, :, 0],
            photometric="rgb" if image.shape[2] == 3 else "minisblack",
            planarconfig="contig" if several else None,
            compression="deflate",
        )
        return file.getvalue()
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[image.shape[2]]  # OpenCV's
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if image_format == "jpg" else []
    _, data = cv2.imencode(f".{image_format}", np.ascontiguousarray(image[:, :, order]), options)
    return data.tobytes()


def _classes(names: list[str], where: str, labelled: bool) -> tuple[dict[str, int | None], tuple[str, ...]]:
    if not names:
        raise UserError(f"{where} holds no image ({', '.join(sorted(IMAGE_EXTENSIONS))}).")
    if not labelled or any("/" not in name for name in names):
        return dict.fromkeys(names), ()
    classes = sorted({name.split("/")[0] for name in names})
    return {name: classes.index(name.split("/")[0]) for name in names}, tuple(classes)


def _shuffled(names: list[str], seed: int | None) -> list[str]:
    if seed is None:
        return names
    return [names[i] for i in np.random.Generator(np.random.Philox(seed)).permutation(len(names))]


def _images(files: dict[str, T]) -> dict[str, T]:
    """Those that are images by their names: pictures, or arrays where there are none."""
    for kind in (PICTURES, ARRAYS):
        if found := {name: file for name, file in files.items() if _extension(name) in kind}:
            return found
    return {}


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _keys(names: list[str]) -> dict[str, str]:
    """A WebDataset key for each path: one level, no dots; numbered where `a.jpg` and `a.png` would share one."""
    taken: set[str] = set()
    keys: dict[str, str] = {}
    for name in names:
        key = plain = name.rpartition(".")[0].replace("/", "_").replace(".", "_")
        number = 2
        while key in taken:
            key, number = f"{plain}-{number}", number + 1
        taken.add(key)
        keys[name] = key
    return keys
