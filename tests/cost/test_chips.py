"""Device names and their peaks."""

from __future__ import annotations

import pytest
import torch

from lejepa_scale.cost import chip, peak_flops


def test_chips_are_told_apart_by_name() -> None:
    peaks = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989.4e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835.5e12,
        "NVIDIA H200": 989.4e12,
        "NVIDIA GH200 480GB": 989.4e12,
        "NVIDIA B200": 2.25e15,
        "NVIDIA GB200": 2.5e15,
        "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA GeForce RTX 4090": 165.2e12,
        "AMD Instinct MI300X": 1307.4e12,
    }
    for name, peak in peaks.items():
        found = chip(name)
        assert found is not None
        assert found.bf16 == peak, name
        assert found.fp8 is None or 1.9 < found.fp8 / found.bf16 < 2.1


@pytest.mark.parametrize(
    "name", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla V100-SXM2-16GB", "H1000"]
)
def test_other_chips_have_no_peak(name: str) -> None:
    assert chip(name) is None


def test_a_peak_that_is_not_known_is_not_guessed() -> None:
    assert peak_flops(torch.device("cpu")) is None
