"""A step of the real model and engine on tensors without memory, among ranks that are not there: what it computes, sends and
keeps, beside what the formulas of lejepa_scale/cost say of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lejepa_scale.config import BatchPlan, Config, changed
from lejepa_scale.cost import step_flops, step_memory
from lejepa_scale.cost.traffic import step_traffic
from lejepa_scale.cpu.compiler import without_kernels
from lejepa_scale.engine.ddp import ReplicaEngine
from lejepa_scale.engine.fsdp import FSDPEngine, mesh_of
from lejepa_scale.engine.torch_engine import TorchEngine
from lejepa_scale.engine.wrap import without_weights
from lejepa_scale.errors import UserError
from lejepa_scale.model import build
from lejepa_scale.parallel import collectives
from lejepa_scale.training.step import train_step

Row = dict[str, Any]
_CPU = torch.device("cpu")
_WARM = 2  # steps before the traced one: the first makes the optimizer's moments


def trace(config: Config, plan: BatchPlan) -> list[Row]:
    """Rows of what is counted, as the formulas have it and as a traced step has it. Raises UserError for DeepSpeed's
    engines, whose own code needs real numbers, and inside a process group."""
    if config.engine.name.startswith("zero"):
        raise UserError(
            f"engine.name={config.engine.name} cannot be traced: DeepSpeed looks at numbers, of which there are none here. "
            "Its formulas are held against real ranks in the tests; engine.name=fsdp can be traced."
        )
    if _plain(config) and plan.ranks > 1:
        raise UserError(
            "engine.name=ddp in fp32 cannot be traced: DDP's buckets are memory. What it sends is the gradients, once: "
            "engine.name=fsdp, or engine.precision=bf16, can be traced."
        )
    config = changed(config, {"engine.compile": False, "engine.fp8": False})  # neither is for tensors without memory
    flops, memory = step_flops(config, plan), step_memory(config, plan, "cpu")
    transfers = step_traffic(config, plan, "cpu")  # in which Muon iterates in fp32
    module = without_weights(lambda: build(config))  # timm's constructors look at numbers
    with _ranks(plan.ranks):
        degree = 1 if config.engine.name in ("single", "ddp") else config.engine.shard_degree
        mesh = None if _plain(config) else mesh_of(_CPU, degree)  # which holds numbers
        with FakeTensorMode(allow_non_fake_inputs=True):
            if mesh is None:
                engine: TorchEngine = ReplicaEngine(lambda: module, config, plan, _CPU)
            else:
                engine = FSDPEngine(lambda: module, config, _CPU, shard_degree=degree, mesh=mesh)
            traced = _step(config, plan, engine)
    sent = Counter[str]()
    for one in transfers:
        sent[one.collective] += round(one.handed)
    rows = [
        _row("TFLOP", flops.hardware / 1e12, traced["flops"] / 1e12),
        _row("GiB", memory.total / 2**30, traced["peak"] / 2**30),
    ]
    kinds = {
        "all-gather": "allgather_base",
        "reduce-scatter": "reduce_scatter",
        "all-reduce": "allreduce",
        "all-to-all": "alltoall",
    }
    for collective, kind in kinds.items():
        handed = sum(size for name, size in traced["calls"] if name.startswith(kind))
        if sent[collective] or handed:
            rows.append(_row(f"GB handed to {collective}", sent[collective] / 1e9, handed / 1e9))
    return rows


def _of_attention(query: tuple[int, ...], key: tuple[int, ...]) -> int:
    return 4 * prod(query) * key[-2]


def _forward(query: Any, key: Any, *_: Any, **__: Any) -> int:
    return _of_attention(query, key)


def _backward(_: Any, query: Any, key: Any, *__: Any, **___: Any) -> int:
    return 2 * _of_attention(query, key)


# torch's counter does not know attention on CPUs; the backward pass is twice the forward's, as in cost/flops.py
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


def _plain(config: Config) -> bool:
    """Whether replicas are torch's own (engine/ddp.py)."""
    return config.engine.name in ("single", "ddp") and config.engine.precision == "fp32"


def _row(what: str, formula: float, traced: float) -> Row:
    ratio = formula / traced if traced else float("nan")
    return {
        "of a step and a rank": what,
        "formula": f"{formula:.4g}",
        "traced": f"{traced:.4g}",
        "ratio": f"{ratio:.4f}",
    }


def _step(config: Config, plan: BatchPlan, engine: TorchEngine) -> dict[str, Any]:
    from torch.distributed._tools.mem_tracker import MemTracker

    views = config.data.views

    def batch() -> list[Tensor]:
        groups = [group for group in (views.global_, views.local) if group.count]
        return [torch.empty(g.count, plan.micro_batch, config.data.channels, g.size, g.size) for g in groups]

    tracker = MemTracker()

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        if name != "backward":  # the tracker's figures of modules are those of one pass
            tracker.reset_mod_stats()
        yield

    def step(number: int) -> None:
        held = [batch() for _ in range(plan.accumulation)]
        train_step(
            engine, plan, [partial(list, one) for one in held], number=number, seed=0, lr=1e-3, weight_decay=0.05,
            exact=config.objective.accumulation == "exact", phase=phase,
        )  # fmt: skip

    for number in range(_WARM):
        step(number)
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as flops, collectives.CountBytes() as sent:
        step(_WARM)
    tracker.track_external(engine.module, engine.optimizer)
    with tracker:
        step(_WARM + 1)
    peak = tracker.get_tracker_snapshot("peak")
    return {"flops": flops.get_total_flops(), "calls": sent.calls, "peak": max(of["Total"] for of in peak.values())}


@contextmanager
def _ranks(count: int) -> Iterator[None]:
    """Rank 0 of `count`, whose collectives move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("a step is traced outside a process group: start this without a launcher.")
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        with collectives.without_shared_memory(), without_kernels():
            yield
    finally:
        dist.destroy_process_group()
