"""Files of a checkpoint: safetensors whose checksum is taken while they are written, and small ones written whole or not at
all. What has returned has reached the disk, or the store."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from lejepa_scale.checkpoint import places
from lejepa_scale.checkpoint.places import Place

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


def write_safetensors(path: Place, tensors: Sequence[tuple[str, Sequence[int], Tensor]]) -> Written:
    """Write (key, shape, elements) in their order, elements on the CPU. Raises OSError."""
    header, end = dict[str, object]({"__metadata__": {"format": "pt"}}), 0
    for key, shape, elements in tensors:
        begin, end = end, end + elements.numel() * elements.element_size()
        header[key] = {"dtype": DTYPES[elements.dtype], "shape": list(shape), "data_offsets": [begin, end]}
        assert elements.numel() == prod(shape), f"{key} has {elements.numel()} elements, not those of {list(shape)}"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that elements are aligned
    with places.created(path) as file:
        return _written(file, [len(text).to_bytes(8, "little") + text, *(_bytes(x) for _, _, x in tensors)])


def _written(file: IO[bytes], parts: Iterable[bytes | memoryview]) -> Written:
    size, checksum = 0, 0
    for part in parts:
        rest = memoryview(part)
        while rest:
            piece = rest[: file.write(rest[:_PIECE])]
            checksum = zlib.crc32(piece, checksum)
            size += len(piece)
            rest = rest[len(piece) :]
    return Written(size, checksum)


def _bytes(elements: Tensor) -> memoryview:
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
    with places.opened(path) as file:
        while piece := file.read(_PIECE):
            value = zlib.crc32(piece, value)
    return value
