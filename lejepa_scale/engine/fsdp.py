"""Fully sharded parameters, gradients and optimizer state with FSDP2; HSDP by `engine.shard_degree`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from lejepa_scale.config import Config
from lejepa_scale.engine.base import Factory
from lejepa_scale.engine.torch_engine import TorchEngine
from lejepa_scale.engine.wrap import materialize, prepare_blocks, sharding_units, without_weights
from lejepa_scale.model import Replay
from lejepa_scale.parallel.process_group import world_size


class FSDPEngine(TorchEngine):
    """Built on the meta device and filled with NaN, so that a weight nobody loads shows at the first step.

    Gradients are reduce-scattered in fp32 after every micro-batch: accumulation never holds whole gradients.
    """

    def __init__(self, factory: Factory, config: Config, device: torch.device) -> None:
        module = without_weights(factory)
        prepare_blocks(module, config)
        low = torch.bfloat16 if config.engine.precision == "bf16" else None
        mesh = _mesh(device, config.engine.shard_degree)
        offload = config.engine.cpu_offload
        place = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
        units = sharding_units(module)
        for unit in units:  # the root casts what enters; rotary positions, made on the way, stay in fp32
            policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
            fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=place)
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=place)
        _prefetch(module, units, config.engine.prefetch)  # type: ignore[arg-type]
        materialize(module, device, torch.device("cpu") if offload else None)
        super().__init__(module, config, device)

    def forward(self, views: Sequence[Tensor], step: int | None, replay: Replay | None = None) -> dict[str, Tensor]:
        return self.module(views, step, replay)

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        loss.backward()


def _mesh(device: torch.device, shard_degree: int | None) -> DeviceMesh:
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
