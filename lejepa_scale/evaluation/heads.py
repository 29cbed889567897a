"""Training as evaluation does it: batches of rows of a set, of which every rank holds some; one head for each learning rate,
all at once; and the choice between the rates. Refuses to know what a head is."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lejepa_scale.errors import UserError
from lejepa_scale.parallel.collectives import all_reduce_sum
from lejepa_scale.parallel.process_group import rank
from lejepa_scale.progress import bar

logger = logging.getLogger(__name__)
_WARMUP = 0.1  # of all steps


@dataclass(frozen=True)
class HeadRecipe:
    """How heads are trained: AdamW, learning rates as they are, warm-up over a tenth of the steps and then a cosine to 0,
    weight decay of matrices alone. held_out: share of the images by which the rate is chosen. Raises UserError for values
    out of range."""

    learning_rates: tuple[float, ...]
    batch: int
    steps: int
    weight_decay: float
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.learning_rates or not all(0 < rate < math.inf for rate in self.learning_rates):
            raise UserError(f"a head needs learning rates above 0; got learning_rates={list(self.learning_rates)}.")
        if self.batch < 1 or self.steps < 1 or self.weight_decay < 0:
            raise UserError(
                "a head needs a batch and steps of at least 1 and a weight decay of at least 0; got "
                f"batch={self.batch}, steps={self.steps}, weight_decay={self.weight_decay}."
            )

    @property
    def rates(self) -> list[float]:
        """Ascending."""
        return sorted(self.learning_rates)


def trained(
    head: nn.Module,
    rates: Sequence[float],
    index: Int[Tensor, " k"],
    own: range,
    loss_of: Callable[[Int[Tensor, " _b"]], Callable[[nn.Module], Tensor]],
    recipe: HeadRecipe,
    *,
    most: int,
    name: str,
) -> list[nn.Module]:
    """A copy of the head for each rate, after all steps on the rows in `index`. Every rank calls. Of each batch, a rank
    takes the rows in `own`, at most `most` at a time: `loss_of` is given their places among them, and gives the sum of
    their losses by a head. Copies whose loss is no number any more are handed back as they are."""
    heads = [copy.deepcopy(head) for _ in rates]
    groups = []
    for one, rate in zip(heads, rates, strict=True):
        matrices = [p for p in one.parameters() if p.ndim > 1]
        others = [p for p in one.parameters() if p.ndim <= 1]
        groups.append({"params": matrices, "lr": rate, "weight_decay": recipe.weight_decay})
        groups.append({"params": others, "lr": rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_cosine, steps=recipe.steps))
    parameters = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    batch = min(recipe.batch, len(index))
    steps = batches(index, batch, recipe.steps, recipe.seed)
    for some in bar(name, steps, unit="step", total=recipe.steps, shown=rank() == 0):
        optimizer.zero_grad()
        for rows in held_by(some, own).split(most):
            if len(rows):
                loss = loss_of(rows)
                for one in heads:
                    (loss(one) / batch).backward()
        sum_gradients(parameters)
        optimizer.step()
        schedule.step()
    return [one.requires_grad_(False) for one in heads]


def warm_cosine(step: int, *, steps: int, warmup: int | None = None) -> float:
    """The factor of the learning rate at a step: from 1 / warmup in `warmup` steps to 1, then a cosine to 0 behind the last.
    warmup: unset, a tenth."""
    warmup = int(_WARMUP * steps) if warmup is None else warmup
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def batches(index: Int[Tensor, " k"], batch: int, steps: int, seed: int) -> Iterator[Int[Tensor, " b"]]:
    """`steps` batches of rows: epochs in random order, each without its last, smaller batch. Ascending, for the disk's sake:
    a sum does not ask for the order."""
    generator = torch.Generator().manual_seed(seed)
    given = 0
    while given < steps:
        order = index[torch.randperm(len(index), generator=generator)]
        for start in range(0, len(index) - batch + 1, batch):
            if given == steps:
                return
            yield order[start : start + batch].sort().values
            given += 1


def held_by(rows: Int[Tensor, " b"], own: range) -> Int[Tensor, " _k"]:
    """Those of the rows that lie in `own`, by their places in it."""
    return rows[(rows >= own.start) & (rows < own.stop)] - own.start


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """The gradients of all ranks' rows, in place. A parameter without one has zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def best_rate(
    what: str, rates: Sequence[float], scores: Sequence[float], remedy: str = "smaller rates", *, aloud: bool = True
) -> int:
    """The place of the best score, the smallest rate of equals; NaN where a head diverged. Warns of such, and where the best
    is the first or the last of several, if `aloud`. Raises UserError where all diverged."""
    lost = [rate for rate, score in zip(rates, scores, strict=True) if math.isnan(score)]
    if len(lost) == len(rates):
        raise UserError(
            f"all {len(rates)} heads of {what} diverged, from learning rate {rates[0]:g} on. Give {remedy}."
        )
    if lost and aloud:
        logger.warning("%d of %d heads of %s diverged, from learning rate %g on.", len(lost), len(rates), what, lost[0])
    best = max(range(len(rates)), key=lambda i: -1 if math.isnan(scores[i]) else scores[i])
    if aloud and len(rates) > 1 and best in (0, len(rates) - 1):
        logger.warning(
            "%s: the best learning rate, %g, is at the end of the grid: a better one may lie outside.",
            what,
            rates[best],
        )
    return best


def chosen(
    what: str,
    metric: str,
    recipe: HeadRecipe,
    count: int,
    split: Callable[[], tuple[Int[Tensor, " k"], Int[Tensor, " h"]]],
    fit: Callable[[list[float], Int[Tensor, " _k"]], list[nn.Module]],
    score: Callable[[list[nn.Module], Int[Tensor, " _h"]], list[float]],
) -> tuple[nn.Module, dict[str, object]]:
    """The head of the rate that is best on the held-out of `count` training images, trained anew on all of them; and its
    settings. Of one rate alone nothing is held out. Raises UserError as `split` and `best_rate` do."""
    rates, found, best = recipe.rates, dict[str, object](), 0
    if len(rates) > 1:
        kept, held = split()
        scores = score(fit(rates, kept), held)
        best = best_rate(what, rates, scores, aloud=rank() == 0)
        found = {
            "held_out_images": len(held),
            f"held_out_{metric}": scores[best],
            f"{metric}_by_rate": {r: score for r, score in zip(rates, scores, strict=True) if not math.isnan(score)},
            "diverged": [rate for rate, score in zip(rates, scores, strict=True) if math.isnan(score)],
        }
    (head,) = fit([rates[best]], torch.arange(count))
    if not all(bool(parameter.isfinite().all()) for parameter in head.parameters()):
        best_rate(what, [rates[best]], [math.nan])
    of_all = {name: getattr(recipe, name) for name in ("steps", "weight_decay", "seed")}
    batch = min(recipe.batch, count)
    return head, {"learning_rate": rates[best], **found, "batch": batch, **of_all, "train_images": count}
