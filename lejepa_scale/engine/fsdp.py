"""Fully sharded parameters, gradients and optimizer state with FSDP2; HSDP by `engine.shard_degree`. Replicas in bf16 are
one shard each: parameters are cast once a step, the residual stream is bf16, masters and sums over ranks are fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from lejepa_scale.config import Config
from lejepa_scale.engine.base import Factory
from lejepa_scale.engine.torch_engine import TorchEngine
from lejepa_scale.engine.wrap import materialize, prepare_blocks, sharding_units, without_weights
from lejepa_scale.model import Replay
from lejepa_scale.parallel.process_group import join_alone, world_size


class FSDPEngine(TorchEngine):
    """Built on the meta device and filled with NaN, so that a weight nobody loads shows at the first step.

    Gradients are reduce-scattered in fp32 after every micro-batch: accumulation never holds whole gradients. Between
    replicas they are summed after the last one.

    shard_degree: ranks that a parameter is sharded over, a divisor of all; None: all. mesh: that of `mesh_of`, where it is
    made already.
    """

    def __init__(
        self,
        factory: Factory,
        config: Config,
        device: torch.device,
        *,
        shard_degree: int | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        module = without_weights(factory)
        prepare_blocks(module, config)
        low = torch.bfloat16 if config.engine.precision == "bf16" else None
        settings: dict[str, Any] = {"mesh": mesh or mesh_of(device, shard_degree)}
        offload = config.engine.cpu_offload
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
        if shard_degree == 1:  # casts are kept for the backward pass: there is little to save
            settings["reshard_after_forward"] = False
        units = sharding_units(module)
        for unit in units:  # the root casts what enters; rotary positions, made on the way, stay in fp32
            policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
            fully_shard(unit, mp_policy=policy, **settings)
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        fully_shard(module, mp_policy=policy, **settings)
        _prefetch(module, units, config.engine.prefetch)  # type: ignore[arg-type]
        materialize(module, device, torch.device("cpu") if offload else None)
        super().__init__(module, config, device)

    def forward(
        self, views: Sequence[Tensor], step: int | None, replay: Replay | None = None, lambda_: float | None = None
    ) -> dict[str, Tensor]:
        return self.module(views, step, replay, lambda_)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        with super().frozen():
            yield
        for module in self.module.modules():  # what a backward pass would have done
            if isinstance(module, FSDPModule):
                module.reshard()

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        self.module.set_requires_all_reduce(last_micro_batch)  # type: ignore[operator]
        loss.backward()


def mesh_of(device: torch.device, shard_degree: int | None) -> DeviceMesh:
    """All ranks, or replicas of shards. Every rank calls."""
    join_alone()
    world = world_size()
    if shard_degree is None or shard_degree == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // shard_degree, shard_degree), mesh_dim_names=("replicate", "shard"))


def _prefetch(root: FSDPModule, units: list[FSDPModule], ahead: int) -> None:
    """Start gathering the next `ahead` units before a unit computes, in both directions."""
    if not ahead:
        return
    root.set_modules_to_forward_prefetch(units[:ahead])
    for i, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[i + 1 : i + 1 + ahead])
        unit.set_modules_to_backward_prefetch(units[max(0, i - ahead) : i][::-1])
