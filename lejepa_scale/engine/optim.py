"""Parameter groups by rule, and the optimizer. Learning rates are set by the engine at each step."""

from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from lejepa_scale.config import Optim


class Decay(NamedTuple):
    """The trained parameters of a module by name: those that weight decay shrinks, and the others."""

    decayed: dict[str, nn.Parameter]
    others: dict[str, nn.Parameter]


def split(module: nn.Module, everything: bool = False) -> Decay:
    """What weight decay applies to: the weights of linear maps and convolutions, in which several inputs are summed.

    Not to biases, norms, scales of single channels, tokens, tables of positions, rotary frequencies: to nothing whose own
    name does not say `weight`, to no nn.Embedding, to nothing of a single number per output, and to nothing that a part of
    the module (timm's models) lists in `no_weight_decay()`. With `everything`, to all parameters.
    """
    excepted = [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        if callable(names := getattr(part, "no_weight_decay", None))
        for name in names()
    ]
    maps_nothing = (nn.Embedding, nn.LayerNorm)  # the latter over several dimensions
    excepted += [f"{name}.weight" for name, part in module.named_modules() if isinstance(part, maps_nothing)]
    groups = Decay({}, {})
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_weight = _sums_inputs(name, parameter) and not any(fnmatchcase(name, pattern) for pattern in excepted)
        groups[0 if everything or is_weight else 1][name] = parameter
    return groups


def _sums_inputs(name: str, parameter: nn.Parameter) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties .shape between uses
    return "weight" in name.rpartition(".")[2] and len(shape) >= 2 and shape.numel() > shape[0]


def adamw(module: nn.Module, config: Optim) -> torch.optim.AdamW:
    """Over two groups, decayed and not; each says so under `decayed`, which the engine reads at every step."""
    decayed, others = split(module, config.decay == "all")
    groups = [{"params": list(decayed.values()), "decayed": True}, {"params": list(others.values()), "decayed": False}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=0.0,
        fused=True,
    )


def leave_out(optimizer: torch.optim.Optimizer, bad: Bool[Tensor, ""]) -> None:
    """Let the next step of a fused AdamW change nothing, not even its count, where `bad` holds: decided on the device."""
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # as torch's gradient scaler tells it


def set_hyperparameters(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Of torch's optimizer or of DeepSpeed's, which is no torch.optim.Optimizer but has its `param_groups`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0
