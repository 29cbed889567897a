"""Peak rates of matrix products, as the vendors' data sheets give them: dense, with fp32 accumulation, in FLOP/s."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch


class Chip(NamedTuple):
    """A row of the table; rates in FLOP/s."""

    bf16: float
    fp8: float | None  # None: no float8 products


# By words of the name that torch gives the device; of several entries that fit, that with the most words. Data sheets often
# print rates with 2:4 sparsity, twice these.
CHIPS = {
    # NVIDIA A100 data sheet: 312 for all forms. A30, A40, A10 data sheets.
    "A100": Chip(312e12, None),
    "A30": Chip(165e12, None),
    "A40": Chip(149.7e12, None),
    "A10": Chip(125e12, None),
    # NVIDIA H100 data sheet: SXM 1,979 and 3,958, PCIe 1,513 and 3,026, NVL 1,671 and 3,341 with sparsity.
    "H100": Chip(989.4e12, 1978.9e12),
    "H100 PCIe": Chip(756e12, 1513e12),
    "H100 NVL": Chip(835.5e12, 1670.5e12),
    "GH200": Chip(989.4e12, 1978.9e12),
    # NVIDIA H200 data sheet: SXM as H100 SXM, NVL as H100 NVL.
    "H200": Chip(989.4e12, 1978.9e12),
    "H200 NVL": Chip(835.5e12, 1670.5e12),
    # NVIDIA Blackwell data sheets: HGX B200, 8 GPUs: 36 and 72 PFLOP/s; GB200 superchip, 2 GPUs: 10 and 20; with sparsity.
    "B200": Chip(2.25e15, 4.5e15),
    "GB200": Chip(2.5e15, 5e15),
    # NVIDIA L40S, L40, L4 data sheets.
    "L40S": Chip(362e12, 733e12),
    "L40": Chip(181e12, 362e12),
    "L4": Chip(121e12, 242.5e12),
    # NVIDIA Ada architecture white paper.
    "RTX 4090": Chip(165.2e12, 330.3e12),
    "RTX 6000 Ada": Chip(364.2e12, 728.5e12),
    # NVIDIA Ampere GA102 white paper.
    "RTX 3090": Chip(71e12, None),
    "RTX A6000": Chip(154.8e12, None),
    # AMD Instinct data sheets. torch sees each half of an MI250X as a device.
    "MI250X": Chip(191.5e12, None),
    "MI300X": Chip(1307.4e12, 2614.9e12),
    "MI325X": Chip(1307.4e12, 2614.9e12),
}
_OTHER_PRODUCTS = {"MIG", "Laptop", "D", "Ti"}  # a slice or a slower chip under the same name


def chip(name: str) -> Chip | None:
    """The entry for a device name such as "NVIDIA H100 80GB HBM3"; None for a chip that is not in the table."""
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    fitting = [entry for entry in CHIPS if words.issuperset(entry.split())]
    if not fitting or words & _OTHER_PRODUCTS:
        return None
    return CHIPS[max(fitting, key=lambda entry: len(entry.split()))]


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of a CUDA device in the table, else None: an unknown peak is not guessed.

    A float8 run is held against it too: only the blocks' linear layers are in float8, the others' peak is the bf16 one, and
    figures with and without float8 stay comparable (torchtitan does the same). Above 1 is then possible.
    """
    if device.type != "cuda":
        return None
    found = chip(torch.cuda.get_device_name(device))
    return found.bf16 if found else None
