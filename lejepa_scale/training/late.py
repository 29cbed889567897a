"""Numbers on their way from the device to the host, read a step later: by then they are there, and nobody has waited."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor


class Late:
    """A copy of tensors on the host, in double, which is under way until `read` is called. The tensors may change or go as
    soon as this is made. On a CPU the copy is there at once."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        packed = torch.cat([tensor.detach().to(torch.float64).flatten() for tensor in tensors.values()])
        self._copied: torch.cuda.Event | None = None
        if packed.is_cuda:
            self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host = packed

    def read(self) -> dict[str, Tensor]:
        """By name, in their shapes. Waits where the device is not there yet."""
        if self._copied is not None:
            self._copied.synchronize()
        parts = self._host.split([prod(shape) for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
