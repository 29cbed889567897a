"""Linear segmentation on frozen features of patches: a linear layer, its logits brought to the mask's size; one layer for
each learning rate, all at once. Refuses masks of one class alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int, Integer, UInt8
from torch import Tensor, nn

from lejepa_scale.data.masks import IGNORED
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.heads import HeadRecipe, chosen, held_by, trained
from lejepa_scale.evaluation.tokens import Tokens
from lejepa_scale.parallel.collectives import all_reduce_sum, gather_objects
from lejepa_scale.parallel.process_group import rank

logger = logging.getLogger(__name__)
Norm = Literal["batch", "none"]
# Batch, optimizer, weight decay and the middle rate of dinov2's linear head, whose steps are 40,000, on random crops.
RECIPE = HeadRecipe((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 16, 4_000, 1e-4)
_EPS = 1e-5  # of the variance, as BatchNorm's
_AT_ONCE = 1 << 26  # logits that are on the device


@dataclass(frozen=True)
class Segmentation:
    """Numbers of a test set, shares in 0..1, and the table that they come from."""

    miou: float  # mean over the classes that truth or guesses have
    pixel_accuracy: float
    mean_accuracy: float  # mean over the classes that the truth has
    iou: Float64[Tensor, " c"]  # NaN of a class that neither has
    confusion: Int[Tensor, "c c"]  # pixels; rows: true class, columns: guessed class
    settings: dict[str, Any]


class LinearSegmenter(nn.Module):
    """Logits of every patch, and of every pixel by bilinear interpolation between them. mean, scale: features are
    standardized by; begins with weights of N(0, 0.01^2), as the linear head of dinov2, biases 0."""

    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]

    def __init__(self, mean: Float[Tensor, " d"], scale: Float[Tensor, " d"], classes: int, seed: int = 0) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.linear = nn.Linear(len(mean), classes)
        nn.init.normal_(self.linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Float[Tensor, "b l d"], side: int) -> Float[Tensor, "b c {side} {side}"]:
        """Of an image of side x side pixels, whose patches are a square, row by row."""
        logits = self.linear((tokens - self.mean) * self.scale)
        rows = grid(tokens.shape[1])
        maps = logits.mT.unflatten(2, (rows, rows))  # [B, C, h, w]
        return F.interpolate(maps, (side, side), mode="bilinear", align_corners=False)


def grid(patches: int) -> int:
    """Patches along a side. Raises UserError where they are no square."""
    rows = math.isqrt(patches)
    if rows**2 != patches:
        raise UserError(
            f"segmentation needs patches that tile a square image as a square; this encoder has {patches} of them."
        )
    return rows


def segmentation(
    train: Tokens,
    test: Iterable[tuple[Float[Tensor, "_b l d"], UInt8[Tensor, "_b s s"]]],
    recipe: HeadRecipe = RECIPE,
    *,
    classes: int | None = None,
    norm: Norm = "batch",
    device: torch.device | str | None = None,
) -> Segmentation:
    """Numbers of a linear layer on the tokens of patches, by the pixels of all test images together that are not IGNORED.
    The loss is the mean cross entropy of a batch's pixels, ignored ones counted as 0. The rate is the one with the best mean
    IoU on a share of the training images, the smallest of equals; then its layer is trained anew on all.

    test: tokens and masks of this rank's part of the test images, once they are asked for. classes: unset, 1 + the largest
    id of the training masks. norm: "batch" standardizes each feature by its mean and variance over all training patches,
    which is where the running statistics of a BatchNorm before the layer end. Every rank calls, with its part; the numbers
    do not depend on how many there are, but for rounding. device: unset, the CPU. Raises UserError for training masks of one
    class alone, for fewer than 2 training images where rates are chosen, for no test pixels, and where every layer
    diverged."""
    masks = train.masks
    if masks is None or norm not in ("batch", "none"):
        raise UserError(f'segmentation needs tokens with masks, and norm "batch" or "none"; got {norm!r}.')
    side, (length, width) = masks.shape[-1], train.values.shape[1:]
    grid(length)
    seen = _seen(masks)
    if len(seen) < 2:
        said = f"are of class {seen[0]}" if seen else f"are {IGNORED}, which is no class"
        raise UserError(f"all pixels of the {len(train)} training masks {said}: there is nothing to tell apart.")
    count = seen[-1] + 1 if classes is None else classes
    statistics = _statistics(train) if norm == "batch" else (torch.zeros(width), torch.ones(width))
    first = LinearSegmenter(*statistics, count, recipe.seed).to(device or "cpu")
    most = max(1, _AT_ONCE // (count * side**2))

    def loaded(rows: Int[Tensor, " _b"]) -> tuple[Tensor, Tensor]:
        return train.values[rows].to(device or "cpu").float(), masks[rows].to(device or "cpu").long()

    def loss_of(rows: Int[Tensor, " _b"]) -> Callable[[nn.Module], Tensor]:
        tokens, ids = loaded(rows)
        return lambda head: F.cross_entropy(head(tokens, side), ids, ignore_index=IGNORED, reduction="sum") / side**2

    def fit(rates: list[float], index: Int[Tensor, " _k"]) -> list[nn.Module]:
        return trained(first, rates, index, train.own, loss_of, recipe, most=most, name="linear segmentation")

    @torch.no_grad()
    def scores(heads: list[nn.Module], held: Int[Tensor, " _h"]) -> list[float]:
        tables = torch.zeros(len(heads), count, count, dtype=torch.long)
        lost = torch.zeros(len(heads))
        for rows in held_by(held, train.own).split(most):
            tokens, ids = loaded(rows)
            for i, head in enumerate(heads):
                logits = head(tokens, side)
                lost[i] += (~logits.isfinite()).any().cpu()
                tables[i] += confusion_of(logits.argmax(1), ids, count).cpu()
        tables, lost = all_reduce_sum(tables), all_reduce_sum(lost)
        return [torch.nan if bad else _score(table) for table, bad in zip(tables, lost.tolist(), strict=True)]

    def split() -> tuple[Int[Tensor, " k"], Int[Tensor, " h"]]:
        return _hold_out(len(train), recipe)

    head, settings = chosen("linear segmentation", "miou", recipe, len(train), split, fit, scores)
    table, images = torch.zeros(IGNORED, IGNORED, dtype=torch.long), 0
    with torch.no_grad():
        for tokens, ids in test:
            images += len(ids)
            for some, of_some in zip(tokens.split(most), ids.split(most), strict=True):
                guesses = head(some.to(device or "cpu").float(), side).argmax(1)
                table += confusion_of(guesses, of_some.to(guesses), IGNORED).cpu()
    settings |= {"norm": norm, "classes": count, "mask_size": side, "patches": length}
    return _measured(all_reduce_sum(table), count, {**settings, "test_images": sum(gather_objects(images))})


def confusion_of(
    guesses: Int[Tensor, "*pixels"], ids: Integer[Tensor, "*pixels"], classes: int
) -> Int[Tensor, "{classes} {classes}"]:
    """Pixels by true (rows) and guessed class, without those IGNORED."""
    there = ids != IGNORED
    pairs = ids[there].long() * classes + guesses[there]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def iou_of(confusion: Int[Tensor, "c c"]) -> Float64[Tensor, " c"]:
    """Of each class: right pixels by those that are or are guessed to be of it. NaN where there are none."""
    right = confusion.diagonal().double()
    return right / (confusion.sum(0) + confusion.sum(1) - right)


def mean_iou(confusion: Int[Tensor, "c c"]) -> float:
    """Over the classes that truth or guesses have."""
    return float(iou_of(confusion).nanmean())


def _score(confusion: Int[Tensor, "c c"]) -> float:
    return mean_iou(confusion) if int(confusion.sum()) else 0.0  # no pixel of any class is held out


def _measured(table: Int[Tensor, "c c"], classes: int, settings: dict[str, Any]) -> Segmentation:
    """Classes that only the test masks have count as wrong."""
    of_class = table.sum(1)
    if not int(of_class.sum()):
        raise UserError("the test masks have no pixel of any class: nothing can be scored.")
    last = int(of_class.nonzero().max())
    if last >= classes and rank() == 0:
        logger.warning(
            "%d of %d test pixels are of classes beyond the %d of the training masks; they count as wrong.",
            int(of_class[classes:].sum()),
            int(of_class.sum()),
            classes,
        )
    kept = max(classes, last + 1)
    table, of_class = table[:kept, :kept], of_class[:kept]
    recall = table.diagonal().double() / of_class
    accuracy = float(table.diagonal().sum() / table.sum())
    return Segmentation(mean_iou(table), accuracy, float(recall.nanmean()), iou_of(table), table, settings)


def _seen(masks: UInt8[Tensor, "_n _s _s"]) -> list[int]:
    """Class ids of all ranks' masks, ascending."""
    counts = torch.zeros(IGNORED + 1, dtype=torch.long)
    for some in masks.split(1024):
        counts += torch.bincount(some.flatten(), minlength=IGNORED + 1)
    return all_reduce_sum(counts)[:IGNORED].nonzero().flatten().tolist()


def _statistics(train: Tokens) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Mean of each feature over the patches of all ranks, and 1 / deviation."""
    width = train.values.shape[2]
    count = torch.tensor([float(train.values.shape[0] * train.values.shape[1])], dtype=torch.float64)
    total, square = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for some in train.values.split(256):
        total += some.double().sum((0, 1))
    count, total = all_reduce_sum(count), all_reduce_sum(total)
    mean = total / count
    for some in train.values.split(256):
        square += (some.double() - mean).square().sum((0, 1))
    variance = all_reduce_sum(square) / count
    return mean.float(), (variance + _EPS).rsqrt().float()


def _hold_out(count: int, recipe: HeadRecipe) -> tuple[Int[Tensor, " k"], Int[Tensor, " h"]]:
    """Numbers of the images to fit on and of those held out, ascending."""
    if count < 2 or not 0 < recipe.held_out < 1:
        raise UserError(
            f"segmentation needs 2 training images to choose a learning rate by one of them, and a held-out share between 0 "
            f"and 1; got {count} and {recipe.held_out}."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(recipe.seed))
    held = min(count - 1, max(1, round(recipe.held_out * count)))
    return order[held:].sort().values, order[:held].sort().values
