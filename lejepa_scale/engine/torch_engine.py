"""What the engines made of torch alone share: AdamW on fp32 parameters, one finite check, state by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lejepa_scale.config import Config
from lejepa_scale.engine.base import Engine
from lejepa_scale.engine.optim import adamw, set_hyperparameters
from lejepa_scale.model import LeJEPA


class TorchEngine(Engine):
    def __init__(self, module: LeJEPA, config: Config, device: torch.device) -> None:
        self.module, self.device = module, device
        self.optimizer = adamw(module.named_parameters(), config.optim)
        self.clip_norm = config.optim.clip_norm

    def step(self, lr: float, weight_decay: float) -> Tensor:
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if torch.isfinite(norm):  # the one host synchronization of a step
            if self.clip_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
            set_hyperparameters(self.optimizer, lr, weight_decay)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.to(self.device)

    def _gather(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        tensor = parameter if moment is None else self.optimizer.state[parameter][moment]
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _scatter(self, parameter: nn.Parameter, full: Tensor, moment: str | None) -> None:
        tensor = parameter if moment is None else self.optimizer.state[parameter][moment]
        if isinstance(tensor, DTensor):
            # every rank holds `full` already: cut locally, no communication
            cut = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor, full = tensor.to_local(), cut.to_local()
        tensor.copy_(full)

    def _prepare_moments(self, updates: int) -> None:
        for parameter in self._trained():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(updates), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def updates(self) -> int:
        states = [self.optimizer.state[p] for p in self._trained() if p in self.optimizer.state]
        return int(states[0]["step"]) if states else 0

    def _trained(self) -> Iterable[nn.Parameter]:
        return (p for group in self.optimizer.param_groups for p in group["params"])
