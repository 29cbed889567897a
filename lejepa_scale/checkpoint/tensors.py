"""Tensors of a safetensors file, in pieces, from a disk or an object store: what is asked for is read, and nothing is mapped
into memory, so that a process holds no more than it has asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from lejepa_scale.checkpoint import places
from lejepa_scale.checkpoint.files import DTYPES
from lejepa_scale.checkpoint.places import Place

_OF_NAME = {name: dtype for dtype, name in DTYPES.items()}
_HEADER = 100_000_000  # bytes of it at most, as safetensors has it


class TensorFile:
    """Every tensor's bytes lie in the file, once, and are as many as its shape and dtype say, before any is read. Raises
    ValueError where that is not so; OSError, or what a store's library does."""

    def __init__(self, path: Place) -> None:
        self._file, size = places.opened(path), path.stat().st_size
        length = int.from_bytes(self._file.read(8), "little")
        if not 2 <= length <= min(size - 8, _HEADER):
            raise ValueError("it does not begin as a safetensors file does")
        header = json.loads(self._read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no table of tensors")
        found = header.pop("__metadata__", None)
        self.metadata: dict[str, str] = {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}
        self._begin, self._tensors = 8 + length, dict[str, tuple[torch.dtype, tuple[int, ...], int]]()
        ends = 0
        for name, begin, end, dtype, shape in sorted(_rows(header), key=lambda row: row[1:3]):
            if begin != ends or end - begin != prod(shape) * dtype.itemsize:
                raise ValueError(f"the bytes of {name} are not those of its shape, or another tensor's")
            self._tensors[name], ends = (dtype, shape, begin), end
        if self._begin + ends != size:
            raise ValueError(f"it has {size} bytes, and its tensors take {self._begin + ends}")

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1]

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name][0]

    def tensor(self, name: str) -> Tensor:
        """All of it."""
        return self.elements(name, 0, prod(self.shape(name))).view(self.shape(name))

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Those of the flattened tensor."""
        dtype, _, begin = self._tensors[name]
        self._file.seek(self._begin + begin + start * dtype.itemsize)
        data = self._read((stop - start) * dtype.itemsize)
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

    def close(self) -> None:
        self._file.close()

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        view, at = memoryview(data), 0
        while at < count:
            got = self._file.readinto(view[at:])
            if not got:
                raise ValueError("it ends early")
            at += got
        return data


def _rows(header: dict[str, Any]) -> Iterator[tuple[str, int, int, torch.dtype, tuple[int, ...]]]:
    for name, row in header.items():
        try:
            begin, end = (int(offset) for offset in row["data_offsets"])
            shape = tuple(int(side) for side in row["shape"])
            dtype = _OF_NAME[row["dtype"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"what it says of {name} cannot be read: {error!r}") from error
        if begin < 0 or min(shape, default=0) < 0:
            raise ValueError(f"what it says of {name} is negative")
        yield name, begin, end, dtype, shape
