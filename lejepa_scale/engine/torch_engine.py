"""What the engines made of torch alone share: AdamW and Muon on fp32 parameters, a finite check without a wait, shards by
name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from lejepa_scale.config import Config
from lejepa_scale.engine.base import VALUE, Engine, Shard, Update, full_shape
from lejepa_scale.engine.optim import adamw, leave_out, moments, muon, set_hyperparameters
from lejepa_scale.model import LeJEPA


class TorchEngine(Engine):
    def __init__(self, module: LeJEPA, config: Config, device: torch.device, *, copies: bool = False) -> None:
        """copies: all ranks hold the whole module."""
        self.module, self.device = module, device
        # Between GPUs factors travel as long as all of them take to make: each makes all.
        shared = copies and device.type == "cpu"
        self.optimizer, self.muon = adamw(module, config.optim), muon(module, config.optim, copies=shared)
        self.moments = moments(module, config.optim)
        self.clip_norm = config.optim.clip_norm

    def step(self, lr: float, weight_decay: float) -> Update:
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = torch.isfinite(norm)
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        for optimizer in self._optimizers():
            set_hyperparameters(optimizer, lr, weight_decay)
            leave_out(optimizer, ~finite)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return Update(norm.to(self.device), finite.to(self.device))

    def shards(self) -> Iterator[Shard]:
        updated = self.updates() > 0
        for name, parameter in self.module.named_parameters():
            for kind in (VALUE, *(self.moments[name] if updated else ())):
                yield Shard(name, kind, full_shape(parameter), _start(parameter), self._part(parameter, kind))

    @torch.no_grad()
    def take(self, shard: Shard) -> None:
        self._part(self.module.get_parameter(shard.name), shard.kind).copy_(shard.data)

    def settle(self) -> None:
        """Parameters are used as they are."""

    def _part(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """The live elements of this rank, flat."""
        tensor = parameter.detach() if kind == VALUE else self._state(parameter)[kind]
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)

    def prepare_moments(self, updates: int) -> None:
        for parameter in self._trained():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(updates), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        if self.muon is not None:
            self.muon.prepare_moments()

    def updates(self) -> int:
        states = [self.optimizer.state[p] for p in self._trained() if p in self.optimizer.state]
        return int(states[0]["step"]) if states else 0

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer, *([self.muon] if self.muon is not None else [])]

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        held = next(optimizer for optimizer in self._optimizers() if parameter in optimizer.state)
        return held.state[parameter]

    def _trained(self) -> Iterator[nn.Parameter]:
        """What AdamW updates."""
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def close(self) -> None:
        del self.module, self.optimizer, self.muon


def _start(parameter: nn.Parameter) -> int:
    """FSDP cuts along the first dimension, in pieces of equal size but for the last ranks', which may be empty."""
    if not isinstance(parameter, DTensor):
        return 0
    axis = next(i for i, placement in enumerate(parameter.placements) if isinstance(placement, ShardPlacement))
    rows = parameter.shape[0]
    rows_of_a_rank = -(-rows // parameter.device_mesh.size(axis))
    first = min(rows, rows_of_a_rank * parameter.device_mesh.get_local_rank(axis))
    return first * (parameter.numel() // rows if rows else 0)
