"""Parameter groups by rule, and the optimizer. Learning rates are set by the engine at each step."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lejepa_scale.config import Optim


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay applies to matrices and kernels; not to biases, norms, layer scales, tokens or positions."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties .shape between uses
    return len(shape) >= 2 and not name.endswith(("pos_embed", "cls_token", "reg_token"))


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict]:
    """Two groups, decayed and not; each says so under `decayed`, which the engine reads at every step."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        if parameter.requires_grad:
            groups[is_decayed(name, parameter)].append(parameter)
    return [{"params": params, "decayed": decayed} for decayed, params in groups.items() if params]


def adamw(named: Iterable[tuple[str, nn.Parameter]], config: Optim) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(named), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True
    )


def set_hyperparameters(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Of torch's optimizer or of DeepSpeed's, which is no torch.optim.Optimizer but has its `param_groups`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0
