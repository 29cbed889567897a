"""What is in a shard: where each image's bytes lie, its key and its label. Reads a tar once, keeps a sidecar file."""

from __future__ import annotations

import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lejepa_scale.errors import UserError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff"})
_VERSION = 1


@dataclass(frozen=True)
class ShardIndex:
    """Images of one local tar: `tar[offsets[i] : offsets[i] + sizes[i]]` is the encoded image of sample `keys[i]`."""

    path: Path
    keys: np.ndarray  # unicode [n]
    offsets: np.ndarray  # int64 [n]
    sizes: np.ndarray  # int64 [n]
    labels: np.ndarray  # int64 [n], -1 where the sample has no .cls member
    nbytes: int  # of the tar, when it was indexed

    def __len__(self) -> int:
        return len(self.offsets)


def sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".index.npz")


def index_shards(paths: list[Path], *, rebuild: bool = False) -> list[ShardIndex]:
    """Load the sidecar of every shard, scanning (in parallel, with progress) those that have none or are out of date."""
    missing = [path for path in paths if rebuild or _load(path) is None]
    if missing:
        with ThreadPoolExecutor(8) as pool:
            scans = pool.map(scan, missing)
            for index in tqdm(scans, total=len(missing), desc="indexing shards", unit="shard", mininterval=1.0):
                _save(index)
    return [_load(path) or scan(path) for path in paths]  # scanned again where no sidecar could be written


def scan(path: Path) -> ShardIndex:
    """Read the headers of a tar. Refuses one that is damaged, cut short or holds no image."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            end = 0
            for member in tar:
                end = member.offset_data + -(-member.size // 512) * 512
                key, _, extension = _split(member.name)
                if not member.isfile() or not extension:
                    continue
                if extension in IMAGE_EXTENSIONS:
                    images.setdefault(key, (member.offset_data, member.size))
                elif extension == "cls":
                    labels[key] = _label(tar.extractfile(member).read(), path, key)  # type: ignore[union-attr]
    except FileNotFoundError as error:
        raise UserError(f"shard {path} does not exist. Check data.shards (and that its disk is mounted).") from error
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"shard {path} is not a readable tar file: {error}. Write it again or remove it.") from error
    nbytes = path.stat().st_size
    if not _is_closed(path, end):
        raise UserError(
            f"shard {path} is cut short: no end-of-archive block after byte {end} of {nbytes}. "
            "Copy or write it again; reading on would silently lose samples."
        )
    if not images:
        raise UserError(
            f"shard {path} holds no images (members ending in {', '.join(sorted(IMAGE_EXTENSIONS))}). "
            "Check data.shards, or write shards with tools/make_shards.py."
        )
    keys = list(images)
    spans = np.array(list(images.values()), dtype=np.int64)
    return ShardIndex(
        path, np.array(keys), spans[:, 0], spans[:, 1], np.array([labels.get(k, -1) for k in keys], np.int64), nbytes
    )


def _split(name: str) -> tuple[str, str, str]:
    """WebDataset's rule: the key ends at the first dot of the base name; the rest is the extension."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return folder + slash + stem, dot, extension.lower()


def _label(text: bytes, path: Path, key: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"shard {path}: {key}.cls holds {text[:20]!r}, not a class number.") from error


def _is_closed(path: Path, end: int) -> bool:
    with path.open("rb") as file:
        file.seek(end)
        return file.read(512) == bytes(512)


def _save(index: ShardIndex) -> None:
    target = sidecar(index.path)
    partial = target.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            np.savez(
                file,
                version=_VERSION,
                nbytes=index.nbytes,
                keys=index.keys,
                offsets=index.offsets,
                sizes=index.sizes,
                labels=index.labels,
            )
        partial.replace(target)
    except OSError:
        return  # a read-only data disk: the scan is repeated at the next start


def _load(path: Path) -> ShardIndex | None:
    try:
        with np.load(sidecar(path), allow_pickle=False) as stored:
            if stored["version"] != _VERSION or stored["nbytes"] != path.stat().st_size:
                return None
            return ShardIndex(
                path, stored["keys"], stored["offsets"], stored["sizes"], stored["labels"], int(stored["nbytes"])
            )
    except (OSError, ValueError, KeyError):
        return None
