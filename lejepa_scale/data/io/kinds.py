"""What a file is: by its ending, what is taken for an image; by its first bytes, what is no tar, or a compressed one."""

from __future__ import annotations

import shlex

from lejepa_scale.addresses import is_remote

PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif", "avif", "jp2"})
ARRAYS = frozenset({"npy"})  # images where there are no pictures; beside those, something about them
IMAGES = PICTURES | ARRAYS
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
HEAD = 512  # bytes that are looked at
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compress",
}
_UNPACKS = {"zstd": "unzstd", "lz4": "unlz4", "compress": "uncompress"}  # what Python does not
_ARCHIVE = "unpack it, and make shards of what was in it: lejepa shards make folder FOLDER --out SHARDS"
_IMAGE = "is an image, not a tar of some: make shards of its folder: lejepa shards make folder FOLDER --out SHARDS"
_PAGE = "is a web page, not a tar: check the address"
_OTHERS = {
    b"PK\x03\x04": f"is a zip file: {_ARCHIVE}",
    b"version https://git-lfs": "is a Git LFS pointer, not the file: run `git lfs pull` where it comes from",
    b"7z\xbc\xaf\x27\x1c": f"is a 7z archive: {_ARCHIVE}",
    b"Rar!\x1a\x07": f"is a RAR archive: {_ARCHIVE}",
    b"<!DOCTYPE": _PAGE,
    b"<html": _PAGE,
    b"<?xml": "is an XML document, as stores answer where they refuse: check the address and your credentials",
    b"PAR1": "is a Parquet file, not a tar",
    b"\x89HDF": "is an HDF5 file, not a tar",
    b"\xff\xd8\xff": _IMAGE,
    b"\x89PNG": _IMAGE,
    b"\x93NUMPY": "is a NumPy array, not a tar",
    b"{": "is a JSON document, not a tar",
}


def compression(head: bytes) -> str | None:
    """The method by which the file is compressed, or None."""
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)


def not_a_tar(head: bytes) -> str | None:
    """What it is instead, as the rest of a sentence; None for what may be a tar, compressed or not."""
    return next((what for magic, what in _OTHERS.items() if head.startswith(magic)), None)


def of_compressed(method: str, path: str) -> str:
    """What to do with a compressed tar, whose samples cannot be read at any place."""
    if method in _UNPACKS:
        return f"unpack it ({_UNPACKS[method]})"
    where = (
        "a copy of it: lejepa shards make tar COPY"
        if is_remote(path)
        else f"it: lejepa shards make tar {shlex.quote(path)}"
    )
    return f"unpack it, or make shards of {where} --out SHARDS"
