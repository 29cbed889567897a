"""A training step on paper: every operator that the trainer's loop launches takes as long as its products take at a GPU's
rate for products of matrices, or its bytes at its memory's, whichever is more. No GPU needed; an estimate, which says what
to shorten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.fake_cuda import Launch
from benchmarks.measure import Results, Row, run_sections
from benchmarks.trial import Recipe
from benchmarks.waits import PHASES, steps
from lejepa_scale.config import Config, check_world
from lejepa_scale.cost.chips import CHIPS
from lejepa_scale.cost.flops import step_flops


@dataclass(frozen=True)
class Rates:
    """Of one GPU, in FLOP/s and bytes/s, and the seconds that the smallest kernel takes."""

    products: float
    attention: float  # model FLOPs of both passes, of rows of a few hundred tokens and less
    memory: float
    kernel: float


# H200: one product of 8192 x 8192 matrices in bf16, and attention, forward and backward, over 14,624 tokens in images of 257
# and 50, 16 heads of 64, in 1.2 ms: both measured, docs/benchmarks.md of 2026-11-26. Of the memory's 4.8 TB/s (data sheet)
# nine tenths, as copies reach. H100: the same, but for 3.35 TB/s (data sheet).
GPUS = {
    "H200": Rates(products=730e12, attention=25e12, memory=0.9 * 4.8e12, kernel=3e-6),
    "H100": Rates(products=730e12, attention=25e12, memory=0.9 * 3.35e12, kernel=3e-6),
}


def measure(recipe: Recipe) -> Results:
    """Rows for a recipe's step on every GPU: seconds by phase and by kind, and the MFU that they come to."""
    return run_sections({"roofline": _rows(recipe.config())}, torch.device("cpu"), minutes=60)


def _rows(config: Config) -> Iterator[Row]:
    work = steps(config)[1].work  # the first makes what is kept
    plan = check_world(config, 1)
    flops = step_flops(config, plan)
    for name, rates in GPUS.items():
        attention = (flops.attention + _recomputed(config, flops.attention)) / rates.attention
        seconds = [(launch, duration(launch, rates)) for launch in work if launch.phase != "colours"]
        total = attention + sum(time for _, time in seconds)
        by_kind = {
            "products": sum(time for launch, time in seconds if launch.flops),
            "attention": attention,
            "memory": sum(time for launch, time in seconds if not launch.flops),
        }
        by_phase = {phase: sum(time for launch, time in seconds if launch.phase == phase) for phase in PHASES[1:]}
        yield {
            "case": f"{config.model.encoder}, {plan.micro_batch} images, {name} on paper",
            "ms": 1e3 * total,
            "images/s": plan.micro_batch / total,
            "MFU": flops.total / total / CHIPS[name].bf16,
            **{f"{kind}, ms": 1e3 * time for kind, time in by_kind.items()},
            **{f"{phase} without attention, ms": 1e3 * time for phase, time in by_phase.items()},
            "beside it: colours, ms": 1e3 * sum(duration(x, rates) for x in work if x.phase == "colours"),
            "GB": sum(launch.bytes for launch, _ in seconds) / 1e9,
            "TFLOP": (sum(launch.flops for launch, _ in seconds) + flops.attention) / 1e12,
        }
    yield from _largest(work, GPUS["H200"])


def duration(launch: Launch, rates: Rates) -> float:
    """Seconds of an operator; attention, which counts no FLOPs here, by its bytes alone."""
    return max(launch.flops / rates.products, launch.bytes / rates.memory, rates.kernel)


def _recomputed(config: Config, attention: int) -> float:
    """Attention's forward pass, a third of both, computed again."""
    return attention / 3 if config.engine.activation_checkpointing == "full" else 0


def _largest(work: list[Launch], rates: Rates, count: int = 12) -> Iterator[Row]:
    """The operators that take longest, by name and phase."""
    sums: dict[tuple[str, str], list[float]] = {}
    for launch in work:
        entry = sums.setdefault((launch.phase, launch.name), [0, 0, 0])
        entry[0] += 1
        entry[1] += launch.bytes
        entry[2] += duration(launch, rates)
    for (phase, name), (times, size, seconds) in sorted(sums.items(), key=lambda item: -item[1][2])[:count]:
        yield {"case": f"{phase}: {name}", "times": int(times), "GB": size / 1e9, "ms on H200 on paper": 1e3 * seconds}
