"""The protocols by name, what may be set of them, and how each is run. Those on features are one rank's; those on the images
are of all ranks together. Refuses to know where images come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lejepa_scale.data.evaluation import Labelled
from lejepa_scale.data.masks import IGNORED
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.attentive import RECIPE as ATTENTIVE
from lejepa_scale.evaluation.attentive import attentive
from lejepa_scale.evaluation.features import POOLED, Features, expect_labels
from lejepa_scale.evaluation.few_shot import few_shot, summary
from lejepa_scale.evaluation.finetune import RECIPE as FINETUNE
from lejepa_scale.evaluation.finetune import FinetuneRecipe, finetune
from lejepa_scale.evaluation.heads import HeadRecipe
from lejepa_scale.evaluation.knn import knn
from lejepa_scale.evaluation.linear_probe import linear_probe
from lejepa_scale.evaluation.logistic import logistic
from lejepa_scale.evaluation.metrics import Guesses, measure, warn_of_unseen
from lejepa_scale.evaluation.retrieval import retrieval
from lejepa_scale.evaluation.segmentation import RECIPE as SEGMENTATION
from lejepa_scale.evaluation.segmentation import Norm, segmentation
from lejepa_scale.evaluation.spectrum import effective_rank_of
from lejepa_scale.evaluation.subjects import Subject
from lejepa_scale.evaluation.tokens import LIMIT, stored
from lejepa_scale.evaluation.work import Work
from lejepa_scale.parallel.collectives import gather_objects
from lejepa_scale.parallel.process_group import rank

PROTOCOLS = ("knn", "logistic", "linear", "few-shot", "retrieval", "attentive", "segmentation", "finetune")


@dataclass(frozen=True)
class Options:
    """Of the protocols; unset values are those that the protocol documents. mask_key: the ending of the members that are
    masks. mask_classes: unset, 1 + the largest class id of the training masks. disk_limit: of stored tokens. seed: of
    all of them, the recipes too."""

    protocols: tuple[str, ...] = ("knn", "logistic")
    ks: tuple[int, ...] | None = None
    temperature: float = 0.07
    standardize: bool = False
    linear_steps: int | None = None
    linear_norm: str = "none"
    shots: tuple[int | float, ...] | None = None
    draws: int = 5
    seed: int = 0
    attentive: HeadRecipe = ATTENTIVE
    segmentation: HeadRecipe = SEGMENTATION
    segmentation_norm: Norm = "batch"
    mask_key: str = "mask.png"
    mask_classes: int | None = None
    disk_limit: float = LIMIT  # GB
    finetune: FinetuneRecipe = FINETUNE

    def __post_init__(self) -> None:
        if wrong := [name for name in self.protocols if name not in PROTOCOLS]:
            raise UserError(f"--protocols {wrong[0]} is none of {', '.join(PROTOCOLS)}.")
        if self.mask_classes is not None and not 2 <= self.mask_classes <= IGNORED:
            raise UserError(f"--mask-classes is from 2 to {IGNORED}, not {self.mask_classes}.")
        if small := [k for k in self.ks or () if k < 1]:
            raise UserError(f"k-NN needs at least 1 neighbour, not k={small[0]}.")


@dataclass(frozen=True)
class Row:
    """One number of a protocol, and how it was made."""

    variant: str  # k=20, 5 a class, ...
    metrics: dict[str, Any]
    settings: dict[str, Any]
    confusion: list[list[int]] | None = None


def _row(variant: str, guesses: Guesses, labels: torch.Tensor, classes: int) -> Row:
    numbers = asdict(measure(guesses, labels, classes))
    confusion = numbers.pop("confusion")
    return Row(variant, numbers, guesses.settings, confusion.tolist() if classes <= _MOST_CONFUSED else None)


_MOST_CONFUSED = 1000  # classes whose table is kept
_WIDE = 2048  # features beyond which, as of raw pixels, fits are slow, and a strong penalty is the best one
_OF_PIXELS = tuple(10.0**i for i in range(-6, 1))


def _knn(train: Features, test: Features, classes: int, options: Options, device: torch.device) -> list[Row]:
    found = knn(train, test, options.ks, options.temperature, device=device)
    return [_row(f"k={k}", guesses, test.labels, classes) for k, guesses in found.items()]


def _logistic(train: Features, test: Features, classes: int, options: Options, device: torch.device) -> list[Row]:
    few: dict[str, Any] = {"strengths": _OF_PIXELS} if train.rows.shape[1] > _WIDE else {}
    guesses = logistic(train, test, standardize=options.standardize, seed=options.seed, device=device, **few)
    return [_row("", guesses, test.labels, classes)]


def _linear(train: Features, test: Features, classes: int, options: Options, device: torch.device) -> list[Row]:
    more: dict[str, Any] = {} if options.linear_steps is None else {"steps": options.linear_steps}
    guesses = linear_probe(train, test, norm=options.linear_norm, seed=options.seed, device=device, **more)  # type: ignore[arg-type]
    return [_row("", guesses, test.labels, classes)]


def _few_shot(train: Features, test: Features, classes: int, options: Options, device: torch.device) -> list[Row]:
    found = few_shot(train, test, shots=options.shots, draws=options.draws, seed=options.seed, device=device)
    rows: list[Row] = []
    for shot, numbers in summary(found, test.labels, classes).items():
        variant = f"{shot} a class" if isinstance(shot, int) else f"{shot:.0%}"
        metrics = {"top1": numbers["mean"], "std": numbers["std"], "draws": numbers["draws"]}
        rows.append(Row(variant, metrics, {**found[shot][0].settings, "draw": "all"}))
    return rows


def _retrieval(train: Features, test: Features, classes: int, options: Options, device: torch.device) -> list[Row]:
    found = retrieval(test, train, device=device)
    metrics = {"map": found["map"], **{f"recall@{k}": value for k, value in found["recall"].items()}}
    settings = {"queries": found["queries"], "without_match": found["without_match"], "gallery": "train"}
    return [Row("", metrics, settings)]


def _spectrum(train: Features, test: Features, classes: int, options: Options, device: torch.device) -> list[Row]:
    rows = test.rows.double()
    rows = rows - rows.mean(0)
    return [Row("", {"effective_rank": effective_rank_of(rows.T @ rows)}, {"of": "test"})]


ON_FEATURES: dict[str, Callable[[Features, Features, int, Options, torch.device], list[Row]]] = {
    "knn": _knn,
    "logistic": _logistic,
    "linear": _linear,
    "few-shot": _few_shot,
    "retrieval": _retrieval,
}
OF_ALL_FEATURES = {"spectrum": _spectrum}  # asked for or not


# -- on the images themselves, by all ranks together


@dataclass(frozen=True)
class Scored:
    """What a protocol finds on the images: rows, of which features and how wide."""

    rows: list[Row]
    features: str
    width: int


def _attentive(work: Work, subject: Subject, options: Options) -> Scored:
    model, labels = work.model(subject), list[torch.Tensor]()
    with closing(work.tokens("train", subject, model, normalize=True)) as found:
        tokens = stored(found, *work.images("train"), folder=work.cache.folder, limit=options.disk_limit)

    def test() -> Iterator[torch.Tensor]:
        for values, batch in work.tokens("test", subject, model, normalize=True):
            labels.append(batch.labels)
            yield values

    guesses = attentive(tokens, test(), replace(options.attentive, seed=options.seed), device=work.device)
    row = _of_all_ranks(guesses, labels, tokens.labels, work)
    return Scored([row], "patches", tokens.values.shape[2])


def _finetune(work: Work, subject: Subject, options: Options) -> Scored:
    model: Any = subject.build()
    labels = list[torch.Tensor]()
    samples = work.samples("train", subject)

    def test() -> Iterator[Labelled]:
        for batch in work.labelled("test", subject):
            labels.append(batch.labels)
            yield batch

    name, recipe = f"{subject.name}, fine-tuning", replace(options.finetune, seed=options.seed)
    guesses = finetune(model, samples, test(), recipe, at_once=work.batch, device=work.device, name=name)
    row = _of_all_ranks(guesses, labels, samples.labels, work)
    return Scored([row], POOLED.name, int(getattr(model, "head_hidden_size", model.num_features)))


def _segmentation(work: Work, subject: Subject, options: Options) -> Scored:
    model, classes = work.model(subject), options.mask_classes
    train, test = (work.segmented(name, subject, model, options.mask_key, classes) for name in ("train", "test"))
    with closing(train):
        tokens = stored(train, *work.images("train"), folder=work.cache.folder, limit=options.disk_limit)
    found = segmentation(
        tokens,
        ((values, batch.masks) for values, batch in test),
        replace(options.segmentation, seed=options.seed),
        classes=classes,
        norm=options.segmentation_norm,
        device=work.device,
    )
    metrics: dict[str, Any] = {name: getattr(found, name) for name in ("miou", "pixel_accuracy", "mean_accuracy")}
    metrics |= {f"iou_{number}": iou for number, iou in enumerate(found.iou.tolist()) if not math.isnan(iou)}
    settings = {**found.settings, "mask_key": options.mask_key}
    return Scored([Row("", metrics, settings, found.confusion.tolist())], "patches", tokens.values.shape[2])


def _of_all_ranks(guesses: Guesses, labels: list[torch.Tensor], train_labels: torch.Tensor, work: Work) -> Row:
    """The measures of the guesses for all ranks' test images."""
    own = torch.cat(labels) if labels else torch.zeros(0, dtype=torch.long)
    everyones = torch.cat(gather_objects(own))
    expect_labels(everyones)
    if rank() == 0:
        warn_of_unseen(train_labels.unique(), everyones)
    whole = Guesses(torch.cat(gather_objects(guesses.ranked)), {**guesses.settings, "test_images": len(everyones)})
    return _row("", whole, everyones, work.numbers.count)


ON_IMAGES: dict[str, Callable[[Work, Subject, Options], Scored]] = {
    "attentive": _attentive,
    "segmentation": _segmentation,
    "finetune": _finetune,
}
WITHOUT_LABELS = ("segmentation",)
