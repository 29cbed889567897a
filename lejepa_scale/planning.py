"""What a step costs, counted before it is run."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from lejepa_scale.config import Config
from lejepa_scale.model import build

# Dense bf16 matrix peaks in FLOP/s by a part of the device name (NVIDIA data sheets, without sparsity).
PEAK_BF16 = {"B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of a CUDA device in the table, else None: an unknown peak is not guessed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


def training_flops_per_image(config: Config) -> float:
    """Forward and backward (three forwards) of encoder, projector and SIGReg's projection, over all views of an image.

    Counted by torch's flop counter on the meta device; recomputation by activation checkpointing is not work done twice
    for the result and is left out, as is usual for MFU.
    """
    views, objective = config.data.views, config.objective
    groups = [g for g in (views.global_, views.local) if g.count]
    with torch.device("meta"):
        model = build(config).eval()
        images = [torch.empty(g.count, 3, g.size, g.size) for g in groups]
        with FlopCounterMode(display=False) as counter:
            model.projector(torch.cat(model.encoder(images)))
    slices = 2 * sum(g.count for g in groups) * config.model.projector.dim * objective.num_slices
    return 3.0 * (counter.get_total_flops() + slices)
