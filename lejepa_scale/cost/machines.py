"""Hosts that people train on: what a GPU holds, how fast its memory and its links are, by data sheets, and how much of a
peak real kernels reach. Rates are of one GPU and one direction."""

from __future__ import annotations

from dataclasses import dataclass

from lejepa_scale.cost.chips import CHIPS
from lejepa_scale.errors import UserError

GPUS_OF_A_HOST = 8


@dataclass(frozen=True)
class Machine:
    """A host of eight such GPUs, as the vendors' own systems are."""

    chip: str  # as CHIPS has it
    memory: float  # bytes that torch reports
    bandwidth: float  # bytes/s of that memory
    inside: float  # bytes/s to the other GPUs of the host
    outside: float  # bytes/s to other hosts: one network adapter a GPU
    product: float  # share of the bf16 peak that large matrix products reach
    attention: float  # likewise, attention forward and backward at the lengths of views
    sources: str  # whose figures these are

    @property
    def peak(self) -> float:
        """bf16 FLOP/s."""
        return CHIPS[self.chip].bf16

    @property
    def peak_fp8(self) -> float | None:
        """float8 FLOP/s; None without such products."""
        return CHIPS[self.chip].fp8


# Memory, bandwidth and links: data sheets of A100 80GB SXM, H100 SXM, H200 SXM, HGX B200 and Instinct MI300X; networks: DGX
# A100 (8 x 200 Gb/s), DGX H100, H200 and B200, and MI300X platforms (8 x 400 Gb/s).
# Products: H200 730 of 989 TFLOP/s, measured (docs/benchmarks.md, 2026-11-26), and H100, the same chip with less power to
# spare, 0.68; A100, B200 and MI300X are estimates from what their users publish. Attention: FlashAttention-2's paper (arXiv
# 2307.08691) has 0.5 to 0.7 of an A100 at long rows, FlashAttention-3's (arXiv 2407.08608) 0.35 for version 2 on an H100;
# views are short rows.
MACHINES = {
    "a100": Machine("A100", 79.1 * 2**30, 2.039e12, 300e9, 25e9, 0.80, 0.40, "A100 80GB SXM, DGX A100"),
    "h100": Machine("H100", 79.6 * 2**30, 3.35e12, 450e9, 50e9, 0.68, 0.30, "H100 SXM, DGX H100"),
    "h200": Machine("H200", 140.4 * 2**30, 4.8e12, 450e9, 50e9, 0.74, 0.30, "H200 SXM, DGX H200"),
    "b200": Machine("B200", 179.0 * 2**30, 7.7e12, 900e9, 50e9, 0.70, 0.25, "HGX B200"),
    "mi300x": Machine("MI300X", 192.0 * 2**30, 5.3e12, 448e9, 50e9, 0.50, 0.25, "Instinct MI300X platform"),
}


def machine(name: str) -> Machine:
    """The host for a chip's name. Raises UserError for one that is not in the table."""
    found = MACHINES.get(name.lower())
    if found is None:
        raise UserError(f"--chip {name}: there are figures for {', '.join(MACHINES)}.")
    return found
