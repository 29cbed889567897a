"""Where images come from before they are shards: scenes, folders, tars, torchvision and Hugging Face datasets."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import tifffile

from lejepa_scale.data.index.passed import BESIDE, HIDDEN, LINK, NO_ENDING, OTHER, STRAY, PassedOver
from lejepa_scale.data.io.kinds import ARRAYS, HEAD, IMAGES, PICTURES, compression, not_a_tar, of_compressed
from lejepa_scale.data.make import synthetic
from lejepa_scale.data.make.writer import Sample
from lejepa_scale.errors import UserError

_OPENERS: dict[str, Callable[[Path], Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_TAKEN = 0.5  # of the images lie in folders, at least, where those are classes


@dataclass(frozen=True)
class Source:
    """Samples to be written, how many (None: unknown), the names of the classes (empty: no labels), what is passed over."""

    samples: Iterator[Sample]
    total: int | None
    classes: tuple[str, ...] = ()
    passed: PassedOver = field(default_factory=PassedOver)


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
    """Every image below `root`, links followed; its class is the first folder of its path, where images lie in folders.
    shuffle: the seed of their order; None: sorted. Raises UserError where there is no image."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder.")
    passed = PassedOver()
    files = dict(sorted(below(root, passed)))
    source = _listed(files, f"folder {root}", labelled, passed)

    def samples() -> Iterator[Sample]:
        for name in _shuffled(list(source.keys), shuffle):
            yield Sample(source.keys[name], _ending(name), files[name].read_bytes(), source.labels[name])

    return Source(samples(), len(source.keys), source.classes, passed)


def tar(path: Path, prefix: str, shuffle: int | None, labelled: bool) -> Source:
    """A tar of an image folder, plain or compressed; `prefix` selects members and is cut off their names. shuffle: as for
    `folder`. Raises UserError where it is no tar or holds no image."""
    if not path.is_file():
        raise UserError(f"{path} is not a file.")
    passed, members = PassedOver(), dict[str, tarfile.TarInfo]()
    try:
        archive = tarfile.open(fileobj=_plain(path), mode="r:")
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isdir() or not name.startswith(prefix):
                continue
            name = name.removeprefix(prefix).lstrip("/")
            if not (member.isfile() or member.islnk()):
                passed.add(LINK, name)
            elif any(_hidden(part) for part in name.split("/")):
                passed.add(HIDDEN, name)
            else:
                members[name] = member
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} is not a readable tar file: {error}.") from error
    members = dict(sorted(members.items()))
    source = _listed(members, f"tar {path}" + (f" under {prefix}" if prefix else ""), labelled, passed)

    def samples() -> Iterator[Sample]:
        with archive:
            for name in _shuffled(list(source.keys), shuffle):
                file = archive.extractfile(members[name])
                assert file is not None
                yield Sample(source.keys[name], _ending(name), file.read(), source.labels[name])

    return Source(samples(), len(source.keys), source.classes, passed)


def torchvision(name: str, root: Path, split: str | None, download: bool, image_format: str, quality: int) -> Source:
    """Any torchvision dataset of (PIL image, int). Raises UserError where torchvision has no such dataset, or
    refuses to open it."""
    import torchvision.datasets as datasets

    kind = getattr(datasets, name, None)
    if kind is None:
        raise UserError(f"torchvision has no dataset {name}; see torchvision.datasets for the names.")
    arguments: dict[str, Any] = {"root": str(root)}
    parameters = kind.__init__.__code__.co_varnames
    if split is not None and "train" in parameters:
        if split not in ("train", "test"):
            raise UserError(f"torchvision.datasets.{name} has the splits train and test, not {split}.")
        arguments["train"] = split == "train"
    elif split is not None:
        arguments["split"] = split
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
    """A Hugging Face dataset, streamed; encoded images are kept as they are where the dataset holds them. label_key: unset,
    `label` where there is such a column. Raises UserError where the package is missing, the dataset cannot be opened or has
    no such column."""
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
    columns = stream.features or {}
    if label_key is None:
        label_key = "label" if "label" in columns else None
    elif label_key not in columns:
        raise UserError(f"{name} has no column {label_key}; it has {', '.join(columns)}. Use another --label-key.")
    feature = columns.get(label_key)
    stream = stream.cast_column(image_key, datasets.Image(decode=False))

    def samples() -> Iterator[Sample]:
        from PIL import Image

        for i, row in enumerate(stream):
            data, label = row[image_key]["bytes"], row.get(label_key) if label_key else None
            if data is None:
                data = Path(row[image_key]["path"]).read_bytes()
            extension = (Image.open(io.BytesIO(data)).format or "").lower().replace("jpeg", "jpg")
            if extension not in IMAGES:
                image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                extension, data = image_format, encode(image, image_format, quality)
            yield Sample(f"{i:08d}", extension, data, label)

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


@dataclass(frozen=True)
class _Listed:
    """Images by their paths, which are the keys of both tables, in order."""

    keys: dict[str, str]
    labels: dict[str, int | None]
    classes: tuple[str, ...]


def _listed(files: Iterable[str], where: str, labelled: bool, passed: PassedOver) -> _Listed:
    """What is taken of sorted paths: pictures, or arrays where there are none; and which classes they are of."""
    by_kind = {kind: [name for name in files if _ending(name) in kind] for kind in (PICTURES, ARRAYS)}
    names = by_kind[PICTURES] or by_kind[ARRAYS]
    taken = set(names)
    for name in files:
        if name not in taken:
            ending = _ending(name)
            passed.add(BESIDE if ending in ARRAYS else OTHER if ending else NO_ENDING, name, ending)
    if not names:
        found = "; ".join(passed.lines()[:3])
        raise UserError(f"{where} holds no image ({', '.join(sorted(IMAGES))}){found and f', but {found}'}.")
    in_folders = [name for name in names if "/" in name]
    if not labelled or len(in_folders) < _TAKEN * len(names):
        return _Listed(_keys(names), dict.fromkeys(names), ())
    for name in names:
        if "/" not in name:
            passed.add(STRAY, name, _ending(name))
    classes = sorted({name.partition("/")[0] for name in in_folders})
    number = {name: i for i, name in enumerate(classes)}
    return _Listed(_keys(in_folders), {n: number[n.partition("/")[0]] for n in in_folders}, tuple(classes))


def below(
    folder: Path, passed: PassedOver, prefix: str = "", above: frozenset[Path] = frozenset()
) -> Iterator[tuple[str, Path]]:
    """Every file, with its path from the top, links followed. above: the folders on the way here, so that links back to
    them end."""
    here = folder.resolve()
    for path in sorted(folder.iterdir()):
        name = prefix + path.name
        if _hidden(path.name):
            passed.add(HIDDEN, f"{name}/" if path.is_dir() else name)
        elif path.is_dir():
            if path.resolve() in above | {here}:
                passed.add(LINK, name)
            else:
                yield from below(path, passed, f"{name}/", above | {here})
        elif path.is_file():
            yield name, path
        else:
            passed.add(LINK, name, _ending(name))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _plain(path: Path) -> IO[bytes]:
    """The file, or what it is compressed from, in a temporary one: members are read in any order. Raises UserError for what
    is known not to be a tar."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if fault := not_a_tar(head):
        raise UserError(f"{path} {fault}.")
    method = compression(head)
    if method is None:
        return path.open("rb")
    if method not in _OPENERS:
        raise UserError(
            f"{path} is compressed ({method}), which this command does not read: {of_compressed(method, '')}."
        )
    opener = _OPENERS[method]
    unpacked = tempfile.TemporaryFile()
    with opener(path) as packed:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    unpacked.seek(0)
    return unpacked


def _shuffled(names: list[str], seed: int | None) -> list[str]:
    if seed is None:
        return names
    return [names[i] for i in np.random.Generator(np.random.Philox(seed)).permutation(len(names))]


def _ending(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""


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
