"""Choose the engine of a configuration and give it its first weights."""

from __future__ import annotations

import torch

from lejepa_scale.checkpoint.state import CanonicalState
from lejepa_scale.config import BatchPlan, Config
from lejepa_scale.engine.base import Engine, Factory
from lejepa_scale.parallel.process_group import rank


def build_engine(
    config: Config, plan: BatchPlan, factory: Factory, device: torch.device, state: CanonicalState | None
) -> Engine:
    """`state` (rank 0's; None elsewhere or for a new run) or, for a new run, the seed's weights: the same for every
    engine and number of ranks, drawn once on rank 0's CPU and distributed."""
    engine = _construct(config, plan, factory, device)
    if rank() == 0 and state is None:
        state = initial_state(config.run.seed, factory)
    engine.load(state)
    return engine


def initial_state(seed: int, factory: Factory) -> CanonicalState:
    torch.manual_seed(seed)
    return CanonicalState(dict(factory().state_dict()))


def _construct(config: Config, plan: BatchPlan, factory: Factory, device: torch.device) -> Engine:
    if config.engine.name in ("single", "ddp"):
        from lejepa_scale.engine.ddp import ReplicaEngine

        return ReplicaEngine(factory, config, plan, device)
    if config.engine.name == "fsdp":
        from lejepa_scale.engine.fsdp import FSDPEngine

        return FSDPEngine(factory, config, device)
    from lejepa_scale.engine.zero import ZeROEngine

    return ZeROEngine(factory, config, plan, device)
