"""The formulas' figures for a configuration, as one flat record."""

from __future__ import annotations

from typing import Literal

from lejepa_scale.config import Config, check_world
from lejepa_scale.cost.flops import step_flops
from lejepa_scale.cost.memory import step_memory


def describe(config: Config, ranks: int, device: Literal["cuda", "cpu"] = "cuda") -> dict[str, float | int]:
    """Tokens and FLOPs per image, FLOPs and memory of a step on each of `ranks` ranks. Raises UserError for an impossible
    number of ranks."""
    plan = check_world(config, ranks)
    flops, memory = step_flops(config, plan), step_memory(config, plan, device)
    images = plan.micro_batch * plan.accumulation
    parts = ("parameters", "gradients", "moments", "gathered", "buckets", "inputs", "activations", "working", "update")
    return {
        "images per rank and step": images,
        "tokens per image": flops.tokens / images,
        "tokens processed per image": flops.tokens_processed / images,
        "GFLOP per image": flops.total / images / 1e9,
        "hardware GFLOP per image": flops.hardware / images / 1e9,
        "TFLOP per rank and step": flops.total / 1e12,
        "GiB": memory.total / 2**30,
        **{f"GiB {part}": getattr(memory, part) / 2**30 for part in parts},
        "GiB on the host": memory.host / 2**30,
    }
