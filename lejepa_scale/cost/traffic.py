"""What the ranks of a step send one another, by formula: every collective of the engine and of the objective, with its
bytes. Left out is what is a few bytes long: norms, flags, counts."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

from lejepa_scale.config import BatchPlan, Config
from lejepa_scale.cost.activations import bytes_of_number
from lejepa_scale.cost.flops import meta_model
from lejepa_scale.cost.memory import cut, numel
from lejepa_scale.engine.muon import precision_on, rounds, sides
from lejepa_scale.engine.optim import groups, matrices
from lejepa_scale.engine.wrap import sharding_units
from lejepa_scale.engine.zero import deepspeed_config
from lejepa_scale.model import LeJEPA
from lejepa_scale.model.norm import BatchNorm
from lejepa_scale.objective import SIGReg, VISReg, WeakSIGReg

Collective = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]
_FP32 = 4
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20  # of DDP, in bytes
_ALIGNED = 2  # elements a rank's part of a group is a multiple of, in DeepSpeed


@dataclass(frozen=True)
class Transfer:
    """One kind of collective in a step. bytes: of what it gathers, scatters, sums or exchanges, whole: of all ranks' parts
    together, as if all had as much as rank 0, over all `calls`. ranks: that take part. near: they are neighbours, as many
    to a host as fit. beside: it goes on while the passes compute; else they wait for it."""

    what: str
    collective: Collective
    bytes: float
    calls: float
    ranks: int
    near: bool = True
    beside: bool = True

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, by rings: an all-reduce sends everything twice. An exchange sends each part once."""
        parts = {"all-reduce": 2.0, "all-to-all": 1 / self.ranks}
        return parts.get(self.collective, 1.0) * self.bytes * (self.ranks - 1) / self.ranks

    @property
    def handed(self) -> float:
        """Bytes that a rank hands to the collective, as `parallel.collectives.CountBytes` counts them."""
        return self.bytes / self.ranks if self.collective in ("all-gather", "all-to-all") else self.bytes


def step_traffic(config: Config, plan: BatchPlan, device: Literal["cuda", "cpu"] = "cuda") -> list[Transfer]:
    """The collectives of a step after the first; none for one rank. device: where, since Muon iterates in another precision
    on CPUs. What CPU ranks of one host exchange in shared memory is counted too."""
    if plan.ranks == 1:
        return []
    model = meta_model(config)
    engine = {"ddp": _replicas, "fsdp": _fsdp}.get(config.engine.name, _zero)
    found = [
        *engine(config, plan, model),
        *_muon(config, plan, model, device),
        *_objective(config, plan, model),
        *_normalization(config, plan, model),
    ]
    return [one for one in found if one.bytes and one.ranks > 1]


def _replicas(config: Config, plan: BatchPlan, model: LeJEPA) -> list[Transfer]:
    """Gradients in fp32, once a step: in DDP's buckets, or those of FSDP's units."""
    size = _FP32 * numel(model)
    calls = 1 + ceil(max(0, size - _FIRST_BUCKET) / _BUCKET) if bytes_of_number(config) == _FP32 else _units(model)
    return [Transfer("gradients", "all-reduce", size, calls, plan.ranks)]


def _fsdp(config: Config, plan: BatchPlan, model: LeJEPA) -> list[Transfer]:
    """Blocks are gathered in either pass, what is in no block once. Each micro-batch's gradients are reduce-scattered, and
    summed over replicas after the last one."""
    shard = config.engine.shard_degree or plan.ranks
    replicas, times = plan.ranks // shard, plan.accumulation
    whole = shard * cut(model, shard)
    blocks = shard * sum(cut(unit, shard) for unit in sharding_units(model))
    passes = 3 if _replays(config, plan) else 2
    if shard == 1:
        passes = 0
    size, depth = bytes_of_number(config), _units(model) - 1
    gathered = times * size * ((whole - blocks) + passes * blocks)
    return [
        Transfer("parameters", "all-gather", gathered, times * (1 + passes * depth), shard),
        Transfer("gradients", "reduce-scatter", times * _FP32 * whole, times * (1 + depth), shard),
        Transfer("gradients", "all-reduce", _FP32 * whole / shard, 1 + depth, replicas, near=False),
    ]


def _zero(config: Config, plan: BatchPlan, model: LeJEPA) -> list[Transfer]:
    ranks, size = plan.ranks, bytes_of_number(config)
    if config.engine.name == "zero3":
        return _zero3(config, plan, model)
    # DeepSpeed sums whole gradients and keeps a part: with stage 1 once a step, with stage 2 for each micro-batch
    bucket = deepspeed_config(config, plan, model)["zero_optimization"]["reduce_bucket_size"]
    parts = groups(model, config.optim, muons=False)
    padded = sum(_up(sum(p.numel() for p in part["params"]), _ALIGNED * ranks) for part in parts)
    own = config.engine.name == "zero1" and size < _FP32 and not config.engine.cpu_offload  # its bf16 optimizer
    times = 1 if config.engine.name == "zero1" else plan.accumulation
    summed = padded if own else numel(model)
    return [
        Transfer(
            "gradients", "all-reduce", times * _FP32 * summed, times * ceil(summed / bucket), ranks, beside=not own
        ),
        Transfer("parameters", "all-gather", size * padded, len(parts), ranks, beside=False),
    ]


def _zero3(config: Config, plan: BatchPlan, model: LeJEPA) -> list[Transfer]:
    """The last blocks of the forward pass are the first of the backward pass, and stay. What is small stays on all ranks,
    and is gathered after the update. With objective.accumulation=exact DeepSpeed foresees another order of blocks than
    the one that comes, and fetches in vain: a third more than this."""
    ranks, size, times, ahead = plan.ranks, bytes_of_number(config), plan.accumulation, config.engine.prefetch
    least = deepspeed_config(config, plan, model)["zero_optimization"]["stage3_param_persistence_threshold"]
    units = sharding_units(model)
    inside = {id(p) for unit in units for p in unit.parameters()}
    small = [p for p in model.parameters() if p.numel() < least]
    kept = sum(_up(p.numel(), ranks) for p in small)
    blocks = sum(_up(p.numel(), ranks) for unit in units for p in unit.parameters() if p.numel() >= least)
    depth, root = len(units), 0
    sizes = 1 + (config.data.views.local.count > 0)
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside and parameter.numel() >= least:
            often = sizes if "patch_embed" in name else 1
            root += (often if ahead else often + 1) * _up(
                parameter.numel(), ranks
            )  # without: nothing stays for backward
    again = max(0, depth - 1 - ahead) if ahead else depth
    passes = (depth + again + (depth if _replays(config, plan) else 0)) / max(1, depth)
    calls = passes * depth + 2 * sizes
    bucket = deepspeed_config(config, plan, model)["zero_optimization"]["reduce_bucket_size"]
    whole = sum(_up(p.numel(), ranks) for p in model.parameters())
    return [
        Transfer("parameters", "all-gather", times * size * (passes * blocks + root), times * calls, ranks),
        Transfer("small parameters", "all-gather", size * kept, len(small), ranks, beside=False),
        Transfer("gradients", "reduce-scatter", times * _FP32 * whole, times * ceil(whole / bucket), ranks),
    ]


def _muon(config: Config, plan: BatchPlan, model: LeJEPA, device: str) -> list[Transfer]:
    """Rank 0 sends its rows of all matrices, and the factor of the first of each round to all. Whole copies, which are
    shared out on CPUs alone, need no rows."""
    if config.optim.name != "muon" or not (config.engine.name == "fsdp" or _copies(config, device)):
        return []
    own = [sides(p.shape) for p in matrices(model).values()]
    if _copies(config, device):
        first = [prod(own[turn[0]]) for turn in rounds(own, plan.ranks)]
        size = precision_on(device).itemsize * plan.ranks * sum(first)
        return [Transfer("Muon's matrices", "all-gather", size, len(first), plan.ranks, beside=False)]
    shard = config.engine.shard_degree or plan.ranks
    turns = rounds(own, shard)
    handed = sum(-(-rows // shard) * columns for rows, columns in own) + sum(prod(own[turn[0]]) for turn in turns)
    size = precision_on(device).itemsize * shard * handed
    return [Transfer("Muon's matrices", "all-to-all", size, 2 * len(turns), shard, beside=False)]


def _copies(config: Config, device: str) -> bool:
    """Whether ranks hold whole matrices, and share Muon's out."""
    return device == "cpu" and config.engine.name == "ddp" and bytes_of_number(config) == _FP32


def _objective(config: Config, plan: BatchPlan, model: LeJEPA) -> list[Transfer]:
    """Of each micro-batch, or of the whole step once for each of them (objective.accumulation=exact)."""
    views, width = config.data.views.global_.count + config.data.views.local.count, config.model.projector.dim
    exact = _replays(config, plan)
    count, times = plan.micro_batch * (plan.accumulation if exact else 1), plan.accumulation
    size, ranks, regularizer = bytes_of_number(config), plan.ranks, model.loss.regularizer
    embeddings, extra = views * count * ranks * width, 2
    found = []
    if model.loss.scale_centre:
        found.append(_sum("embeddings' mean", times, views * width + 1, ranks))
        extra += 2 * views * width
    if isinstance(regularizer, WeakSIGReg):
        of_views = 1 if regularizer.joint else views
        sketch = min(width, regularizer.sketch)
        found.append(_sum("embeddings' mean", times, of_views * width + 1, ranks))
        return [*found, _sum("statistics", times, of_views * (sketch + 1) * sketch + extra + 1, ranks)]
    way = "distinct"
    if isinstance(regularizer, SIGReg):
        way = regularizer.mode(views, [count] * ranks, width, size)
    if isinstance(regularizer, SIGReg) and way == "sums":
        of_views = 1 if regularizer.joint else views
        sums = 2 * (regularizer.knots - 1) * of_views * regularizer.num_slices
        return [*found, _sum("statistics", times, sums + extra + 1, ranks)]
    found.append(Transfer("embeddings", "all-gather", times * size * embeddings, times, ranks, beside=False))
    if way == "distinct":
        sent = times * _FP32 * embeddings
        found.append(Transfer("embeddings' gradient", "reduce-scatter", sent, times, ranks, beside=False))
    of_value = {"distinct": 2 if isinstance(regularizer, VISReg) else 1, "embeddings": 0}[way]
    return [*found, _sum("statistics", times, of_value + extra, ranks)]


def _sum(what: str, times: int, numbers: int, ranks: int) -> Transfer:
    return Transfer(what, "all-reduce", times * _FP32 * numbers, times, ranks, beside=False)


def _normalization(config: Config, plan: BatchPlan, model: LeJEPA) -> list[Transfer]:
    """Statistics of batch normalizations, [1 + 2 C] forward and [2 C] backward: those of the encoder for every size of view,
    those of the projector for all views at once."""
    encoder, passes = model.encoder, plan.accumulation * (2 if _replays(config, plan) else 1)
    sizes = 1 + (config.data.views.local.count > 0)
    numbers = calls = 0
    for part, times in ((encoder, sizes * passes), (model.projector, plan.accumulation)):
        for norm in (m for m in part.modules() if isinstance(m, BatchNorm)):
            numbers += times * (4 * norm.width + 1)
            calls += 2 * times
    sent = _FP32 * plan.ranks * numbers
    return [Transfer("batch statistics", "all-gather", sent, calls, plan.ranks, beside=False)]


def _replays(config: Config, plan: BatchPlan) -> bool:
    return plan.accumulation > 1 and config.objective.accumulation == "exact"


def _units(model: LeJEPA) -> int:
    return 1 + len(sharding_units(model))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
