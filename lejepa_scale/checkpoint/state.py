"""The training state in one layout that every engine fills and is filled from: fp32 tensors under the module's own
names, out of a checkpoint, or whole on rank 0, as a new run begins. Owns the gathering and the spreading of shards;
knows no file format."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from lejepa_scale.checkpoint.saved import Saved, advice, not_finite
from lejepa_scale.engine import Average
from lejepa_scale.engine.base import AVERAGE, KINDS_OF_MOMENTS, MOMENTUM, VALUE, Engine, Shard, full_shape
from lejepa_scale.errors import UserError
from lejepa_scale.parallel.collectives import everywhere, gather_objects, on_rank_zero
from lejepa_scale.parallel.process_group import rank, world_size


@dataclass
class CanonicalState:
    """What rank 0 holds; CPU tensors. `moments[kind][name]` is the optimizer's state, empty before the first update."""

    model: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    updates: int = 0  # optimizer updates applied: AdamW's bias correction


def gather(engine: Engine) -> CanonicalState | None:
    """The state of an engine, collected on rank 0 (None elsewhere), one tensor at a time. Every rank calls."""
    state = CanonicalState({}, updates=engine.updates())
    layout = gather_objects([(shard.start, len(shard.data)) for shard in engine.shards()])  # [ranks][shards]
    for shard, ranges in zip(engine.shards(), zip(*layout, strict=True), strict=True):
        whole = _whole(shard, ranges, engine.device)
        if whole is not None:
            group = state.model if shard.kind == VALUE else state.moments.setdefault(shard.kind, {})
            group[shard.name] = whole
    if rank() != 0:
        return None
    state.model |= {name: buffer.detach().to("cpu", copy=True) for name, buffer in engine.buffers().items()}
    return state


def _whole(shard: Shard, ranges: Sequence[tuple[int, int]], device: torch.device) -> Tensor | None:
    """The full tensor on rank 0's CPU, None elsewhere. ranges: (start, length) of every rank's part."""
    numel = torch.Size(shard.shape).numel()
    if ranges[0] == (0, numel):  # rank 0 holds it all
        parts = [shard.data]
    else:
        longest = max(length for _, length in ranges)
        padded = torch.zeros(longest, device=device)
        padded[: len(shard.data)] = shard.data
        parts = [torch.empty_like(padded) for _ in ranges] if rank() == 0 else []
        dist.gather(padded, parts or None, dst=0)
    if rank() != 0:
        return None
    whole = torch.empty(numel)
    for (start, length), part in zip(ranges, parts, strict=False):  # replicas bring the same elements again
        whole[start : start + length] = part[:length]
    return whole.view(shard.shape)


@torch.no_grad()
def spread(state: CanonicalState | None, engine: Engine) -> None:
    """Give every rank its shards of the state that rank 0 holds (None elsewhere). Every rank calls. Raises UserError
    where names or shapes are not exactly the engine's."""
    parameters = {name: full_shape(p) for name, p in engine.module.named_parameters()}
    buffers = engine.buffers()

    def header() -> tuple[bool, int]:
        assert state is not None
        expected = parameters | {name: tuple(buffer.shape) for name, buffer in buffers.items()}
        fault = _mismatch(expected, {name: tuple(t.shape) for name, t in state.model.items()})
        if fault is not None:
            raise UserError(fault)
        if state.moments and (fault := _other_optimizer(engine, state.moments.get(MOMENTUM, {}))):
            raise UserError(f"the saved state {fault}")
        return bool(state.moments), state.updates

    has_moments, updates = on_rank_zero(header, "comparing names and shapes")
    if has_moments:
        engine.prepare_moments(updates)
    for shard in list(engine.shards()):
        source = None
        if state is not None and (has_moments or shard.kind == VALUE):
            source = (state.model if shard.kind == VALUE else state.moments[shard.kind])[shard.name]
        elif not has_moments and shard.kind in KINDS_OF_MOMENTS:
            continue
        whole = _broadcast(source, shard.shape, torch.float32, engine.device).flatten()
        engine.take(Shard(shard.name, shard.kind, shard.shape, shard.start, whole[shard.start :][: len(shard.data)]))
    engine.settle()
    for name, buffer in buffers.items():
        source = None if state is None else state.model[name]
        buffer.copy_(_broadcast(source, buffer.shape, buffer.dtype, engine.device))


@torch.no_grad()
def restore(saved: Saved, engine: Engine) -> None:
    """Give every rank its shards of a checkpoint, which each reads for itself. Every rank calls. Raises UserError, on every
    rank, where names or shapes are not the engine's, a file cannot be read, or something in it is no number."""
    parameters = {name: full_shape(p) for name, p in engine.module.named_parameters()}
    buffers = engine.buffers()
    expected = parameters | {name: tuple(buffer.shape) for name, buffer in buffers.items()}

    def read() -> None:
        if fault := _mismatch(expected, saved.shapes):
            raise UserError(fault)
        if saved.moments:
            if fault := _other_optimizer(engine, saved.shapes_of(MOMENTUM)):
                raise UserError(f"checkpoint {saved.path} {fault}")
            engine.prepare_moments(saved.progress.updates)
        for shard in list(engine.shards()):
            if shard.kind in KINDS_OF_MOMENTS and not saved.moments:
                continue
            data = saved.read(shard.name, shard.kind, shard.start, len(shard.data))
            _expect_numbers(saved, f"{shard.kind} of {shard.name}", data)
            engine.take(replace(shard, data=data.to(engine.device)))
        for name, buffer in buffers.items():
            data = saved.whole(name)
            _expect_numbers(saved, name, data)
            buffer.copy_(data)

    everywhere(read, "reading the checkpoint")
    engine.settle()


@torch.no_grad()
def restore_average(saved: Saved, average: Average) -> None:
    """Give every rank its shards of the averaged weights of a checkpoint that has them, which each reads for itself. Every
    rank calls. Raises UserError, on every rank, where a file cannot be read, or something in it is no number."""

    def read() -> None:
        average.prepare(saved.progress.averaged)
        for shard in list(average.shards()):
            data = saved.read(shard.name, AVERAGE, shard.start, len(shard.data))
            _expect_numbers(saved, f"the average of {shard.name}", data)
            average.take(replace(shard, data=data))
        for name, buffer in average.buffers().items():
            data = saved.whole(name, AVERAGE)
            _expect_numbers(saved, f"the average of {name}", data)
            buffer.copy_(data)

    everywhere(read, "reading the averaged weights")


def _other_optimizer(engine: Engine, muons: Collection[str]) -> str | None:
    """What is wrong with a state that holds Muon's moment of these parameters, and AdamW's of the others."""
    if {name for name, kinds in engine.moments.items() if MOMENTUM in kinds} == set(muons):
        return None
    before, now = ("muon", "adamw") if muons else ("adamw", "muon")
    return (
        f"was trained with optim.name={before}, whose moments mean nothing to {now}. Go on with optim.name={before}, or "
        "begin a new run.dir from its encoder, with model.init_from."
    )


def _expect_numbers(saved: Saved, name: str, data: Tensor) -> None:
    if fault := not_finite([(name, data)]):
        raise UserError(f"checkpoint {saved.path} cannot be gone on from: {fault}. {advice(saved.path)}")


def _broadcast(source: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rank 0's tensor, on `device`, on every rank."""
    if source is not None:
        whole = source.to(device, dtype).contiguous()
    else:
        whole = torch.empty(tuple(shape), device=device, dtype=dtype)
    if world_size() > 1:
        dist.broadcast(whole, src=0)
    return whole


def _mismatch(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str | None:
    if expected == found:
        return None
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    both = sorted(expected.keys() & found.keys())
    shapes = [f"{n}: {found[n]} instead of {expected[n]}" for n in both if expected[n] != found[n]]
    parts = [
        f"{what} {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", extra), ("other shapes", shapes))
        if names
    ]
    return (
        f"the saved weights do not belong to this model: {'; '.join(parts)}. The model section of the configuration "
        "must be the one the checkpoint was made with."
    )
