"""How long a step will take on GPUs that nobody has at hand: matrix products at the share of a peak that they reach,
attention at its own, everything else by the bytes that it moves through memory, and what the ranks send by the slower of two
links. A forecast with its assumptions in one place, held against measured steps in docs/benchmarks.md."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from lejepa_scale.config import BatchPlan, Config
from lejepa_scale.cost.activations import activations
from lejepa_scale.cost.flops import StepFlops, meta_model, step_flops
from lejepa_scale.cost.machines import GPUS_OF_A_HOST, Machine
from lejepa_scale.cost.memory import cut
from lejepa_scale.cost.traffic import Transfer, step_traffic
from lejepa_scale.engine.muon import iteration_flops, rounds
from lejepa_scale.engine.optim import matrices
from lejepa_scale.model import LeJEPA

# What is kept of a forward pass has been written, and is read by the backward pass, whose gradients are as large;
# normalization, activations and sums of residuals pass over it again. Fitted to eager and
# compiled steps of ViT-S, ViT-L and ViT-g on an H200 (docs/benchmarks.md, 2026-11-26).
PASSES, PASSES_COMPILED, PASSES_AGAIN = 16, 11, 5  # over what a forward pass keeps; the last: to compute it again
MEMORY_SHARE, LINK_SHARE = 0.85, 0.80  # of the data sheets' rates
UPDATE_BYTES = 30  # that AdamW reads and writes of a parameter, with its copy in bf16
LAUNCH_SECONDS = (
    1.0e-3  # least time of a block's kernels, forward and backward, as the host starts them; compiled: half
)
CALL_SECONDS, HOP_SECONDS = 15e-6, 10e-6  # of a collective, and for each doubling of hosts
HIDDEN = 0.8  # share of the passes beside which collectives can go on
FASTEST, SLOWEST = 1.2, 0.7  # of the shares above, for the ends of the range


@dataclass(frozen=True)
class Forecast:
    """Seconds of a step on each rank, its parts, and between which ends it is expected."""

    products: float
    attention: float
    memory: float  # normalization, activations, residuals: what moves bytes
    update: float
    network: float  # all collectives, were none of them beside computation
    waited: float  # the part of them that nothing hides
    seconds: float
    fastest: float
    slowest: float
    flops: float  # model FLOPs on a rank
    peak: float  # of the chip, in bf16

    def mfu(self, seconds: float | None = None) -> float:
        """Model FLOPs over what the chip could have done in a step's seconds, or in others."""
        return self.flops / ((seconds or self.seconds) * self.peak)


def forecast(config: Config, plan: BatchPlan, machine: Machine) -> Forecast:
    """Of an optimizer step, for the batches of `plan` on hosts of eight such GPUs."""
    flops, transfers = step_flops(config, plan), step_traffic(config, plan)
    parts = _parts(config, plan, machine, flops)
    beside = sum(seconds_of(one, machine) for one in transfers if one.beside)
    alone = sum(seconds_of(one, machine) for one in transfers if not one.beside)
    calls = sum(one.calls for one in transfers if one.beside)
    *passes, update = parts
    computed = max(sum(passes), _least(config, plan))
    waited = alone + max(beside - HIDDEN * computed, beside / calls if calls else 0)
    return Forecast(
        *parts,
        network=beside + alone,
        waited=waited,
        seconds=computed + update + waited,
        fastest=max(sum(parts) / FASTEST, _least(config, plan)) + (alone + max(0, beside - computed)) / FASTEST,
        slowest=(computed + update + beside + alone) / SLOWEST,
        flops=flops.total,
        peak=machine.peak,
    )


def seconds_of(transfer: Transfer, machine: Machine) -> float:
    """By the slower of the links inside a host and between hosts, whose adapters share what crosses."""
    local = min(GPUS_OF_A_HOST, transfer.ranks) if transfer.near else 1
    hosts = ceil(transfer.ranks / local)
    slowest = transfer.sent / machine.inside if local > 1 else 0.0
    if hosts > 1:
        across = transfer.sent / (transfer.ranks - 1) * transfer.ranks * (hosts - 1) / hosts
        across /= 1 if transfer.collective == "all-to-all" else local  # a ring leaves a host once
        slowest = max(slowest, across / machine.outside)
    latency = CALL_SECONDS + HOP_SECONDS * ceil(log2(hosts)) if hosts > 1 else CALL_SECONDS
    return slowest / LINK_SHARE + transfer.calls * latency


def _parts(config: Config, plan: BatchPlan, machine: Machine, flops: StepFlops) -> tuple[float, float, float, float]:
    """Seconds of products, attention, memory and update."""
    again = flops.hardware / flops.total
    blocks = flops.attention_linear + flops.mlp
    fp8 = machine.peak_fp8 if config.engine.fp8 else None
    products = (flops.total - flops.attention - blocks) / machine.peak + blocks / (fp8 or machine.peak)
    model = meta_model(config)
    kind = config.engine.activation_checkpointing
    plain = config.model_copy(update={"engine": config.engine.model_copy(update={"activation_checkpointing": "none"})})
    kept = activations(plain, plan, model, packed_kernel=True).kept
    passes = PASSES_COMPILED if config.engine.compile else PASSES
    passes += 0 if kind == "none" else PASSES_AGAIN
    if flops.replayed:
        passes += PASSES_AGAIN
    ranks = {"single": 1, "ddp": 1}.get(config.engine.name, config.engine.shard_degree or plan.ranks)
    moved = machine.bandwidth * MEMORY_SHARE
    return (
        again * products / machine.product,
        again * flops.attention / (machine.peak * machine.attention),
        plan.accumulation * passes * kept / moved,
        UPDATE_BYTES * cut(model, ranks) / moved + _iterations(config, model, ranks) / (machine.peak * machine.product),
    )


def _iterations(config: Config, model: LeJEPA, ranks: int) -> int:
    """FLOPs of Muon on rank 0, which has the largest matrix of each round."""
    shapes = [p.shape for p in matrices(model).values()] if config.optim.name == "muon" else []
    return sum(iteration_flops(shapes[turn[0]]) for turn in rounds(shapes, ranks))


def _least(config: Config, plan: BatchPlan) -> float:
    """Below this the host cannot start kernels fast enough."""
    blocks = len(meta_model(config).encoder.blocks) or 16
    return plan.accumulation * blocks * LAUNCH_SECONDS * (0.5 if config.engine.compile else 1.0)
