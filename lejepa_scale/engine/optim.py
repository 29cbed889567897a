"""Parameter groups by rule, and the optimizers over them. Learning rates are set by the engine at each step."""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lejepa_scale.config import Optim
from lejepa_scale.engine.base import MOMENTS, MOMENTUM, full_shape
from lejepa_scale.engine.muon import Muon
from lejepa_scale.errors import UserError
from lejepa_scale.model import LeJEPA
from lejepa_scale.model.layers import layer_scales


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
    shape = torch.Size(full_shape(parameter))
    return "weight" in name.rpartition(".")[2] and len(shape) >= 2 and shape.numel() > shape[0]


def matrices(module: LeJEPA) -> dict[str, nn.Parameter]:
    """What Muon updates where it is asked for: the weights of linear maps, whole, queries, keys and values together where
    they are one matrix, and of convolutions that are not grouped, in the encoder's blocks, or anywhere in an encoder that
    has no `blocks`. Not the convolution that reads the image, patch embeddings, positions or heads."""
    return matrices_within(module, module.encoder, module.encoder.blocks)


def matrices_within(module: nn.Module, encoder: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Those of any module that has an encoder as a part, of which `blocks` are known, or none."""
    found = [part for part in encoder.modules() if isinstance(part, _ConvNd)]
    convolutions = {id(part.weight) for part in found[1:] if part.groups == 1}
    inside = {id(parameter) for block in blocks or [encoder] for parameter in block.parameters()}
    return {
        name: p
        for name, p in split(module).decayed.items()
        if id(p) in inside and (len(full_shape(p)) == 2 or id(p) in convolutions)
    }


def moments(module: LeJEPA, config: Optim) -> dict[str, tuple[str, ...]]:
    """What the optimizer keeps of every parameter, beside its value."""
    own = matrices(module) if config.name == "muon" else {}
    return {name: (MOMENTUM,) if name in own else MOMENTS for name, _ in module.named_parameters()}


def adamw(module: LeJEPA, config: Optim) -> torch.optim.AdamW:
    """Over all that Muon does not update. A group for each rule of decay and each layer's rate: `decayed` and `lr_scale`,
    which the engine reads at every step."""
    return torch.optim.AdamW(
        groups(module, config, muons=False),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=0.0,
        fused=True,
    )


def muon(module: LeJEPA, config: Optim, *, copies: bool) -> Muon | None:
    """Over the encoder's matrices, of which all ranks hold `copies`; None with optim.name=adamw. Raises UserError where the
    encoder has none."""
    if config.name == "adamw":
        return None
    expect_matrices(module)
    return Muon(
        groups(module, config, muons=True),
        lr=config.lr,
        momentum=config.muon.momentum,
        adjust_lr=config.muon.adjust_lr,
        copies=copies,
    )


def expect_matrices(module: LeJEPA) -> None:
    """Raises UserError where nothing would be Muon's."""
    if not matrices(module):
        raise UserError(
            f"optim.name=muon updates the matrices of an encoder, and {module.encoder.name} has none that are known here. "
            "Use optim.name=adamw."
        )


def groups(module: LeJEPA, config: Optim, *, muons: bool) -> list[dict[str, Any]]:
    """Of the parameters that are Muon's, or of the others."""
    own = matrices(module) if config.name == "muon" else {}
    scales = {} if config.layer_decay in (None, 1) else layer_scales(module.encoder, config.layer_decay)
    scales = {f"encoder.{name}": scale for name, scale in scales.items()}
    return groups_within(module, config, own, scales, muons=muons)


def groups_within(
    module: nn.Module, config: Optim, own: Collection[str], scales: Mapping[str, float], *, muons: bool
) -> list[dict[str, Any]]:
    """Of any module, of whose parameters Muon's `own` and the layers' scales are known by name."""
    ratio = config.muon.lr_ratio if muons else 1.0
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for decayed, parameters in zip((True, False), split(module, config.decay == "all"), strict=True):
        for name, parameter in parameters.items():
            if (name in own) == muons:
                scale = ratio * scales.get(name, 1.0)
                groups.setdefault((decayed, scale), []).append(parameter)
    return [{"params": found, "decayed": decayed, "lr_scale": scale} for (decayed, scale), found in groups.items()]


def leave_out(optimizer: torch.optim.Optimizer, bad: Bool[Tensor, ""]) -> None:
    """Let the next step of a fused AdamW or of Muon change nothing, not even its count, where `bad` holds: decided on the
    device."""
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # as torch's gradient scaler tells it


def set_hyperparameters(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Of torch's optimizer or of DeepSpeed's, which is no torch.optim.Optimizer but has its `param_groups`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0
