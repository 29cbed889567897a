"""Figures of cost against what vendors and papers print."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import small_config  # configuration keys: model.*, data.views, engine.*

from lejepa_scale.config import BatchPlan, check_world, validate
from lejepa_scale.cost import chip, step_flops, step_memory
from lejepa_scale.objective.comm_cost import traffic

# Data sheets, dense: name as torch gives it, TFLOP/s of bf16 and of fp8.
DATA_SHEETS = {
    "NVIDIA A100-SXM4-80GB": (312, None),
    "NVIDIA A30": (165, None),
    "NVIDIA A40": (149.7, None),
    "NVIDIA A10": (125, None),
    "NVIDIA H100 80GB HBM3": (1979 / 2, 3958 / 2),
    "NVIDIA H100 PCIe": (1513 / 2, 3026 / 2),
    "NVIDIA H100 NVL": (1671 / 2, 3341 / 2),
    "NVIDIA GH200 480GB": (1979 / 2, 3958 / 2),
    "NVIDIA H200": (1979 / 2, 3958 / 2),
    "NVIDIA H200 NVL": (1671 / 2, 3341 / 2),
    "NVIDIA B200": (36_000 / 2 / 8, 72_000 / 2 / 8),
    "NVIDIA GB200": (10_000 / 2 / 2, 20_000 / 2 / 2),
    "NVIDIA L40S": (362, 733),
    "NVIDIA L40": (181, 362),
    "NVIDIA L4": (242 / 2, 485 / 2),
    "NVIDIA GeForce RTX 4090": (330.3 / 2, 660.6 / 2),
    "NVIDIA RTX 6000 Ada Generation": (728.5 / 2, 1457 / 2),
    "NVIDIA GeForce RTX 3090": (142 / 2, None),
    "NVIDIA RTX A6000": (309.7 / 2, None),
    "AMD Instinct MI250X": (383 / 2, None),  # two devices
    "AMD Instinct MI300X": (1307.4, 2614.9),
    "AMD Instinct MI325X": (1307.4, 2614.9),
}


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_peaks_are_those_of_the_data_sheets(name: str) -> None:
    found = chip(name)
    assert found is not None, name
    bf16, fp8 = DATA_SHEETS[name]
    assert found.bf16 / 1e12 == pytest.approx(bf16, rel=1e-3)
    assert (found.fp8 and found.fp8 / 1e12) == (fp8 and pytest.approx(fp8, rel=1e-3))


def config_of(encoder: str, **sections: Any) -> Any:
    views = {
        "global": {"count": 2, "size": 224, "scale": [0.5, 1]},
        "local": {"count": 0, "size": 96, "scale": [0.1, 0.3]},
    }
    tree = small_config("u", "s", model={"encoder": encoder, "options": {}}, **sections)
    return validate({**tree, "data": {"shards": "s", "views": views}})


@pytest.mark.parametrize(("encoder", "gmacs"), [
    ("deit_small_patch16_224", 4.61), ("vit_base_patch16_224", 17.58), ("vit_large_patch16_224", 61.60),
])  # fmt: skip
def test_flops_of_an_image_are_the_published_ones(encoder: str, gmacs: float) -> None:
    """Multiply-accumulates of a forward pass at 224 pixels, as DeiT's paper and timm's tables print them."""
    flops = step_flops(config_of(encoder), BatchPlan(micro_batch=1, ranks=1, accumulation=1))
    forward = (flops.attention + flops.attention_linear + flops.mlp) / 3 + (flops.patch_embedding + flops.positions) / 2
    assert forward / 2 / 2 / 1e9 == pytest.approx(gmacs, rel=0.005)  # two views, two FLOPs


def test_states_take_16_bytes_a_parameter() -> None:
    """ZeRO's paper (arXiv 1910.02054) counts 16 bytes for Adam: weights, gradient, moments; here 4 + 4 + 8 in fp32."""
    config = config_of("vit_base_patch16_224")
    memory = step_memory(config, check_world(config, 1), "cpu")
    parameters = memory.parameters / 4
    assert parameters == pytest.approx(86e6, rel=0.02)  # and a projector of 0.06 M
    assert memory.parameters + memory.gradients + memory.moments == 16 * parameters


@pytest.mark.parametrize("world", [2, 8])
def test_bytes_of_ring_collectives(world: int) -> None:
    """An all-gather sends W - 1 blocks, a reduce-scatter the same in fp32, an all-reduce 2 (W - 1) / W of its length."""
    found = traffic(4, [32] * world, 48, slices=256, knots=17, itemsize=2)
    values = 4 * 32 * 48
    assert found.sums == 2 * (world - 1) * 4 * (2 * 4 * 256 * 16) // world
    assert found.embeddings == (world - 1) * 2 * values
    assert found.distinct == (world - 1) * (2 + 4) * values


@pytest.mark.parametrize(("slices", "cheapest"), [(200, "sums"), (300, "distinct")])
def test_the_cheaper_of_sums_and_rows_is_taken(slices: int, cheapest: str) -> None:
    """Two ranks in fp32: sums send 128 bytes a direction, 64 rows of 64 are sent and their gradients, 8 x 64 x 64 bytes. The
    two are equal at 256 directions."""
    assert traffic(1, [64, 64], 64, slices=slices, knots=17).cheapest == cheapest
