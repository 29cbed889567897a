"""Files of a checkpoint: safetensors whose checksum is taken while they are written, and small ones written whole or not at
all. What has returned has reached the disk, or the store."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lejepa_scale.checkpoint import places
from lejepa_scale.checkpoint.places import Place, Stream

_PIECE = 1 << 24  # bytes written, and added to the checksum, at once
DTYPES = {  # the format's names
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """What a completion marker says of a file."""

    bytes: int
    crc32: int


@dataclass(frozen=True)
class Entry:
    """A tensor of a file to come, on the CPU, which is asked for when its turn has come."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    elements: Callable[[], Tensor]  # of that number and type, in any shape

    @classmethod
    def of(cls, key: str, shape: Sequence[int], elements: Tensor) -> Entry:
        """Of elements that are at hand."""
        return cls(key, tuple(shape), elements.dtype, lambda: elements)

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Place, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> Written:
    """Write tensors in their order, one in memory at a time. Raises OSError, and what asking for them does."""
    header, end = dict[str, object]({"__metadata__": {"format": "pt", **(metadata or {})}}), 0
    for entry in entries:
        begin, end = end, end + entry.bytes
        header[entry.key] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that elements are aligned
    with places.created(path) as file:
        return _written(file, chain([len(text).to_bytes(8, "little") + text], map(_bytes, entries)))


def _written(file: Stream, parts: Iterable[bytes | memoryview]) -> Written:
    size, checksum = 0, 0
    for part in parts:
        rest = memoryview(part)
        while rest:
            piece = rest[: file.write(rest[:_PIECE])]
            checksum = zlib.crc32(piece, checksum)
            size += len(piece)
            rest = rest[len(piece) :]
    return Written(size, checksum)


def _bytes(entry: Entry) -> memoryview:
    elements = entry.elements()
    if (elements.numel(), elements.dtype) != (prod(entry.shape), entry.dtype):
        raise AssertionError(f"{entry.key} is {elements.numel()} elements of {elements.dtype}, which nobody announced")
    flat = elements.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)  # type: ignore[arg-type]  # numpy of before 2.4 is no Buffer to a type checker


def write_text(path: Place, text: str) -> Written:
    """Write a small file whole or not at all, in place of what was there. Raises OSError."""
    if not isinstance(path, Path):
        path.write_bytes(text.encode())
        return Written(len(text.encode()), zlib.crc32(text.encode()))
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with places.created(unfinished) as file:
            written = _written(file, [text.encode()])
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    places.sync(path.parent)
    return written


def checksum(path: Place) -> int:
    """CRC-32. Raises OSError."""
    value = 0
    with closing(places.opened(path)) as file:
        while piece := file.read(_PIECE):
            value = zlib.crc32(piece, value)
    return value
