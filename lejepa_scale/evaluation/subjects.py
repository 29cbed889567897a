"""What is evaluated: an encoder of a run, of an export, of timm or of transformers, always as timm's own model of it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from lejepa_scale.checkpoint import Saved, Weights, find
from lejepa_scale.checkpoint.places import Place, place
from lejepa_scale.config import Config, Data, recorded
from lejepa_scale.conversion import Given, open_model
from lejepa_scale.conversion.model import Inputs, Model, in_memory, of_timm
from lejepa_scale.conversion.source import is_encoder
from lejepa_scale.data import Pixels
from lejepa_scale.data.images.pixels import Ranges, of_run
from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder

logger = logging.getLogger(__name__)
TIMM = "timm:"


@dataclass(frozen=True)
class Subject:
    """An encoder that is evaluated. `build` makes timm's model with its weights, in eval mode, on the CPU."""

    name: str  # in tables
    where: str
    build: Callable[[], nn.Module]
    digest: str  # of the weights, and of the model that they are in
    image_size: int  # side in pixels
    pixels: Pixels  # what its images are
    before_classifier: bool = False  # its pooled features are what a classifier at its end is given
    data: Data | None = None  # of the run that it comes from


def subjects(
    named: str | Place,
    *,
    given: Given | None = None,
    weights: Weights | None = None,
    image_size: int | None = None,
    value_range: Ranges | None = None,
    beside: bool = True,
) -> list[Subject]:
    """What `named` means: a run or checkpoint (its average, if it keeps one, its trained weights, and with `beside` those it
    began with), an export, a folder of timm's or transformers', a file of weights with `given.encoder`, or timm:NAME, whose
    pretrained weights timm fetches. weights: of a run, these alone. Raises UserError where it is none of these."""
    if isinstance(named, str) and (named.startswith(TIMM) or _only_a_name(named)):
        name = named.removeprefix(TIMM)
        return [_of(_pretrained(name), name, image_size, value_range, foreign=True)]
    path = place(named) if isinstance(named, str) else named
    if (given is not None and given.encoder is not None) or is_encoder(path):
        name = path.parent.name if path.name in _PLAIN else path.name
        model = open_model(named, "best", given)
        ours = bool(model.facts) or (path.is_file() and not (path.parent / "config.json").exists())
        return [_of(model, name, image_size, value_range, foreign=not ours)]
    found: dict[str, Weights] = {weights: weights} if weights else _of_a_run(path)
    config = _config(path)
    out = [_of(open_model(path, kind), row, image_size, value_range, data=config.data) for row, kind in found.items()]
    if beside and weights is None:
        row = "untrained" if config.model.init_from is None else "init_from"
        try:
            out.append(_of(open_model(path, "first"), row, image_size, value_range, data=config.data))
        except UserError as error:
            if row == "untrained":
                raise
            logger.warning("no row for the weights that the run began with: %s", error)
    return out


_PLAIN = ("model.safetensors", "encoder.safetensors", "pytorch_model.bin")


def of_encoder(encoder: Encoder, name: str, image_size: int, pixels: Pixels) -> Subject:
    """An encoder in memory, whose weights are copied when it is built. Raises UserError where `pixels` are not its own."""
    if pixels.channels != encoder.channels:
        raise UserError(
            f"evaluate() of an Encoder of {encoder.channels} channel(s) takes what its images are as "
            f"pixels=Pixels({encoder.channels}, range, mean, std)."
        )
    tensors = {key: value.detach().cpu() for key, value in encoder.backbone.state_dict().items()}

    def build() -> nn.Module:
        model = timm.create_model(**encoder.timm_arguments, pretrained=False)
        model.load_state_dict(tensors)
        return model.eval()

    digest = _digest(encoder.timm_arguments, {key: partial(tensors.__getitem__, key) for key in tensors})
    return Subject(name, "", build, digest, image_size, pixels)


def _of_a_run(path: Place) -> dict[str, Weights]:
    """The rows of a run, best first."""
    if _config(path).average.kind != "none" and Saved(find(path)).averaged:
        return {"averaged": "average", "trained": "trained"}
    return {"trained": "trained"}


def _config(path: Place) -> Config:
    checkpoint = find(path)
    return recorded(Saved(checkpoint).config_text(), origin=str(checkpoint / "config.yaml"))


def _of(
    model: Model,
    name: str,
    image_size: int | None,
    value_range: Ranges | None,
    *,
    foreign: bool = False,
    data: Data | None = None,
) -> Subject:
    side = image_size or model.inputs.image_size
    pixels = _pixels(model, value_range) if data is None else of_run(data, value_range)
    digest = _digest([model.architecture, model.arguments], {name: lazy.read for name, lazy in model.tensors.items()})
    return Subject(name, model.where, partial(_built, model, side), digest, side, pixels, foreign, data)


def _built(model: Model, side: int) -> nn.Module:
    """At another side than its own, with positions resampled as timm does."""
    if side == model.inputs.image_size or model.arguments.get("dynamic_img_size"):
        return model.build()
    try:
        return replace(model, arguments={**model.arguments, "dynamic_img_size": True}).build()
    except TypeError:  # a class that knows no other sides, or any
        return model.build()


def _pixels(model: Model, value_range: Ranges | None) -> Pixels:
    inputs = model.inputs
    ranges = {None if r is None else tuple(map(tuple, r)) for r in inputs.ranges}
    if value_range is None and len(ranges) > 1:
        raise UserError(
            f"the sources of {model.where} have several value ranges: say which these shards have (--range LOW HIGH)."
        )
    of_source: Any = next(iter(ranges), None)
    return Pixels(inputs.channels, value_range or of_source, inputs.mean, inputs.std)


def _digest(arguments: Any, tensors: Mapping[str, Callable[[], Tensor]]) -> str:
    """Of how the model is built, and of every tensor's name, kind and bytes. Reads the weights once."""
    found = hashlib.blake2b(digest_size=16)
    found.update(json.dumps(arguments, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        tensor = tensors[name]().detach().contiguous().cpu()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _only_a_name(named: str) -> bool:
    return "/" not in named and not Path(named).exists() and timm.is_model(named)


def _pretrained(name: str) -> Model:
    """timm's model with the weights that timm has for it. Raises UserError where it knows or gets none."""
    if not timm.is_model(name):
        raise UserError(f"timm {timm.__version__} knows no model {name!r}; list names with timm.list_models().")
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # of the network, of the hub, of timm for a model without weights
        raise UserError(
            f"timm:{name}: its weights are not to be had ({str(error).splitlines()[0][:200]}). Copy them here and name the "
            f"file: lejepa evaluate FILE --encoder {name}."
        ) from error
    cfg: Any = model.pretrained_cfg
    channels, side, _ = cfg["input_size"]
    inputs = Inputs(side, channels, tuple(cfg["mean"]), tuple(cfg["std"]))
    return of_timm(f"timm:{name}", name, {"num_classes": 0}, inputs, in_memory(model.state_dict()))
