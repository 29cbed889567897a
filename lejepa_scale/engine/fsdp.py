"""Fully sharded parameters, gradients and optimizer state with FSDP2; HSDP by `engine.shard_degree`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lejepa_scale.config import Config
from lejepa_scale.distributed import world_size
from lejepa_scale.engine.base import Factory
from lejepa_scale.engine.torch_native import TorchEngine
from lejepa_scale.engine.wrap import parameters_on_meta, sharding_units
from lejepa_scale.model import Replay


class FSDPEngine(TorchEngine):
    """Built on the meta device and filled with NaN, so that a weight nobody loads shows at the first step.

    Gradients are reduce-scattered in fp32 after every micro-batch: accumulation never holds whole gradients.
    """

    def __init__(self, factory: Factory, config: Config, device: torch.device) -> None:
        with parameters_on_meta():
            module = factory()
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if config.engine.precision == "bf16" else None, reduce_dtype=torch.float32
        )
        mesh = _mesh(device, config.engine.shard_degree)
        for unit in sharding_units(module):
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        _materialise(module, device)
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


@torch.no_grad()
def _materialise(module: nn.Module, device: torch.device) -> None:
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    for parameter in module.parameters():
        parameter.fill_(torch.nan)
