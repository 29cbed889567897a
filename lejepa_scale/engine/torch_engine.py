"""What the engines made of torch alone share: AdamW on fp32 parameters, a finite check that nobody waits for, shards by
name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from lejepa_scale.config import Config
from lejepa_scale.engine.base import MOMENTS, VALUE, Engine, Shard, Update, full_shape
from lejepa_scale.engine.optim import adamw, leave_out, set_hyperparameters
from lejepa_scale.model import LeJEPA


class TorchEngine(Engine):
    def __init__(self, module: LeJEPA, config: Config, device: torch.device) -> None:
        self.module, self.device = module, device
        self.optimizer = adamw(module, config.optim)
        self.clip_norm = config.optim.clip_norm

    def step(self, lr: float, weight_decay: float) -> Update:
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = torch.isfinite(norm)
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        set_hyperparameters(self.optimizer, lr, weight_decay)
        leave_out(self.optimizer, ~finite)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm.to(self.device), finite.to(self.device))

    def shards(self) -> Iterator[Shard]:
        kinds = [VALUE, *(MOMENTS if self.updates() else ())]
        for name, parameter in self.module.named_parameters():
            for kind in kinds:
                yield Shard(name, kind, full_shape(parameter), _start(parameter), self._part(parameter, kind))

    @torch.no_grad()
    def take(self, shard: Shard) -> None:
        self._part(self.module.get_parameter(shard.name), shard.kind).copy_(shard.data)

    def settle(self) -> None:
        """Parameters are used as they are."""

    def _part(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """The live elements of this rank, flat."""
        tensor = parameter.detach() if kind == VALUE else self.optimizer.state[parameter][kind]
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)

    def prepare_moments(self, updates: int) -> None:
        for parameter in self._trained():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(updates), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def updates(self) -> int:
        states = [self.optimizer.state[p] for p in self._trained() if p in self.optimizer.state]
        return int(states[0]["step"]) if states else 0

    def _trained(self) -> Iterator[nn.Parameter]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def close(self) -> None:
        del self.module, self.optimizer


def _start(parameter: nn.Parameter) -> int:
    """FSDP cuts along the first dimension, in pieces of equal size but for the last ranks', which may be empty."""
    if not isinstance(parameter, DTensor):
        return 0
    axis = next(i for i, placement in enumerate(parameter.placements) if isinstance(placement, ShardPlacement))
    rows = parameter.shape[0]
    rows_of_a_rank = -(-rows // parameter.device_mesh.size(axis))
    first = min(rows, rows_of_a_rank * parameter.device_mesh.get_local_rank(axis))
    return first * (parameter.numel() // rows if rows else 0)
