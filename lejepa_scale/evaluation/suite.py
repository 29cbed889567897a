"""Scores of encoders on labelled images: features of every encoder, once, and every protocol on each of them, by all ranks
that there are. Refuses to know where numbers are written."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lejepa_scale.checkpoint import Weights
from lejepa_scale.checkpoint.places import Place
from lejepa_scale.conversion import Given
from lejepa_scale.data import Pixels
from lejepa_scale.data.evaluation import labelled_batches
from lejepa_scale.data.folders import shards_of
from lejepa_scale.data.images.pixels import Ranges
from lejepa_scale.data.index.classes import ClassNumbers, class_numbers
from lejepa_scale.data.index.keys import SampleKeys, keys_of_run
from lejepa_scale.data.index.shards import Shards, index_shards
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.cache import Cache
from lejepa_scale.evaluation.features import POOLED, Extracted, Features, Kind, extract, raw_pixels
from lejepa_scale.evaluation.few_shot import few_shot, summary
from lejepa_scale.evaluation.knn import knn
from lejepa_scale.evaluation.linear_probe import linear_probe
from lejepa_scale.evaluation.logistic import logistic
from lejepa_scale.evaluation.metrics import Guesses, measure
from lejepa_scale.evaluation.retrieval import retrieval
from lejepa_scale.evaluation.spectrum import effective_rank_of
from lejepa_scale.evaluation.subjects import Subject, of_encoder, subjects
from lejepa_scale.model import Encoder
from lejepa_scale.parallel.collectives import counts_of_ranks, gather_objects, gather_rows
from lejepa_scale.parallel.process_group import rank, world_size

logger = logging.getLogger(__name__)
PROTOCOLS = ("knn", "logistic", "linear", "few-shot", "retrieval")


@dataclass(frozen=True)
class Options:
    """Of the protocols; unset values are those that the protocol documents."""

    protocols: tuple[str, ...] = ("knn", "logistic")
    ks: tuple[int, ...] | None = None
    temperature: float = 0.07
    standardize: bool = False
    linear_steps: int | None = None
    linear_norm: str = "none"
    shots: tuple[int | float, ...] | None = None
    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if wrong := [name for name in self.protocols if name not in PROTOCOLS]:
            raise UserError(f"--protocols {wrong[0]} is none of {', '.join(PROTOCOLS)}.")
        if small := [k for k in self.ks or () if k < 1]:
            raise UserError(f"k-NN needs at least 1 neighbour, not k={small[0]}.")


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
    """All results, encoder by encoder; the sets; and the features of the test images by the first encoder."""

    results: list[Result]
    sets: dict[str, dict[str, Any]]
    features: Features
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
    """Frozen features of every image, and protocols that are fitted on `train` and scored on `test`.

    what: a run directory or checkpoint, an export, a folder of timm's or transformers', timm:NAME, several of these, or an
    Encoder (see subjects.py). train, test: labelled shards, or folders of images with a folder for each class. kinds: which
    features (features.KINDS). device: unset, the GPU where there is one. image_size: side in pixels; unset, the encoder's
    own. value_range: of the stored values; unset, that of the encoder. pixels, of an Encoder: what its images are; unset,
    8-bit RGB with ImageNet's mean and deviation. image_key, label_key: members of a sample; unset, those of the run.
    beside: score raw pixels, and of a run the weights that it began with, too. cache: folder where features are kept by
    what they are of; None: nowhere. Inside a process group every rank encodes a part of the images, and takes a part of
    the protocols; the numbers do not depend on how many there are.

    Raises UserError for what is no encoder or no shard, for images without labels, for a device that is not here, for
    features that an encoder does not have, and as the protocols do.
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
    work = Work(sets, numbers, batch, place, chosen, Cache(cache))
    tasks: list[tuple[Subject | None, str, dict[str, Features]]] = []
    for subject in found:
        of_sets = work.features(subject)
        tasks += [(subject, kind.name, {n: x.labelled(kind.name) for n, x in of_sets.items()}) for kind in chosen]
    if beside:
        of_sets = work.raw_pixels(found[0])
        tasks.append((None, POOLED.name, {n: x.labelled(POOLED.name) for n, x in of_sets.items()}))
    sizes = {name: {"images": len(features.labels)} for name, features in tasks[0][2].items()}
    results = _scored(tasks, found[0].image_size, numbers.count, options, place)
    labels = [str(label) for label in numbers.labels or range(numbers.count)]
    return Evaluation(results, sizes, tasks[0][2]["test"], labels)


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


def indexed(sets: dict[str, str | Sequence[str]], keys: SampleKeys) -> tuple[dict[str, Shards], ClassNumbers]:
    """The shards of each set, and the numbers of their classes. What has to be made first, one rank makes for all."""
    for turn in (True, False):
        if (rank() == 0) is turn:
            shards = {name: index_shards(shards_of(patterns), keys=keys) for name, patterns in sets.items()}
            numbers = class_numbers(list(shards.values()))
        gather_objects(turn)
    return shards, numbers


def keys_of_subject(subject: Subject, image_key: str | None, label_key: str | None) -> SampleKeys:
    """The members of a sample: those named, else those of the run that the encoder comes from. Raises UserError where its
    sources have several."""
    if subject.data is not None:
        return keys_of_run(subject.data, image_key, label_key)
    return SampleKeys.parsed(image_key or "", label_key or "cls")


def _named_by(named: Place | str, subject: Subject) -> Subject:
    last = str(named).rstrip("/").rpartition("/")[2]
    return replace(subject, name=last if subject.name in ("trained", last) else f"{last} {subject.name}")


@dataclass
class Work:
    """Encoding, by all ranks."""

    sets: dict[str, Shards]
    numbers: ClassNumbers
    batch: int
    device: torch.device
    kinds: list[Kind]
    cache: Cache

    def features(self, subject: Subject) -> dict[str, Extracted]:
        """Of both sets. The encoder is built where some are not in the cache."""
        model: torch.nn.Module | None = None
        out = {}
        for name, shards in self.sets.items():
            key = self.cache.key(subject, shards, self.numbers)
            known = self.cache.read(key, self.kinds)
            if not all(gather_objects(known is not None)):
                model = subject.build().to(self.device).eval() if model is None else model
                part = extract(
                    model,
                    self._batches(shards, subject),
                    self.device,
                    self.kinds,
                    name=f"{subject.name}, {name}",
                    pixels=subject.pixels,
                    before_classifier=subject.before_classifier,
                    total=int(shards.counts.sum()) // world_size(),
                )
                known = _whole(part)
                if rank() == 0:
                    self.cache.write(key, known)
            assert known is not None
            out[name] = known
        return out

    def raw_pixels(self, like: Subject) -> dict[str, Extracted]:
        """Of images as `like` is given them."""
        return {
            name: _whole(raw_pixels(self._batches(shards, like), pixels=like.pixels))
            for name, shards in self.sets.items()
        }

    def _batches(self, shards: Shards, subject: Subject) -> Any:
        return labelled_batches(
            shards,
            image_size=subject.image_size,
            batch_size=self.batch,
            pixels=subject.pixels,
            classes=self.numbers,
            part=(rank(), world_size()),
        )


def _whole(part: Extracted) -> Extracted:
    """Of all ranks' images, in stored order, on every rank."""
    if world_size() == 1:
        return part
    counts = counts_of_ranks(len(part.labels))
    rows = {}
    for kind, own in part.rows.items():
        width = max(gather_objects(own.shape[1]))
        own = own if len(own) else own.new_zeros(0, width)
        rows[kind] = gather_rows(own[None], counts, same_use=True)[0]
    labels = torch.cat(gather_objects(part.labels))
    return Extracted(rows, labels, [key for keys in gather_objects(part.keys) for key in keys])


# -- protocols


def _scored(
    tasks: list[tuple[Subject | None, str, dict[str, Features]]],
    side: int,
    classes: int,
    options: Options,
    device: torch.device,
) -> list[Result]:
    """Of every task and protocol, in this order. Each is one rank's, so that the numbers are those of one process."""
    pieces = [(task, protocol) for task in tasks for protocol in (*options.protocols, "spectrum")]
    own = []
    for number, ((subject, kind, features), protocol) in enumerate(pieces):
        if number % world_size() != rank():
            continue
        started = time.monotonic()
        rows = _RUN[protocol](features["train"], features["test"], classes, options, device)
        for variant, metrics, settings, confusion in rows:
            name, where = ("raw pixels", "") if subject is None else (subject.name, subject.where)
            size = side if subject is None else subject.image_size
            width = features["train"].rows.shape[1]
            own.append(
                (number, Result(name, where, kind, width, size, protocol, variant, metrics, settings, confusion))
            )
        logger.info("%s of %s features: %.1f s", protocol, kind, time.monotonic() - started)
    found = sorted((piece for part in gather_objects(own) for piece in part), key=lambda piece: piece[0])
    return [result for _, result in found]


_Row = tuple[str, dict[str, Any], dict[str, Any], list[list[int]] | None]


def _row(variant: str, guesses: Guesses, labels: torch.Tensor, classes: int) -> _Row:
    numbers = asdict(measure(guesses, labels, classes))
    confusion = numbers.pop("confusion")
    return variant, numbers, guesses.settings, confusion.tolist() if classes <= _MOST_CONFUSED else None


_MOST_CONFUSED = 1000  # classes whose table is kept
_WIDE = 2048  # features beyond which, as of raw pixels, fits are slow, and a strong penalty is the best one
_OF_PIXELS = tuple(10.0**i for i in range(-6, 1))


def _knn(train: Features, test: Features, classes: int, options: Options, device: torch.device) -> list[_Row]:
    found = knn(train, test, options.ks, options.temperature, device=device)
    return [_row(f"k={k}", guesses, test.labels, classes) for k, guesses in found.items()]


def _logistic(train: Features, test: Features, classes: int, options: Options, device: torch.device) -> list[_Row]:
    few: dict[str, Any] = {"strengths": _OF_PIXELS} if train.rows.shape[1] > _WIDE else {}
    guesses = logistic(train, test, standardize=options.standardize, seed=options.seed, device=device, **few)
    return [_row("", guesses, test.labels, classes)]


def _linear(train: Features, test: Features, classes: int, options: Options, device: torch.device) -> list[_Row]:
    more: dict[str, Any] = {} if options.linear_steps is None else {"steps": options.linear_steps}
    guesses = linear_probe(train, test, norm=options.linear_norm, seed=options.seed, device=device, **more)  # type: ignore[arg-type]
    return [_row("", guesses, test.labels, classes)]


def _few_shot(train: Features, test: Features, classes: int, options: Options, device: torch.device) -> list[_Row]:
    found = few_shot(train, test, shots=options.shots, draws=options.draws, seed=options.seed, device=device)
    rows: list[_Row] = []
    for shot, numbers in summary(found, test.labels, classes).items():
        variant = f"{shot} a class" if isinstance(shot, int) else f"{shot:.0%}"
        metrics = {"top1": numbers["mean"], "std": numbers["std"], "draws": numbers["draws"]}
        rows.append((variant, metrics, {**found[shot][0].settings, "draw": "all"}, None))
    return rows


def _retrieval(train: Features, test: Features, classes: int, options: Options, device: torch.device) -> list[_Row]:
    found = retrieval(test, train, device=device)
    metrics = {"map": found["map"], **{f"recall@{k}": value for k, value in found["recall"].items()}}
    return [
        ("", metrics, {"queries": found["queries"], "without_match": found["without_match"], "gallery": "train"}, None)
    ]


def _spectrum(train: Features, test: Features, classes: int, options: Options, device: torch.device) -> list[_Row]:
    rows = test.rows.double()
    rows = rows - rows.mean(0)
    return [("", {"effective_rank": effective_rank_of(rows.T @ rows)}, {"of": "test"}, None)]


_RUN: dict[str, Callable[[Features, Features, int, Options, torch.device], list[_Row]]] = {
    "knn": _knn,
    "logistic": _logistic,
    "linear": _linear,
    "few-shot": _few_shot,
    "retrieval": _retrieval,
    "spectrum": _spectrum,
}


def device_of(named: torch.device | str | None) -> torch.device:
    """The one that is named, else the GPU where there is one. Raises UserError where it is not here."""
    if named is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(named)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        raise UserError(f"device {named} is not here: {str(error).splitlines()[0]}") from error
    return device
