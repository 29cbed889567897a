"""One rank's micro-batch: views as they were cut, and what turns them into the encoder's input on the training device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from lejepa_scale.data.audit.keylog import Record
from lejepa_scale.data.faults import Fault
from lejepa_scale.data.images import photometric
from lejepa_scale.data.images.pixels import RGB, Pixels


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch. Views as cut, one tensor per resolution, with their colour parameters."""

    views: list[Real[Tensor, "_v b c _s _s"]]  # uint8, or float32 of 0..255
    parameters: list[Float[Tensor, "_v b p"]]  # stay on the CPU
    labels: Int[Tensor, " b"]  # -1 where unknown
    keys: list[str]
    skipped: list[Fault]  # samples that could not be used and were replaced; `keys` has what took their place
    records: list[Record]  # what was drawn, for the key log
    pixels: Pixels = RGB  # by whose mean and standard deviation they are normalized
    ready: Callable[[], list[Float[Tensor, "_v b c _s _s"]]] | None = None  # augmented views, where they are made ahead

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, as a DataLoader asks of what it hands over."""
        return replace(self, views=[v.pin_memory() for v in self.views], labels=self.labels.pin_memory())

    def augmented(self, device: torch.device) -> list[Float[Tensor, "_v b c _s _s"]]:
        """Float views on `device`, augmented and normalized there."""
        if self.ready is not None:
            return self.ready()
        out = []
        for cut, parameters in zip(self.views, self.parameters, strict=True):
            moved = cut.to(device, non_blocking=True).flatten(0, 1)
            out.append(photometric.apply(moved, parameters.flatten(0, 1), self.pixels).unflatten(0, cut.shape[:2]))
        return out
