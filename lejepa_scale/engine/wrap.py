"""What engines do to a module before they own it: build it without memory, change how its blocks run (float8 layers, then
recomputation, then compilation), and say where to cut it. Parameter names stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lejepa_scale.config import Config
from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder, LeJEPA

_FLOAT8_MULTIPLE = 16  # the sides of a float8 matrix product
_FLOAT8_CAPABILITY = (8, 9)
_PRODUCTS = ("mm", "addmm", "_scaled_mm")
_ATTENTION = ("_scaled_dot_product", "attention_forward", "flash_fwd", "_attn")


def sharding_units(module: LeJEPA) -> list[nn.Module]:
    """The encoder's repeated blocks; what is left belongs to the root."""
    return list(module.encoder.blocks)


def prepare_blocks(module: LeJEPA, config: Config) -> None:
    """How blocks run, by the `engine` section. Everything happens inside a block's own forward, so that an engine's hooks
    stay around it: parameters are gathered once for the recomputation and the backward pass together."""
    encoder, settings = module.encoder, config.engine
    if settings.fp8:
        use_float8(encoder, settings.fp8_recipe, by_reference=settings.name == "zero3" and not settings.compile)
    if settings.activation_checkpointing == "full" and not encoder.packed:
        encoder.backbone.set_grad_checkpointing()
        return
    for block in encoder.blocks if encoder.packed else []:
        if settings.activation_checkpointing in ("full", "selective"):
            block.forward = _recomputed(block.forward, settings.activation_checkpointing)
        if settings.compile:
            block.forward = torch.compile(block.forward, dynamic=False)
    if settings.compile:
        dynamo: Any = torch._dynamo.config
        # one graph for every shape that stochastic depth leaves a block, with and without gradients
        dynamo.recompile_limit = max(dynamo.recompile_limit, 8 + 2 * len(encoder.blocks))
        dynamo.optimize_ddp = False  # which cuts a block in pieces at the borders of DDP's buckets
        budget = settings.activation_budget if settings.activation_checkpointing == "budget" else 1.0
        torch._functorch.config.activation_memory_budget = budget


def use_float8(encoder: Encoder, recipe: str = "tensorwise", emulate: bool = False, by_reference: bool = False) -> None:
    """torchao's float8 linear layers in every block, scaled anew in each step as its `recipe` says; products stay in bf16
    elsewhere.

    emulate: round to float8 and multiply in the input's precision: for tests, on any device. by_reference: the backward pass
    takes a weight from its layer rather than from what the forward pass saw, which would keep what ZeRO-3 gathered. Raises
    UserError.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.float8.float8_linear import Float8Linear
    except ImportError as error:
        raise UserError("engine.fp8=true needs torchao: pip install 'lejepa_scale[gpu]'.") from error
    if not emulate and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= _FLOAT8_CAPABILITY):
        chip = torch.cuda.get_device_name() if torch.cuda.is_available() else "this CPU"
        raise UserError(f"engine.fp8=true needs a GPU with float8 matrix products (L40S, H100 or later), not {chip}.")
    config = replace(Float8LinearConfig.from_recipe_name(recipe), pad_inner_dim=True, emulate=emulate)
    for block in encoder.blocks:
        convert_to_float8_training(block, config=config, module_filter_fn=lambda layer, _: _suits_float8(layer))
        for layer in block.modules():
            if by_reference and isinstance(layer, Float8Linear):
                layer.forward = _weight_by_reference(layer, layer.forward)  # type: ignore[method-assign]


def _suits_float8(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Linear):
        return False
    shape = getattr(layer.weight, "ds_shape", layer.weight.shape)  # ZeRO-3 empties .shape between uses
    return all(side % _FLOAT8_MULTIPLE == 0 for side in shape)


def _weight_by_reference(layer: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def pack(tensor: Tensor) -> Tensor | None:
        weight = layer.weight
        is_weight = tensor.shape == weight.mT.shape and tensor.data_ptr() == weight.data_ptr()
        return None if is_weight else tensor

    def unpack(kept: Tensor | None) -> Tensor:
        return layer.weight.detach().mT if kept is None else kept

    def called(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return forward(x)

    return called


def _recomputed(forward: Callable[..., Tensor], kind: str) -> Callable[..., Tensor]:
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def recomputed(*args: Any) -> Tensor:
        return checkpoint(forward, *args, **options) if torch.is_grad_enabled() else forward(*args)

    return recomputed


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Matrix products and attention are what a block's time goes to; all the rest is cheap to compute again."""
    name = getattr(operator, "name", str)().split("::")[-1].split(".")[0]
    kept = name in _PRODUCTS or any(part in name for part in _ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def without_weights(factory: Callable[[], LeJEPA]) -> LeJEPA:
    """The module with its parameters on the meta device and its buffers in memory. Where a constructor computes with its
    weights (timm's hybrids look at what their network makes of an image), they are there until it has ended."""
    try:
        with _parameters_on_meta():
            return factory()
    except Exception:  # of many kinds; what is wrong for another reason fails again
        module = factory()
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))
        return module


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter becomes a meta tensor as it is registered; buffers keep their values."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@torch.no_grad()
def materialize(module: nn.Module, device: torch.device, parameters_on: torch.device | None = None) -> None:
    """Memory for what is on the meta device: NaN, so that a weight nobody loads shows at the first step."""
    home = parameters_on or device
    module._apply(lambda t: torch.empty_like(t, device=home) if t.is_meta else t.to(device))
    for parameter in module.parameters():
        parameter.fill_(torch.nan)
