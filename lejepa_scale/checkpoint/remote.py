"""Tensors of a safetensors file in an object store, by rows: requests are large and in order, as the file is."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import torch
from torch import Tensor
from upath import UPath

from lejepa_scale.checkpoint import places
from lejepa_scale.checkpoint.files import DTYPES

_OF_NAME = {name: dtype for dtype, name in DTYPES.items()}


class RemoteTensors:
    """What safetensors' `safe_open` gives of a local file, as far as it is asked for. Raises what the store's library does,
    ValueError for what is no safetensors file."""

    def __init__(self, path: UPath) -> None:
        self._file = places.opened(path)
        length = int.from_bytes(self._file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("it does not begin as a safetensors file does")
        self._header: dict[str, Any] = json.loads(self._file.read(length))
        self._header.pop("__metadata__", None)
        self._begin = 8 + length

    def keys(self) -> list[str]:
        return list(self._header)

    def get_tensor(self, key: str) -> Tensor:
        tensor = _Slice(self, key)
        return tensor[0 : tensor.shape[0]] if tensor.shape else self.elements(key, 0, 1).view(())

    def get_slice(self, key: str) -> _Slice:
        return _Slice(self, key)

    def elements(self, key: str, start: int, stop: int) -> Tensor:
        """Those of the flattened tensor."""
        dtype = _OF_NAME[self._header[key]["dtype"]]
        begin = self._begin + self._header[key]["data_offsets"][0]
        self._file.seek(begin + start * dtype.itemsize)
        data = bytearray(self._file.read((stop - start) * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._header[key]["shape"])


class _Slice:
    """A tensor of which rows are read."""

    def __init__(self, tensors: RemoteTensors, key: str) -> None:
        self._tensors, self._key, self.shape = tensors, key, tensors.shape(key)

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, rows: slice) -> Tensor:
        row, start, stop = prod(self.shape[1:]), *(min(bound, self.shape[0]) for bound in (rows.start, rows.stop))
        found = self._tensors.elements(self._key, start * row, stop * row)
        return found.view(stop - start, *self.shape[1:])
