"""What a source is: a run or checkpoint of ours, a file or folder of another program, or weights for a named encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor

from lejepa_scale.checkpoint import Saved, find, pretrained
from lejepa_scale.checkpoint.encoder import PREFIX, load_encoder
from lejepa_scale.checkpoint.places import Place, place
from lejepa_scale.checkpoint.saved import MARKER, Weights, verify
from lejepa_scale.config import Config, Data, recorded
from lejepa_scale.config.schema import InitFrom
from lejepa_scale.conversion import files
from lejepa_scale.conversion.model import (
    Features,
    Inputs,
    Lazy,
    Model,
    expect_bijection,
    in_memory,
    of_timm,
    on_meta,
    outputs,
)
from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder, build_encoder


@dataclass(frozen=True)
class Given:
    """What a source does not say of itself: which encoder its tensors are for."""

    encoder: str | None = None
    image_size: int | None = None
    patch_size: int | None = None
    channels: int | None = None


def open_model(named: str | Place, weights: Weights = "best", given: Given | None = None) -> Model:
    """The encoder that `named` means: a run or checkpoint of ours (also in a store), a file or folder that `lejepa convert`,
    timm or transformers wrote, or, where `given.encoder` says what it is for, any weights that `model.init_from` takes.
    Raises UserError, with names, where tensors are missing, left over or of another shape."""
    given = given or Given()
    path = place(named) if isinstance(named, str) else named
    if given.encoder is not None:
        return _of_weights(str(named), given.encoder, given)
    if isinstance(path, Path) and is_encoder(path):
        return files.of_file(path) if path.is_file() else files.of_folder(path)
    return _of_run(find(path), weights)


def is_encoder(path: Place) -> bool:
    """Whether it is a file or folder of an encoder alone."""
    if not isinstance(path, Path):
        return False
    return (path.is_file() and not (path.parent / MARKER).exists()) or (path / "config.json").exists()


# -- ours


def _of_run(checkpoint: Place, weights: Weights) -> Model:
    verify(checkpoint, moments=False)
    saved = Saved(checkpoint)
    config = recorded(saved.config_text(), origin=str(checkpoint / "config.yaml"))
    shapes = on_meta(lambda: build_encoder(config))
    if weights == "first":
        encoder, _ = load_encoder(checkpoint, weights="first")
        tensors = in_memory(encoder.backbone.state_dict())
        heads = dict[str, Lazy]()
    else:
        kind = saved.kind_of(weights)
        everything = {
            name: Lazy(shape, saved.dtype(name, kind), partial(saved.whole, name, kind))
            for name, shape in saved.shapes.items()
        }
        tensors = {name.removeprefix(PREFIX): lazy for name, lazy in everything.items() if name.startswith(PREFIX)}
        heads = {name: lazy for name, lazy in everything.items() if not name.startswith(PREFIX)}
    expect_bijection(str(checkpoint), tensors, shapes.backbone)
    arguments = dict(shapes.timm_arguments)
    return Model(
        where=str(checkpoint),
        architecture=arguments.pop("model_name"),
        arguments=arguments,
        inputs=_inputs(config),
        tensors=tensors,
        shapes=shapes.backbone,
        source_features=_features(checkpoint, weights),
        heads=heads,
        facts=_facts(saved, config, weights),
    )


def _features(checkpoint: Place, weights: Weights) -> Callable[[], Features]:
    """Those of the encoder that trained, packed where it is."""

    def loaded() -> Features:
        encoder, _ = load_encoder(checkpoint, weights=weights)

        def features(images: Tensor) -> tuple[Tensor, Tensor | None]:
            if not encoder.packed:
                return outputs(encoder.backbone, images)
            return encoder([images])[0], rearrange(encoder.patch_features(images), "b h w e -> b (h w) e")

        return features

    return loaded


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
        "final_lambda": config.objective.final_lambda,
        "regularizer": config.objective.regularizer,
        "lr": config.optim.lr,
        "weight_decay": config.optim.weight_decay,
        "license": config.run.license,
    }


# -- weights that do not say what they are for


def _of_weights(named: str, name: str, given: Given) -> Model:
    """Whatever `model.init_from` takes, for an encoder that is named."""
    channels, size = given.channels or 3, given.image_size or 224
    encoder = on_meta(lambda: Encoder(name, image_size=size, channels=channels, patch_size=given.patch_size))
    try:
        loaded = pretrained.load(InitFrom(source=named), encoder)
    except UserError as error:
        raise UserError(str(error).removeprefix("model.init_from=")) from error
    mean, std = loaded.standardization or (None, None)
    if mean is None or std is None or len(mean) != channels:
        mean, std = list(Data.model_fields["mean"].default), list(Data.model_fields["std"].default)
        if channels != len(mean):
            mean, std = [0.5] * channels, [0.5] * channels
    arguments = dict(encoder.timm_arguments)
    architecture = arguments.pop("model_name")
    inputs = Inputs(size, channels, tuple(mean), tuple(std))
    return of_timm(named, architecture, arguments, inputs, in_memory(loaded.weights), {"encoder": name})
