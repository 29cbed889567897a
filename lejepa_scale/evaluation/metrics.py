"""What a protocol on frozen features hands back, how it is measured, and which sets no protocol can be run on: sets without
rows, of several widths, with several labels an image, or with one class alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import Features

logger = logging.getLogger(__name__)

_Z = NormalDist().inv_cdf(0.975)  # 95 %, two-sided


@dataclass(frozen=True)
class Guesses:
    """The likeliest classes of every test image: at most five, and no more than the training set has."""

    ranked: Int[Tensor, "n r"]  # likeliest first
    settings: dict[str, Any]  # what the protocol chose or used, to be written beside the number


@dataclass(frozen=True)
class Metrics:
    """Numbers of one test set, all in 0..1 but `confusion` and `count`."""

    top1: float
    top5: float
    mean_per_class: float
    low: float  # of the 95 % Wilson interval of top1
    high: float
    confusion: Int[Tensor, "c c"]  # rows: true class, columns: guessed class
    count: int


def measure(guesses: Guesses, labels: Int[Tensor, " n"], classes: int) -> Metrics:
    """Metrics of the guesses against the labels of the same images; memory: 8 x classes^2 bytes.

    top5: the label is among all ranked guesses. With at most 5 classes every class is guessed, so top5 is 1.0 and says
    nothing (but for images whose class the training set does not have). mean_per_class: mean over the classes that the
    test set has, each weighing the same. Raises UserError for no images, for guesses of another number of images, and
    for classes that are not in 0..classes - 1.
    """
    ranked, labels = guesses.ranked.cpu(), labels.cpu()
    if len(labels) == 0:
        raise UserError("nothing to measure: the test set has 0 images.")
    if len(ranked) != len(labels):
        raise UserError(f"guesses of {len(ranked)} images cannot be measured against {len(labels)} labels.")
    low, high = min(int(ranked.min()), int(labels.min())), max(int(ranked.max()), int(labels.max()))
    if low < 0 or high >= classes:
        raise UserError(f"classes lie in {low}..{high}; {classes} classes are numbered 0..{classes - 1}.")
    hit = ranked == labels[:, None]
    confusion = torch.bincount(labels.long() * classes + ranked[:, 0], minlength=classes**2).view(classes, classes)
    of_class = confusion.sum(1)
    there = of_class > 0
    recalls = confusion.diagonal()[there].double() / of_class[there]
    hits, count = int(hit[:, 0].sum()), len(labels)
    bounds = wilson(hits, count)
    return Metrics(hits / count, int(hit.any(1).sum()) / count, float(recalls.mean()), *bounds, confusion, count)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of hits (Wilson 1927): (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n). Raises
    UserError unless 0 <= hits <= n and n > 0."""
    if not 0 <= hits <= n or n == 0:
        raise UserError(f"an interval needs 0 <= hits <= n and n > 0; got {hits} hits of {n}.")
    p, square = hits / n, _Z**2 / n
    half = _Z * math.sqrt(p * (1 - p) / n + square / (4 * n))
    low, high = (p + square / 2 - half) / (1 + square), (p + square / 2 + half) / (1 + square)
    return (0.0 if hits == 0 else low), (1.0 if hits == n else high)  # exact there; rounding would leave 1e-17


def join(parts: Sequence[Guesses]) -> Guesses:
    """Guesses of contiguous parts of a test set, in the order of their ranks, as those of the whole. Raises UserError for no
    parts and where the parts did not choose the same settings."""
    if not parts:
        raise UserError("there are no parts to join.")
    if any(part.settings != parts[0].settings for part in parts):
        raise UserError(f"parts of one test set have other settings: {[part.settings for part in parts]}.")
    return Guesses(torch.cat([part.ranked for part in parts]), parts[0].settings)


def part_of(count: int, share: tuple[int, int]) -> range:
    """The rows that process `rank` of `world` handles, (rank, world) = share: contiguous, sizes differ by one at most, none
    where there are more processes than rows. Raises UserError unless 0 <= rank < world."""
    rank, world = share
    if not 0 <= rank < world:
        raise UserError(f"share=(rank, world) needs 0 <= rank < world; got {share}.")
    return range(count * rank // world, count * (rank + 1) // world)


def classes_of(train: Features, test: Features) -> Int[Tensor, " c"]:
    """The classes of the training set, ascending. Logs a warning for test images of other classes, which no protocol can
    guess. Raises UserError for sets that no protocol can be run on, see `check`, and for a training set of one class."""
    check(("training", train), ("test", test))
    seen = classes_of_labels(train.labels)
    warn_of_unseen(seen, test.labels)
    return seen


def classes_of_labels(labels: Int[Tensor, " n"]) -> Int[Tensor, " c"]:
    """The classes of a training set, ascending. Raises UserError for one class alone."""
    seen = labels.unique()
    if len(seen) < 2:
        raise UserError(
            f"all {len(labels)} images of the training set are of class {int(seen[0])}: there is nothing to tell "
            "apart. Give images of at least two classes."
        )
    return seen


def warn_of_unseen(seen: Int[Tensor, " c"], labels: Int[Tensor, " n"]) -> None:
    """Logs a warning for test images of classes that the training set does not have."""
    unseen = ~torch.isin(labels, seen)
    if unseen.any():
        logger.warning(
            "%d of %d test images are of %d class(es) that the training set does not have (first: class %d); they count as "
            "wrong.",
            int(unseen.sum()),
            len(unseen),
            len(labels[unseen].unique()),
            int(labels[unseen].min()),
        )


def check(*sets: tuple[str, Features]) -> None:
    """Raises UserError where a set (named, for the message) has no rows, several labels an image or another number of labels
    than rows, and where the sets' widths differ."""
    for name, features in sets:
        if features.labels.ndim != 1:
            raise UserError(
                f"labels of the {name} set have shape {list(features.labels.shape)}: several labels an image (multi-label) "
                "are not supported. Give one class number an image."
            )
        if len(features.rows) == 0:
            raise UserError(f"the {name} set has 0 images: nothing can be evaluated.")
        if len(features.rows) != len(features.labels):
            raise UserError(f"the {name} set has {len(features.rows)} rows and {len(features.labels)} labels.")
    widths = {name: features.rows.shape[1] for name, features in sets}
    if len(set(widths.values())) > 1:
        said = " and ".join(f"{name} {width}" for name, width in widths.items())
        raise UserError(f"widths of the features differ: {said}. Both sets need the same encoder and the same pooling.")


def likeliest(scores: Float[Tensor, "n c"], classes: Int[Tensor, " c"]) -> Int[Tensor, "n r"]:
    """The up to five classes of the largest scores, largest first; of equal scores, the smaller class."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, : min(5, len(classes))]
    return classes[order.to(classes.device)]
