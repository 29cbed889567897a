"""What a file is: by its ending, what is taken for an image; by its first bytes, what is no tar, or a compressed one."""

from __future__ import annotations

PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif", "avif", "jp2"})
ARRAYS = frozenset({"npy"})  # images where there are no pictures; beside those, something about them
IMAGES = PICTURES | ARRAYS
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
HEAD = 512  # bytes that are looked at
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_PAGE = "is a web page, not a tar: check the address"
_OTHERS = {
    b"PK\x03\x04": "is a zip file",
    b"version https://git-lfs": "is a Git LFS pointer, not the file: run `git lfs pull` where it comes from",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive",
    b"Rar!\x1a\x07": "is a RAR archive",
    b"<!DOCTYPE": _PAGE,
    b"<html": _PAGE,
}


def compression(head: bytes) -> str | None:
    """The method by which the file is compressed, or None."""
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)


def not_a_tar(head: bytes) -> str | None:
    """What it is instead, as the rest of a sentence; None for what may be a tar, compressed or not."""
    return next((what for magic, what in _OTHERS.items() if head.startswith(magic)), None)
