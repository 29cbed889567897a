"""Choose the engine of a configuration."""

from __future__ import annotations

import torch

from lejepa_scale.config import BatchPlan, Config
from lejepa_scale.engine.base import Engine, Factory
from lejepa_scale.model import LeJEPA


def build_engine(
    config: Config, plan: BatchPlan, factory: Factory, device: torch.device, shapes: LeJEPA | None = None
) -> Engine:
    """The engine, holding NaN until its shards are taken in. shapes: the module on the meta device, where it is at hand.
    Raises UserError where what the engine needs is absent."""
    replicas, bf16 = config.engine.name in ("single", "ddp"), config.engine.precision == "bf16"
    if replicas and not bf16:
        from lejepa_scale.engine.ddp import ReplicaEngine

        return ReplicaEngine(factory, config, plan, device)
    if replicas or config.engine.name == "fsdp":
        from lejepa_scale.engine.fsdp import FSDPEngine

        return FSDPEngine(factory, config, device, shard_degree=1 if replicas else config.engine.shard_degree)
    from lejepa_scale.engine.zero import ZeROEngine

    return ZeROEngine(factory, config, plan, device, shapes)
