"""What is converted: an encoder on disk, as timm builds it, with what its inputs are, and tensors that are read one by one.
Every name of timm's model is there once, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import yaml
from torch import Tensor, nn

from lejepa_scale.checkpoint import Saved, find, pretrained
from lejepa_scale.checkpoint.encoder import PREFIX, load_encoder
from lejepa_scale.checkpoint.places import Place, place
from lejepa_scale.checkpoint.saved import MARKER, Weights, not_finite, verify
from lejepa_scale.checkpoint.tensors import TensorFile
from lejepa_scale.config import Config, Data, recorded
from lejepa_scale.config.schema import InitFrom
from lejepa_scale.conversion.arguments import may_be_set
from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder, build_encoder


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
    `heads` are the projector's (and predictor's), where the source has them. `encoder` gives the encoder itself, in
    memory, as the source's own program runs it. facts: of the run, for the model card."""

    where: str
    architecture: str
    arguments: dict[str, Any]  # timm's, besides the architecture
    inputs: Inputs
    tensors: dict[str, Lazy]
    shapes: Any
    encoder: Callable[[], nn.Module]
    heads: dict[str, Lazy] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    def build(self) -> nn.Module:
        """timm's model with the weights, in eval mode."""
        model = timm.create_model(self.architecture, pretrained=False, **self.arguments)
        model.load_state_dict({name: tensor.read() for name, tensor in self.tensors.items()})
        return model.eval()


@dataclass(frozen=True)
class Given:
    """What a source does not say of itself: which encoder its tensors are for."""

    encoder: str | None = None
    image_size: int | None = None
    patch_size: int | None = None
    channels: int | None = None


def open_model(named: str | Place, weights: Weights = "best", given: Given | None = None) -> Model:
    """The encoder that `named` means: a run or checkpoint of ours (also in a store), a file or folder that `lejepa convert`
    or timm or transformers' TimmWrapper wrote, or, where `given.encoder` says what it is for, any weights that
    `model.init_from` takes. Raises UserError, with names, where tensors are missing, left over or of another shape."""
    given = given or Given()
    path = place(named) if isinstance(named, str) else named
    if given.encoder is not None:
        return _of_weights(str(named), given)
    if (
        isinstance(path, Path)
        and path.is_file()
        and path.suffix == ".safetensors"
        and not (path.parent / MARKER).exists()
    ):
        return _of_export(path)
    if isinstance(path, Path) and (path / "config.json").exists():
        return _of_folder(path)
    if isinstance(path, Path) and path.is_file() and not (path.parent / MARKER).exists():
        raise UserError(f"{path} does not say which encoder it is for: name it with --encoder NAME.")
    return _of_run(find(path), weights)


# -- ours


def _of_run(checkpoint: Place, weights: Weights) -> Model:
    verify(checkpoint, moments=False)
    saved = Saved(checkpoint)
    config = recorded(yaml.safe_load(saved.config_text()), origin=str(checkpoint / "config.yaml"))
    shapes = _on_meta(lambda: build_encoder(config))
    if weights == "first":
        encoder, _ = load_encoder(checkpoint, weights="first")
        tensors = _at_hand(encoder.backbone.state_dict())
        heads = dict[str, Lazy]()
    else:
        kind = saved.kind_of(weights)
        everything = {
            name: Lazy(shape, saved.dtype(name, kind), partial(saved.whole, name, kind))
            for name, shape in saved.shapes.items()
        }
        tensors = {name.removeprefix(PREFIX): lazy for name, lazy in everything.items() if name.startswith(PREFIX)}
        heads = {name: lazy for name, lazy in everything.items() if not name.startswith(PREFIX)}
    _expect_bijection(str(checkpoint), tensors, shapes.backbone)
    arguments = dict(shapes.timm_arguments)
    return Model(
        where=str(checkpoint),
        architecture=arguments.pop("model_name"),
        arguments=arguments,
        inputs=_inputs(config),
        tensors=tensors,
        shapes=shapes.backbone,
        encoder=lambda: load_encoder(checkpoint, weights=weights)[0],
        heads=heads,
        facts=_facts(saved, config, weights),
    )


def _inputs(config: Config) -> Inputs:
    data = config.data
    ranges = tuple(source.ranges for source in data.shards)
    return Inputs(config.image_size, data.channels, data.mean, data.std, ranges if any(ranges) else ())


def _facts(saved: Saved, config: Config, weights: Weights) -> dict[str, Any]:
    """What a model card tells of the run."""
    kept = saved.kind_of(weights) if weights != "first" else "first"
    return {
        "encoder": config.model.encoder,
        "step": saved.progress.step,
        "images": saved.progress.step * config.train.global_batch,
        "batch": config.train.global_batch,
        "weights": {"value": "trained", "average": f"averaged ({config.average.kind})"}.get(kept, "first"),
        "data": [str(shard) for source in config.data.shards for shard in source.shards],
        "views": f"{config.data.views.global_.count} of {config.data.views.global_.size} px and "
        f"{config.data.views.local.count} of {config.data.views.local.size} px",
        "lambda": config.objective.lambda_,
        "regularizer": config.objective.regularizer,
        "lr": config.optim.lr,
        "weight_decay": config.optim.weight_decay,
        "license": config.run.license,
    }


# -- files and folders of others


def _of_export(path: Path) -> Model:
    """One safetensors file of `lejepa convert`, whose metadata say how to build the model."""
    file = _opened(path)
    try:
        arguments = json.loads(file.metadata["timm"])
        name = str(arguments.pop("model_name"))
        mean, std = (tuple(map(float, json.loads(file.metadata[key]))) for key in ("mean", "std"))
        ranges = tuple(json.loads(file.metadata.get("ranges", "[]")))
        size, channels = int(file.metadata["image_size"]), int(file.metadata["channels"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not say which encoder it is for ({type(error).__name__}: {error}), as a file of `lejepa convert` "
            "does: name it with --encoder NAME."
        ) from error
    inputs = Inputs(size, channels, mean, std, ranges if any(ranges) else ())
    tensors = {k: lazy for k, lazy in _lazies(file).items() if not k.startswith(HEADS)}
    return _of_timm(str(path), name, arguments, inputs, tensors, heads={})


HEADS = ("projector.", "predictor.", "loss.")


def _of_folder(path: Path) -> Model:
    """config.json of timm's, and weights in one file or in several with an index."""
    try:
        about = json.loads((path / "config.json").read_text())
        name = str(about["architecture"])
        cfg = about.get("pretrained_cfg") or {}
        channels, height, width = (int(side) for side in cfg["input_size"])
        mean, std = (tuple(map(float, cfg[key])) for key in ("mean", "std"))
        arguments = dict(about.get("model_args") or {})
        arguments["num_classes"] = int(about.get("num_classes", cfg.get("num_classes", 0)))
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / 'config.json'} does not describe an encoder of timm's ({type(error).__name__}: {error}): name it with "
            "--encoder NAME."
        ) from error
    if height != width:
        raise UserError(f"{path / 'config.json'}: images of {height} x {width} pixels are not square.")
    if channels != 3:
        arguments.setdefault("in_chans", channels)
    ours = about.get("lejepa_scale") or {}
    ranges = tuple(ours.get("ranges") or ())
    inputs = Inputs(height, channels, mean, std, ranges)
    return _of_timm(str(path), name, arguments, inputs, _of_files(path), heads={}, facts=ours.get("run") or {})


def _of_files(path: Path) -> dict[str, Lazy]:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        file = path / "model.safetensors"
        if not file.exists():
            raise UserError(f"{path} holds no model.safetensors, whole or with an index.")
        return _lazies(_opened(file))
    try:
        named = {str(key): str(value) for key, value in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} cannot be read: {error!r}.") from error
    out: dict[str, Lazy] = {}
    for name in sorted(set(named.values())):
        if Path(name).name != name or not (path / name).is_file():
            raise UserError(f"{index} names {name}, which is not in the folder: bring it there.")
        out |= _lazies(_opened(path / name))
    if missing := sorted(named.keys() ^ out.keys()):
        raise UserError(f"{index} and its files differ in {len(missing)} tensors: {', '.join(missing[:4])}.")
    return out


def _of_timm(
    where: str,
    name: str,
    arguments: dict[str, Any],
    inputs: Inputs,
    tensors: dict[str, Lazy],
    heads: dict[str, Lazy],
    facts: dict[str, Any] | None = None,
) -> Model:
    if not timm.is_model(name):
        raise UserError(f"{where} is for {name!r}, which timm {timm.__version__} does not know.")
    for key, value in arguments.items():
        if not may_be_set(key, value):
            raise UserError(
                f"{where} sets the argument {key} of {name} to {value!r}, which a file may not: name the encoder with "
                "--encoder NAME, which takes nothing from it."
            )
    try:
        shapes = _on_meta(lambda: timm.create_model(name, pretrained=False, **arguments))
    except Exception as error:  # whatever timm's constructors make of arguments that do not go together
        raise UserError(f"{where}: timm refuses its arguments for {name}: {error or type(error).__name__}.") from error
    if shapes.num_classes and not _has_head(tensors, shapes):
        arguments = {**arguments, "num_classes": 0}
        shapes = _on_meta(lambda: timm.create_model(name, pretrained=False, **arguments))
    _expect_bijection(where, tensors, shapes)
    model: Model

    def encoder() -> nn.Module:
        return model.build()

    model = Model(where, name, arguments, inputs, tensors, shapes, encoder, heads, dict(facts or {}))
    return model


def _has_head(tensors: Mapping[str, Lazy], shapes: Any) -> bool:
    named = shapes.pretrained_cfg.get("classifier") or ()
    return any(f"{name}.weight" in tensors for name in ([named] if isinstance(named, str) else named))


def _of_weights(named: str, given: Given) -> Model:
    """Whatever `model.init_from` takes, for an encoder that is named."""
    assert given.encoder is not None
    channels, size = given.channels or 3, given.image_size or 224
    named_encoder, patch = given.encoder, given.patch_size
    encoder = _on_meta(lambda: Encoder(named_encoder, image_size=size, channels=channels, patch_size=patch))
    loaded = pretrained.load(InitFrom(source=named), encoder)
    mean, std = loaded.standardization or (None, None)
    if mean is None or std is None or len(mean) != channels:
        mean, std = list(Data.model_fields["mean"].default), list(Data.model_fields["std"].default)
        if channels != len(mean):
            mean, std = [0.5] * channels, [0.5] * channels
    arguments = dict(encoder.timm_arguments)
    name = arguments.pop("model_name")
    inputs = Inputs(size, channels, tuple(mean), tuple(std))
    return _of_timm(
        named, name, arguments, inputs, _at_hand(loaded.weights), heads={}, facts={"encoder": given.encoder}
    )


# -- tensors


def _opened(path: Path) -> TensorFile:
    try:
        return TensorFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Copy or download it again.") from error


def _lazies(file: TensorFile) -> dict[str, Lazy]:
    return {
        name: Lazy(file.shape(name), file.dtype(name), lambda name=name: file.tensor(name))  # type: ignore[misc]
        for name in file.keys()
    }


def _at_hand(tensors: Mapping[str, Tensor]) -> dict[str, Lazy]:
    return {
        name: Lazy(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in tensors.items()
    }


def _expect_bijection(where: str, tensors: Mapping[str, Lazy], model: Any) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
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


def _on_meta(factory: Callable[[], Any]) -> Any:
    """The module without memory, or with it where its constructor computes with its weights."""
    try:
        with torch.device("meta"):
            return factory()
    except (RuntimeError, NotImplementedError):
        return factory()


Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
