"""The training device's side of the loader: views are made on a stream of their own, beside what trains."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from lejepa_scale.data.batch import Batch


class Beside:
    """A second stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def begin(self, batch: Batch) -> Batch:
        """The same batch, whose `augmented` views are being made from now on. Costs the memory of one more batch of float
        views."""
        with torch.cuda.stream(self.stream):
            views = batch.augmented(self.device)
        made = self.stream.record_event()

        def hand_over() -> list[Float[Tensor, "_v b c _s _s"]]:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(made)
            for x in views:
                x.record_stream(current)  # its memory is not reused before the trainer's kernels are done with it
            return views

        return replace(batch, ready=hand_over)
