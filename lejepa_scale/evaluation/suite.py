"""Scores of encoders on labelled images: features of every encoder, once, and every protocol on each of them, by all ranks
that there are. Refuses to know where numbers are written."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lejepa_scale.checkpoint import Weights
from lejepa_scale.checkpoint.places import Place
from lejepa_scale.conversion import Given
from lejepa_scale.data import Pixels
from lejepa_scale.data.images.pixels import Ranges
from lejepa_scale.data.index.classes import ClassNumbers
from lejepa_scale.data.index.keys import SampleKeys, keys_of_run
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.cache import Cache
from lejepa_scale.evaluation.features import POOLED, Features, Kind
from lejepa_scale.evaluation.protocols import OF_ALL_FEATURES, ON_FEATURES, ON_IMAGES, WITHOUT_LABELS, Options, Row
from lejepa_scale.evaluation.subjects import Subject, of_encoder, subjects
from lejepa_scale.evaluation.work import Work, device_of, indexed
from lejepa_scale.model import Encoder
from lejepa_scale.parallel.collectives import gather_objects
from lejepa_scale.parallel.process_group import rank, world_size

logger = logging.getLogger(__name__)
RAW = "raw pixels"
_SEVERAL = re.compile(r"\[.*\]|[0-9]+(?:\s*[,;|\s]\s*[0-9]+)+")  # several classes, written as one


@dataclass(frozen=True)
class Result:
    """One number of one encoder, and how to get it again. Shares are in 0..1."""

    subject: str
    where: str
    features: str
    width: int
    image_size: int
    protocol: str
    variant: str  # k=20, 5 a class, ...
    metrics: dict[str, Any]
    settings: dict[str, Any]
    confusion: list[list[int]] | None = None


@dataclass(frozen=True)
class Evaluation:
    """All results, encoder by encoder; the sets; and the features of the test images by the first encoder, where a protocol
    takes features."""

    results: list[Result]
    sets: dict[str, dict[str, Any]]
    features: Features | None
    classes: list[str] = field(default_factory=list)

    def value(
        self, subject: str, protocol: str, metric: str = "top1", features: str = "pooled", variant: str = ""
    ) -> float:
        """One number. Raises KeyError where it was not measured."""
        for row in self.results:
            if (row.subject, row.protocol, row.features) == (subject, protocol, features) and variant in (
                "",
                row.variant,
            ):
                return float(row.metrics[metric])
        raise KeyError((subject, protocol, features, variant))


def evaluate(
    what: Encoder | Place | str | Sequence[Place | str],
    train: str | Sequence[str],
    test: str | Sequence[str],
    *,
    kinds: Sequence[str] = (POOLED.name,),
    options: Options | None = None,
    batch: int = 256,
    device: torch.device | str | None = None,
    image_size: int | None = None,
    given: Given | None = None,
    weights: Weights | None = None,
    value_range: Ranges | None = None,
    pixels: Pixels | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    beside: bool = True,
    cache: Path | None = None,
) -> Evaluation:
    """Frozen features of every image, and protocols that are fitted on `train` and scored on `test`; protocols on tokens of
    patches, and fine-tuning, on the images themselves.

    what: a run directory or checkpoint, an export, a folder of timm's or transformers', timm:NAME, several of these, or an
    Encoder (see subjects.py). train, test: labelled shards, or folders of images with a folder for each class. kinds: which
    features (features.KINDS). device: unset, the GPU where there is one. image_size: side in pixels; unset, the encoder's
    own. value_range: of the stored values; unset, that of the encoder. pixels, of an Encoder: what its images are; unset,
    8-bit RGB with ImageNet's mean and deviation. image_key, label_key: members of a sample; unset, those of the run.
    beside: score raw pixels, and of a run the weights that it began with, too. cache: folder where features are kept by
    what they are of, and where tokens of patches are put while they are needed; None: nowhere, and where temporary files
    are. Inside a process group every rank encodes a part of the images, and takes a part of the protocols on features; those
    on images are of all ranks together. The numbers do not depend on how many there are, but for rounding.

    Raises UserError for what is no encoder or no shard, for images without labels or with several, for a device that is not
    here, for features that an encoder does not have, and as the protocols do.
    """
    if batch < 1:
        raise UserError(f"evaluation needs at least 1 image a batch, not batch={batch}.")
    options, place = options or Options(), device_of(device)
    chosen = [Kind(name) for name in dict.fromkeys(kinds)]
    if isinstance(what, Encoder):
        if image_size is None:
            raise UserError("evaluate() of an Encoder needs image_size, the side in pixels that it is scored at.")
        if value_range is not None:
            raise UserError(
                "evaluate() of an Encoder takes what its images are as pixels=Pixels(channels, range, ...)."
            )
        found = [of_encoder(what, "encoder", image_size, pixels or Pixels())]
        keys = SampleKeys.parsed(image_key or "", label_key or "cls")
    else:
        if pixels is not None:
            raise UserError("evaluate() of a checkpoint knows its pixels: value_range alone may be another.")
        named = [what] if isinstance(what, str | Place) else list(what)
        found, keys = _several(named, given, weights, image_size, value_range, beside, image_key, label_key)
    sets, numbers = indexed({"train": train, "test": test}, keys)
    if not set(options.protocols) <= set(WITHOUT_LABELS):
        _refuse_several(numbers)
    work = Work(sets, numbers, batch, place, chosen, Cache(cache))
    images_alone = bool(options.protocols) and set(options.protocols) <= ON_IMAGES.keys()
    tasks = [] if images_alone else _features(work, found, chosen, beside)
    results = _of_features(tasks, found[0].image_size, numbers.count, options, place)
    for protocol in options.protocols:
        if protocol in ON_IMAGES:
            results += [result for subject in found for result in _of_images(protocol, work, subject, options)]
    order = {name: number for number, name in enumerate([*(subject.name for subject in found), RAW])}
    results.sort(key=lambda result: order[result.subject])
    sizes = {name: {"images": _size(name, tasks, results)} for name in ("train", "test")}
    labels = [str(label) for label in numbers.labels or range(numbers.count)]
    return Evaluation(results, sizes, tasks[0][2]["test"] if tasks else None, labels)


_Task = tuple[Subject | None, str, dict[str, Features]]  # raw pixels are of no subject


def _features(work: Work, found: list[Subject], chosen: list[Kind], beside: bool) -> list[_Task]:
    tasks: list[_Task] = []
    for subject in found:
        of_sets = work.features(subject)
        tasks += [(subject, kind.name, {n: x.labelled(kind.name) for n, x in of_sets.items()}) for kind in chosen]
    if beside:
        of_sets = work.raw_pixels(found[0])
        tasks.append((None, POOLED.name, {n: x.labelled(POOLED.name) for n, x in of_sets.items()}))
    return tasks


def _size(name: str, tasks: list[_Task], results: list[Result]) -> int:
    """Images of a set that were scored."""
    if tasks:
        return len(tasks[0][2][name].labels)
    return int(results[0].settings[f"{name}_images"])


def _refuse_several(numbers: ClassNumbers) -> None:
    """Labels that are lists: each would be a class of its own."""
    for label in numbers.labels or ():
        if isinstance(label, str) and _SEVERAL.fullmatch(label):
            raise UserError(
                f"the label {label!r} holds several classes: images of several classes (multi-label) cannot be scored by a "
                "share of right guesses. Give one class an image: write .cls members with one number or name, or name one "
                "with --label-key json:PATH."
            )


def _several(
    named: Sequence[Place | str],
    given: Given | None,
    weights: Weights | None,
    image_size: int | None,
    value_range: Ranges | None,
    beside: bool,
    image_key: str | None,
    label_key: str | None,
) -> tuple[list[Subject], SampleKeys]:
    """Every encoder that is named, under names that differ, and the keys of the samples."""
    if not named:
        raise UserError("there is nothing to evaluate: name a run, an export or timm:NAME.")
    if len(named) > 1 and given is not None and given.encoder is not None:
        raise UserError("--encoder says which encoder one file of weights is for: evaluate several one after another.")
    out, keys = list[Subject](), set[SampleKeys]()
    for one in named:
        alone = len(named) == 1
        many = subjects(
            one, given=given, weights=weights, image_size=image_size, value_range=value_range, beside=beside and alone
        )
        keys.add(keys_of_subject(many[0], image_key, label_key))
        out += many if alone else [_named_by(one, subject) for subject in many]
    if len(keys) > 1:
        raise UserError("the runs name other members of a sample: say which with --image-key and --label-key.")
    names = Counter(subject.name for subject in out)
    return [s if names[s.name] == 1 else replace(s, name=f"{s.where or s.name}, {s.name}") for s in out], keys.pop()


def keys_of_subject(subject: Subject, image_key: str | None, label_key: str | None) -> SampleKeys:
    """The members of a sample: those named, else those of the run that the encoder comes from. Raises UserError where its
    sources have several."""
    if subject.data is not None:
        return keys_of_run(subject.data, image_key, label_key)
    return SampleKeys.parsed(image_key or "", label_key or "cls")


def _named_by(named: Place | str, subject: Subject) -> Subject:
    last = str(named).rstrip("/").rpartition("/")[2]
    return replace(subject, name=last if subject.name in ("trained", last) else f"{last} {subject.name}")


# -- protocols


def _of_features(tasks: list[_Task], side: int, classes: int, options: Options, device: torch.device) -> list[Result]:
    """Of every task and protocol, in this order. Each is one rank's, so that the numbers are those of one process."""
    run = {name: ON_FEATURES[name] for name in options.protocols if name in ON_FEATURES} | OF_ALL_FEATURES
    pieces = [(task, protocol) for task in tasks for protocol in run]
    own = []
    for number, ((subject, kind, features), protocol) in enumerate(pieces):
        if number % world_size() != rank():
            continue
        started = time.monotonic()
        rows = run[protocol](features["train"], features["test"], classes, options, device)
        width = features["train"].rows.shape[1]
        own += [(number, _result(subject, side, kind, width, protocol, row)) for row in rows]
        logger.info("%s of %s features: %.1f s", protocol, kind, time.monotonic() - started)
    found = sorted((piece for part in gather_objects(own) for piece in part), key=lambda piece: piece[0])
    return [result for _, result in found]


def _of_images(protocol: str, work: Work, subject: Subject, options: Options) -> list[Result]:
    """By all ranks."""
    started = time.monotonic()
    found = ON_IMAGES[protocol](work, subject, options)
    if rank() == 0:
        logger.info("%s of %s: %.1f s", protocol, subject.name, time.monotonic() - started)
    return [_result(subject, subject.image_size, found.features, found.width, protocol, row) for row in found.rows]


def _result(subject: Subject | None, side: int, kind: str, width: int, protocol: str, row: Row) -> Result:
    name, where = (RAW, "") if subject is None else (subject.name, subject.where)
    size = side if subject is None else subject.image_size
    return Result(name, where, kind, width, size, protocol, row.variant, row.metrics, row.settings, row.confusion)
