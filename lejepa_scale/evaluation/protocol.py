"""An encoder's scores on labelled shards, beside those of raw pixels and, for a checkpoint, of the weights it began with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lejepa_scale.checkpoint import Saved, find, load_encoder
from lejepa_scale.checkpoint.places import Place
from lejepa_scale.config import Config
from lejepa_scale.data import Pixels, evaluation_batches
from lejepa_scale.data.folders import shards_of
from lejepa_scale.data.images.pixels import Ranges, of_run
from lejepa_scale.data.index.classes import class_numbers
from lejepa_scale.data.index.keys import SampleKeys, keys_of_run
from lejepa_scale.data.index.shards import Shards, index_shards
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import Batches, Features, extract, raw_pixels
from lejepa_scale.evaluation.report import Scores, score
from lejepa_scale.model import Encoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: a row of scores for each kind of features, and the features of the test images by the first of
    these encoders: the averaged, else the trained one."""

    scores: list[Scores]
    features: Features


def evaluate(
    encoder: Encoder | Place | str,
    train: str | Sequence[str],
    test: str | Sequence[str],
    *,
    k: int = 20,
    batch: int = 256,
    device: torch.device | str | None = None,
    image_size: int | None = None,
    value_range: Ranges | None = None,
    pixels: Pixels | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
) -> Evaluation:
    """Nearest neighbours and a linear classifier on frozen features: fitted on `train`, scored on `test`.

    encoder: a run directory or checkpoint, whose average of the weights is scored first, if it keeps one, and whose first
    weights are scored too (`untrained`; `init_from`, if they are still there), or an Encoder, which is left on `device`.
    train, test: labelled shards, as folders, files or brace patterns. device: unset, the GPU where there is one. image_size:
    side in pixels; unset, that of the checkpoint. value_range, of a checkpoint: ((low, high),) of the stored values, or a
    pair for each channel; unset, that of the run's own images. pixels, of an Encoder: what its images are; unset, 8-bit RGB
    with ImageNet's mean and standard deviation. image_key, label_key: as of a source in the configuration; unset, those of
    the checkpoint's sources, of an Encoder the defaults. Raises UserError for what is not a checkpoint or a shard, for
    images without labels, for a device that is not here, for pixels that are not the encoder's, and where the run's
    sources have several ranges or keys.
    """
    if k < 1 or batch < 1:
        raise UserError(f"evaluation needs at least 1 neighbour and 1 image a batch, not k={k} and batch={batch}.")
    place = _device(device)
    models: dict[str, Encoder] = {}
    if isinstance(encoder, Encoder):
        if image_size is None:
            raise UserError("evaluate() of an Encoder needs image_size, the side in pixels that it is scored at.")
        models["encoder"], pixels = encoder, pixels or Pixels()
        keys = SampleKeys.parsed(image_key or "", label_key or "cls")
        if value_range is not None or pixels.channels != encoder.channels:
            raise UserError(
                f"evaluate() of an Encoder of {encoder.channels} channel(s) takes what its images are as "
                f"pixels=Pixels({encoder.channels}, range, mean, std)."
            )
    else:
        if pixels is not None:
            raise UserError("evaluate() of a checkpoint knows its pixels: value_range alone may be another.")
        best, config = load_encoder(encoder)
        if config.average.kind != "none" and Saved(find(encoder)).averaged:
            models["averaged"] = best
            models["trained"], _ = load_encoder(encoder, weights="trained")
        else:
            models["trained"] = best
        models |= _first(encoder, config)
        image_size, pixels = image_size or config.image_size, of_run(config.data, value_range)
        keys = keys_of_run(config.data, image_key, label_key)
    sets = [index_shards(shards_of(s), keys=keys) for s in (train, test)]
    classes = class_numbers(sets)

    def batches(shards: Shards) -> Batches:
        return evaluation_batches(shards, image_size=image_size, batch_size=batch, pixels=pixels, classes=classes)

    found: list[Features] = []
    scores: list[Scores] = []
    for name, model in models.items():
        training = model.training
        fitted, held_out = (extract(model, batches(shards), place, name, pixels) for shards in sets)
        model.train(training)
        found.append(held_out)
        scores.append(score(name, fitted, held_out, k=k))
    fitted, held_out = (raw_pixels(batches(shards), pixels=pixels) for shards in sets)
    scores.append(score("raw pixels", fitted, held_out, k=k))
    return Evaluation(scores, found[0])


def _first(checkpoint: str | Place, config: Config) -> dict[str, Encoder]:
    """The encoder that a run began with, by the name of its row."""
    if config.model.init_from is None:
        return {"untrained": load_encoder(checkpoint, weights="first")[0]}
    try:
        return {"init_from": load_encoder(checkpoint, weights="first")[0]}
    except UserError as error:
        logger.warning("no row for the weights that the run began with: %s", error)
        return {}


def _device(named: torch.device | str | None) -> torch.device:
    if named is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(named)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        raise UserError(f"device {named} is not here: {str(error).splitlines()[0]}") from error
    return device
