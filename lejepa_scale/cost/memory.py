"""Memory of an optimizer step on one rank, by formula: what the engine holds, gathers and reduces, and what the forward pass
leaves for the backward pass. Allocated bytes: neither an allocator's unused blocks nor a driver's context are in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal
from weakref import WeakKeyDictionary

from torch import nn

from lejepa_scale.config import BatchPlan, Config
from lejepa_scale.cost.activations import activations, bytes_of_number
from lejepa_scale.cost.flops import meta_model, views_of
from lejepa_scale.engine.muon import sides
from lejepa_scale.engine.optim import matrices
from lejepa_scale.engine.wrap import sharding_units
from lejepa_scale.engine.zero import deepspeed_config
from lejepa_scale.model import LeJEPA

_FP32, _MOMENTS = 4, 8  # bytes per parameter; AdamW's two moments are in fp32, as is Muon's one
_BF16 = 2
_GATHERED_AND_COPIED = 2  # a unit in use, and the buffer that it was gathered in, kept until the next one needs it
_ALL_REDUCE = 500_000_000  # elements that DeepSpeed's stage 1 all-reduces at once


@dataclass(frozen=True)
class StepMemory:
    """Bytes on the training device, `host` apart. Not all parts are there at the same time; `total` is the most that is."""

    parameters: float  # fp32 masters, and copies in the compute precision that are always there
    gradients: float  # fp32
    moments: float
    gathered: float  # parameters in the compute precision for the time of their use: of units in flight, or of all
    buckets: float  # gradients on their way through a reduction
    inputs: float  # views, in fp32 and cast; on CUDA the next batch's too
    activations: float  # kept for the backward pass
    working: float  # beside them: recomputed activations and gradients in flight, at the worst moment
    update: float  # what the optimizer needs while it updates
    host: float  # with engine.cpu_offload
    gradients_wait: bool  # they lie in memory while a forward pass goes on; else they come as activations go

    @property
    def total(self) -> float:
        """The larger of two moments: in the passes, or in the update."""
        held = self.parameters + self.moments + self.buckets
        passes = self.gathered + self.inputs + self.activations + self.working
        if self.gradients_wait:
            return held + self.gradients + max(passes, self.update)
        return held + max(passes, self.gradients + self.update)


def step_memory(config: Config, plan: BatchPlan, device: Literal["cuda", "cpu"] = "cuda") -> StepMemory:
    """Memory of a step after the first, on a rank of `plan`. device: where, since kernels and prefetching differ.

    engine.fp8 counts as bf16, and compiled blocks as eager ones, which keep more.
    """
    model = meta_model(config)
    size, cuda = bytes_of_number(config), device == "cuda"
    packed_kernel = cuda and config.model.attention != "sdpa"
    work = activations(config, plan, model, packed_kernel)
    pixels = sum(config.data.channels * n * side**2 for n, side in views_of(config, plan.micro_batch))
    copies = (2 if cuda else 1) * _FP32 + (size if size < _FP32 else 0)
    engine = {"single": _replica, "ddp": _replica, "fsdp": _fsdp}.get(config.engine.name, _zero)
    return replace(
        engine(config, plan, model, size, cuda),
        inputs=pixels * copies,
        activations=work.kept,
        working=work.peak - work.kept,
    )


def _states(
    parameters: float,
    gradients: float,
    moments: float,
    *,
    gathered: float,
    buckets: float = 0,
    update: float = 0,
    host: float = 0,
    gradients_wait: bool = True,
) -> StepMemory:
    return StepMemory(
        parameters, gradients, moments, gathered, buckets, 0, 0, 0, update, host=host, gradients_wait=gradients_wait
    )


def _replica(config: Config, plan: BatchPlan, model: LeJEPA, size: int, cuda: bool) -> StepMemory:
    """In fp32 DDP's buckets are the gradients themselves, and stay. In bf16 replicas are FSDP's, whose casts stay."""
    count = numel(model)
    if size == _FP32:
        waits = plan.accumulation > 1 or plan.ranks > 1
        moments, update = _moments(config, model, 1, cuda)
        return _states(_FP32 * count, _FP32 * count, moments, gathered=0, update=update, gradients_wait=waits)
    states = _sharded(config, plan, model, size, 1, cuda)
    return replace(states, gathered=size * count)


def _fsdp(config: Config, plan: BatchPlan, model: LeJEPA, size: int, cuda: bool) -> StepMemory:
    return _sharded(config, plan, model, size, config.engine.shard_degree or plan.ranks, cuda)


def _sharded(config: Config, plan: BatchPlan, model: LeJEPA, size: int, ranks: int, cuda: bool) -> StepMemory:
    """Parameters are cut along their first dimension, and padded. What is in no block is gathered for the whole step."""
    ahead = config.engine.prefetch
    shard = cut(model, ranks)
    units = [cut(unit, ranks) * ranks for unit in sharding_units(model)]
    unit, root = max(units, default=0), shard * ranks - sum(units)
    gathered: float = size * (root + (_GATHERED_AND_COPIED + ahead) * unit)
    buckets = (size + _FP32) * unit + _FP32 * unit / ranks  # as computed, as reduced, and the rank's part of it
    moments, update = _moments(config, model, ranks, cuda)
    if not config.engine.cpu_offload:
        return _states(
            _FP32 * shard,
            _FP32 * shard,
            moments,
            gathered=gathered,
            buckets=buckets,
            update=update,
            gradients_wait=plan.accumulation > 1,
        )
    gathered += (_FP32 + size) * (1 + ahead) * unit / ranks  # shards on their way from the host
    return _states(0, 0, 0, gathered=gathered, buckets=buckets, update=update, host=2 * _FP32 * shard + moments)


def _zero(config: Config, plan: BatchPlan, model: LeJEPA, size: int, cuda: bool) -> StepMemory:
    """DeepSpeed's parameters in the compute precision, beside fp32 masters of a rank's part, in every precision."""
    count, part = numel(model), -(-numel(model) // plan.ranks)
    unit = max((numel(unit) for unit in sharding_units(model)), default=count)
    settings = deepspeed_config(config, plan, model)["zero_optimization"]
    stage, offload = settings["stage"], config.engine.cpu_offload
    bucket = _FP32 * settings["reduce_bucket_size"]  # allocated whole
    host = (2 * _FP32 + _MOMENTS) * part if offload else 0
    masters, gradients, moments = (0, 0, 0) if offload else (_FP32 * part, _FP32 * part, _MOMENTS * part)
    if stage == 3:
        live = settings["stage3_max_live_parameters"] + unit  # with the buffer that one was gathered in
        return _states(
            masters + (0 if offload else size * part),
            gradients,
            moments,
            gathered=size * min(live, 2 * count),
            buckets=bucket + min(bucket, _FP32 * count),  # reduced from a copy
            update=_FP32 * min(settings["sub_group_size"], part),
            host=host + (size * part if offload else 0),
        )
    buckets = float(bucket * (2 if cuda else 1))  # two in turns where reductions overlap with the backward pass
    own = stage == 1 and size < _FP32 and not offload  # an optimizer of its own, which keeps whole gradients
    if own:
        buckets = float(_FP32 * min(_ALL_REDUCE, count))
    if own or (stage == 1 and plan.accumulation > 1):  # reduced with the last micro-batch
        gradients = _FP32 * count
    update = 0 if offload else _FP32 * part
    return _states(size * count + masters, gradients, moments, gathered=0, buckets=buckets, update=update, host=host)


def _moments(config: Config, model: LeJEPA, ranks: int, cuda: bool) -> tuple[float, float]:
    """Bytes of a rank's moments, and what Muon takes at once beside them: momentum ahead of a round's matrices, a rank's
    parts of which are as much as the largest of them is whole; that in the iteration's precision, before and after a step
    of it and, where it is a copy, as it came; its Gram matrices."""
    both = float(_MOMENTS * cut(model, ranks))
    if config.optim.name != "muon":
        return both, 0.0
    own = [sides(p.shape) for p in matrices(model).values()]
    one = both - (_MOMENTS - _FP32) * sum(-(-rows // ranks) * columns for rows, columns in own)
    largest, side = max(map(prod, own)), max(map(min, own))
    size = _BF16 if cuda else _FP32
    copies = 3 if cuda or ranks > 1 else 2
    return one, copies * size * largest + 2 * size * side**2 + _FP32 * largest


def numel(module: nn.Module) -> int:
    return sum(map(prod, _shapes(module)))


def cut(module: nn.Module, ranks: int) -> int:
    """Elements of one rank's shards."""
    return sum(-(-shape[0] // ranks) * prod(shape[1:]) for shape in _shapes(module))


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """Of all parameters of `meta_model`'s module or a part of it, which nobody changes: walked once, for plans ask often."""
    if module not in _walked:
        _walked[module] = [tuple(p.shape) for p in module.parameters()]
    return _walked[module]


_walked: WeakKeyDictionary[nn.Module, list[tuple[int, ...]]] = WeakKeyDictionary()
