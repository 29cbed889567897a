"""What is converted: an encoder on disk, as timm builds it, with what its inputs are, and tensors that are read one by one.
Every name of timm's model is there once, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite, prod
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from lejepa_scale.checkpoint.saved import not_finite
from lejepa_scale.checkpoint.tensors import TensorFile
from lejepa_scale.conversion.arguments import may_be_set
from lejepa_scale.errors import UserError

HEADS = ("projector.", "predictor.", "loss.")
Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Features = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # images -> pooled features, those of patches


@dataclass(frozen=True)
class Inputs:
    """What the encoder takes: side in pixels, channels, mean and standard deviation of each as a share of its range; the
    range of stored values of each source, None for 8-bit images."""

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ranges: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Lazy:
    """A tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Model:
    """An encoder to be converted. `shapes` is timm's model on the meta device; `tensors` have exactly its names and shapes;
    `heads` are the projector's (and predictor's), where the source has them. `source_features` loads the encoder as the
    source's own program runs it, where that is not timm; timm's model is equal to it at every size, or at the native one
    alone (`exact`).
    facts: of the run, for the model card. left_out: what of the source is no part of its features."""

    where: str
    architecture: str
    arguments: dict[str, Any]  # timm's, besides the architecture
    inputs: Inputs
    tensors: dict[str, Lazy]
    shapes: Any
    heads: dict[str, Lazy] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    source_features: Callable[[], Features] | None = None
    exact: bool = True
    left_out: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    def build(self) -> nn.Module:
        """timm's model with the weights, read one by one, in eval mode."""
        model: nn.Module = timm.create_model(self.architecture, pretrained=False, **self.arguments)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(self.tensors[name].read())
        return model.eval()

    def features(self) -> Features:
        """Those of the source."""
        if self.source_features is not None:
            return self.source_features()
        model = self.build()
        return lambda images: outputs(model, images)


def of_timm(
    where: str,
    architecture: str,
    arguments: dict[str, Any],
    inputs: Inputs,
    tensors: dict[str, Lazy],
    facts: dict[str, Any] | None = None,
) -> Model:
    """A model of timm's with these tensors. Raises UserError where timm has no such model, a file may not set such an
    argument, the tensors are not the model's, or mean and deviation are not of its channels."""
    mean, std = inputs.mean, inputs.std
    if not len(mean) == len(std) == inputs.channels or not all(map(isfinite, (*mean, *std))) or min(std) <= 0:
        raise UserError(
            f"{where} takes {inputs.channels} channels, and standardizes them by mean {list(mean)} and standard deviation "
            f"{list(std)}: one number for each channel is needed, and deviations above 0."
        )
    shapes = built_on_meta(where, architecture, arguments)
    if shapes.num_classes and not _has_head(tensors, shapes):
        arguments = {**arguments, "num_classes": 0}
        shapes = built_on_meta(where, architecture, arguments)
    expect_bijection(where, tensors, shapes)
    return Model(where, architecture, arguments, inputs, tensors, shapes, facts=dict(facts or {}))


def built_on_meta(where: str, architecture: str, arguments: Mapping[str, Any]) -> Any:
    """timm's model without memory. Raises UserError where timm does not build it, or a file may not set an argument."""
    if not timm.is_model(architecture):
        raise UserError(f"{where} is for {architecture!r}, which timm {timm.__version__} does not know.")
    for key, value in arguments.items():
        if not may_be_set(key, value):
            raise UserError(
                f"{where} sets the argument {key} of {architecture} to {value!r}, which a file may not: name the encoder "
                "with --encoder NAME, which takes nothing from it."
            )
    try:
        return on_meta(lambda: timm.create_model(architecture, pretrained=False, **arguments))
    except Exception as error:  # whatever timm's constructors make of arguments that do not go together
        raise UserError(
            f"{where}: timm refuses its arguments for {architecture}: {error or type(error).__name__}."
        ) from error


def _has_head(tensors: Mapping[str, Lazy], shapes: Any) -> bool:
    named = shapes.pretrained_cfg.get("classifier") or ()
    return any(f"{name}.weight" in tensors for name in ([named] if isinstance(named, str) else named))


def outputs(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Pooled features [B, E], and those of patches [B, N, D], or of the last map's places, in timm's order; None where
    a model has several maps at its end (CrossViT)."""
    features = backbone.forward_features(images)
    pooled = backbone.forward_head(features)
    if not isinstance(features, Tensor):
        return pooled, None
    if features.ndim == 3:
        return pooled, features[:, getattr(backbone, "num_prefix_tokens", 0) :]
    channels_last = features.shape[-1] == backbone.num_features and features.shape[1] != backbone.num_features
    return pooled, features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)


# -- tensors


def opened(path: Path) -> TensorFile:
    """A safetensors file. Raises UserError where it is none."""
    try:
        return TensorFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Copy or download it again.") from error


def lazies(file: TensorFile) -> dict[str, Lazy]:
    return {
        name: Lazy(file.shape(name), file.dtype(name), lambda name=name: file.tensor(name))  # type: ignore[misc]
        for name in file.keys()
    }


def in_memory(tensors: Mapping[str, Tensor]) -> dict[str, Lazy]:
    return {name: at_hand(tensor) for name, tensor in tensors.items()}


def at_hand(tensor: Tensor) -> Lazy:
    """One that is in memory, or mapped into it."""
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def expect_bijection(where: str, tensors: Mapping[str, Lazy], model: Any) -> None:
    """Raises UserError, with names, where tensors are missing, left over or of another shape."""
    expect_shapes(where, tensors, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def expect_shapes(where: str, tensors: Mapping[str, Lazy], expected: Mapping[str, tuple[int, ...]]) -> None:
    """As `expect_bijection`, of names and shapes. Raises UserError."""
    found = {name: lazy.shape for name, lazy in tensors.items()}
    faults = (
        ("missing", sorted(expected.keys() - found.keys())),
        ("left over", sorted(found.keys() - expected.keys())),
        ("of another shape", sorted(k for k in expected.keys() & found.keys() if expected[k] != found[k])),
    )
    parts = [
        f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for kind, names in faults
        if names
    ]
    if parts:
        raise UserError(f"{where} does not hold the encoder that it says: {'; '.join(parts)}.")


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor; raises UserError where it holds something else than numbers."""
    if tensor.is_floating_point() and (fault := not_finite([(name, tensor)])):
        raise UserError(f"{fault}: such weights are not converted.")
    return tensor


def on_meta(factory: Callable[[], Any]) -> Any:
    """The module without memory, or with it where its constructor computes with its weights."""
    try:
        with torch.device("meta"):
            return factory()
    except (RuntimeError, NotImplementedError):
        return factory()
