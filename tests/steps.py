"""The trainer's step on tensors: what every test of a step calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lejepa_scale.config import BatchPlan, Config, check_world
from lejepa_scale.engine import Engine
from lejepa_scale.parallel import process_group
from lejepa_scale.training.start import start_engine
from lejepa_scale.training.step import StepResult, train_step

CPU = torch.device("cpu")


def start(config: Config, device: torch.device = CPU, **arguments: Any) -> tuple[Engine, BatchPlan]:
    """The engine of a configuration on the ranks that there are, at the seed's weights, and its plan."""
    plan = check_world(config, process_group.world_size())
    return start_engine(config, plan, device, **arguments), plan


def take_step(
    engine: Engine,
    plan: BatchPlan,
    micro_batches: Iterable[Sequence[Tensor]],
    number: int = 0,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    exact: bool = False,
    **arguments: Any,
) -> StepResult:
    """One step on views that lie ready."""
    makers = [lambda views=views: views for views in micro_batches]
    numbers = {"number": number, "seed": 0, "lr": lr, "weight_decay": weight_decay}
    return train_step(engine, plan, makers, exact=exact, **numbers, **arguments)  # type: ignore[arg-type]


def of_this_rank(views: Sequence[Tensor], plan: BatchPlan) -> list[list[Tensor]]:
    """The micro-batches of this rank, cut from views [V, B, 3, H, W] of the whole batch in the order of the data."""
    size, cut = plan.micro_batch, []
    for micro in range(plan.accumulation):
        start = (micro * plan.ranks + process_group.rank()) * size
        cut.append([v[:, start : start + size].contiguous() for v in views])
    return cut
