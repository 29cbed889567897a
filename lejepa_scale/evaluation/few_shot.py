"""Classification with a few labelled images of every class: a classifier fitted on each of several random draws. Refuses
shots that no class has, and shares outside 0..1."""

from __future__ import annotations

import logging
import random
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import Features
from lejepa_scale.evaluation.logistic import fitted, guess
from lejepa_scale.evaluation.metrics import Guesses, classes_of, likeliest, measure

logger = logging.getLogger(__name__)

Shot = int | float
Classifier = Literal["logistic", "centroid"]
SHOTS: tuple[Shot, ...] = (1, 5, 10, 0.01, 0.1)
STRENGTHS = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)  # of C, for draws of which something can be held out
_ALONE = 1.0  # C where nothing can: scikit-learn's default
_ROWS = 8192


def few_shot(
    train: Features,
    test: Features,
    *,
    shots: Sequence[Shot] | None = None,
    draws: int = 5,
    classifier: Classifier = "logistic",
    seed: int = 0,
    device: torch.device | str | None = None,
) -> dict[Shot, list[Guesses]]:
    """For every shot, the guesses after each of `draws` random draws of labelled training images.

    shots: an int is the images of every class (all that a class has, where it has fewer; logged), a float between 0 and 1
    a share of every class, rounded, at least one image. Unset: those of 1, 5, 10, 1 % and 10 % that some class has. A draw
    follows from (seed, shot, its number) and the labels alone. classifier: "logistic", see `logistic`: features of unit
    length, C of 1e-2..1e3 chosen on a tenth of the draw, at least one image a class, or 1.0 where each class has one;
    "centroid": the nearest class mean of features of unit length, by Euclidean distance (SimpleShot's L2N, Wang et al.
    2019). device: unset, the CPU. Raises UserError for shots that no class has, for shares outside 0..1, for no draws,
    and for sets that cannot be evaluated.
    """
    classes = classes_of(train, test)
    if draws < 1 or classifier not in ("logistic", "centroid"):
        raise UserError(
            f'few-shot needs at least 1 draw and the classifier "logistic" or "centroid"; got draws={draws}, {classifier!r}.'
        )
    chosen = _possible(shots, train.labels)
    found: dict[Shot, list[Guesses]] = {}
    for shot in chosen:
        found[shot] = []
        for draw in range(draws):
            index = drawn(train.labels, shot, draw, seed)
            some = Features(F.normalize(train.rows[index], dim=1), train.labels[index])
            settings = {"shot": shot, "draw": draw, "seed": seed, "images": len(index), "classifier": classifier}
            found[shot].append(_guessed(some, test.rows, classes, settings, device))
        _report(shot, found[shot])
    return found


def summary(
    found: dict[Shot, list[Guesses]], labels: Int[Tensor, " n"], classes: int
) -> dict[Shot, dict[str, float | int | None]]:
    """For every shot: mean of top1 over the draws, their standard deviation (of a sample: draws - 1; None for one draw) and
    their number. Raises UserError as `metrics.measure`."""
    numbers: dict[Shot, dict[str, float | int | None]] = {}
    for shot, guesses in found.items():
        tops = [measure(draw, labels, classes).top1 for draw in guesses]
        std = statistics.stdev(tops) if len(tops) > 1 else None
        numbers[shot] = {"mean": statistics.fmean(tops), "std": std, "draws": len(tops)}
    return numbers


def drawn(labels: Int[Tensor, " n"], shot: Shot, draw: int, seed: int) -> Int[Tensor, " k"]:
    """Numbers of the training rows of one draw, ascending: `shot` of every class, or the share `shot` of it."""
    mixed = random.Random(f"few-shot {seed} {shot!r} {draw}").getrandbits(63)  # of a string: by SHA-512, in any process
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(mixed))
    order = order[labels[order].sort(stable=True).indices]  # by class, in random order within
    rows = order.split(labels.unique(return_counts=True)[1].tolist())
    return torch.cat([r[: _count(shot, len(r))] for r in rows]).sort().values


def _count(shot: Shot, images: int) -> int:
    return min(shot, images) if isinstance(shot, int) else max(1, round(shot * images))


def _possible(shots: Sequence[Shot] | None, labels: Int[Tensor, " n"]) -> list[Shot]:
    counts = labels.unique(return_counts=True)[1]
    most = int(counts.max())
    if shots is None:
        return [shot for shot in SHOTS if shot <= most]
    for shot in shots:
        if isinstance(shot, int) and not 1 <= shot <= most:
            raise UserError(f"shot {shot} is a number of images of every class, from 1 to the {most} of the largest.")
        if isinstance(shot, float) and not 0 < shot < 1:
            raise UserError(
                f"shot {shot} is a share of every class and lies between 0 and 1; a number of images is an int, and the "
                "whole training set is what the other protocols take."
            )
        if isinstance(shot, int) and (fewer := int((counts < shot).sum())):
            logger.warning(
                "%d of %d classes have fewer than %d images; all of theirs are drawn.", fewer, len(counts), shot
            )
    if not shots:
        raise UserError("few-shot needs at least one shot; got none.")
    return list(shots)


def _guessed(
    train: Features,
    rows: Float[Tensor, "n e"],
    classes: Int[Tensor, " c"],
    settings: dict[str, Any],
    device: torch.device | str | None,
) -> Guesses:
    if settings["classifier"] == "centroid":
        return Guesses(_nearest_mean(train, rows, classes), settings)
    several = len(train.labels) > len(classes)  # each class has an image: some class has two
    model, chosen = fitted(
        train,
        classes,
        STRENGTHS if several else (_ALONE,),
        held_out=0.1,
        standardize=False,
        seed=settings["seed"],
        max_iterations=1000,
        device=device,
    )
    return Guesses(torch.cat([guess(model, x, classes) for x in _unit(rows)]), settings | chosen)


def _nearest_mean(train: Features, rows: Float[Tensor, "n e"], classes: Int[Tensor, " c"]) -> Int[Tensor, "n r"]:
    places = torch.searchsorted(classes, train.labels)
    sums = torch.zeros(len(classes), rows.shape[1], dtype=torch.float64).index_add_(0, places, train.rows.double())
    means = sums / places.bincount()[:, None]
    ranked = []
    for x in _unit(rows):  # |x - m|^2 without |x|^2, which is the same for all classes
        ranked.append(likeliest(2 * x.double() @ means.T - means.square().sum(1), classes))
    return torch.cat(ranked)


def _unit(rows: Float[Tensor, "n e"]) -> Iterator[Float[Tensor, "_m e"]]:
    return (F.normalize(x, dim=1) for x in rows.split(_ROWS))


def _report(shot: Shot, guesses: list[Guesses]) -> None:
    """One warning for all draws of a shot."""
    chosen = [g.settings["strength"] for g in guesses if g.settings.get("held_out_rows")]
    ends = sum(strength in (STRENGTHS[0], STRENGTHS[-1]) for strength in chosen)
    if ends:
        logger.warning("shot %s: the best C was at the end of its grid in %d of %d draws.", shot, ends, len(guesses))
    lost = sum(not g.settings.get("converged", True) for g in guesses)
    if lost:
        logger.warning("shot %s: logistic regression did not converge in %d of %d draws.", shot, lost, len(guesses))
