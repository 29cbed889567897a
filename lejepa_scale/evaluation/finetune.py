"""Fine-tuning of a whole encoder with a linear classifier, by all ranks, which share each batch. Refuses to know where the
encoder comes from."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import tee
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Real
from timm.layers import DropPath
from torch import Tensor, nn

from lejepa_scale.data.evaluation import Labelled, RandomCrop, Samples
from lejepa_scale.data.images.photometric import normalize
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import expect_labels
from lejepa_scale.evaluation.heads import batches, best_rate, sum_gradients, warm_cosine
from lejepa_scale.evaluation.logistic import hold_out
from lejepa_scale.evaluation.metrics import Guesses, classes_of_labels, likeliest, part_of
from lejepa_scale.model.layers import layer_groups
from lejepa_scale.parallel.collectives import all_reduce_sum, any_rank
from lejepa_scale.parallel.process_group import rank, world_size
from lejepa_scale.progress import bar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneRecipe:
    """How an encoder is fine-tuned: AdamW, learning rates multiplied by batch / 256, warm-up over a tenth of the steps and
    then a cosine to 0. Weight decay, layer decay and label smoothing are those of MAE; images are cut at random, with
    `crop` the area of them at least, and flipped with the probability `flip`. Raises UserError for values out of range."""

    learning_rates: tuple[float, ...] = (5e-4,)
    epochs: int = 30
    batch: int = 128
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    drop_path: float = 0.1
    crop: float = 0.35
    flip: float = 0.5
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.learning_rates or not all(0 < rate < math.inf for rate in self.learning_rates):
            raise UserError(f"fine-tuning needs learning rates above 0; got {list(self.learning_rates)}.")
        if self.epochs < 1 or self.batch < 1 or self.weight_decay < 0:
            raise UserError(
                "fine-tuning needs at least 1 epoch, a batch of at least 1 and a weight decay of at least 0; got "
                f"epochs={self.epochs}, batch={self.batch}, weight_decay={self.weight_decay}."
            )
        if not (0 < self.layer_decay <= 1 and 0 < self.crop <= 1 and 0 <= self.flip <= 1):
            raise UserError(
                "fine-tuning needs layer_decay and crop above 0 and at most 1, and flip from 0 to 1; got "
                f"layer_decay={self.layer_decay}, crop={self.crop}, flip={self.flip}."
            )
        if not (0 <= self.label_smoothing < 1 and 0 <= self.drop_path < 1):
            raise UserError(
                "fine-tuning needs label_smoothing and drop_path from 0 to below 1; got "
                f"label_smoothing={self.label_smoothing}, drop_path={self.drop_path}."
            )


RECIPE = FinetuneRecipe()


def finetune(
    model: nn.Module,
    train: Samples,
    test: Iterable[Labelled],
    recipe: FinetuneRecipe = RECIPE,
    *,
    at_once: int = 256,
    device: torch.device | str | None = None,
    name: str = "fine-tuning",
) -> Guesses:
    """Guesses for this rank's part of the test images by a model of timm's, all of whose weights are trained; `model` itself
    is left as it is. Its classifier is timm's, on its pooled features, and begins at 0. Of several rates the one with the
    best accuracy on held-out training images is taken, the smallest of equals, and the model fine-tuned anew on all images:
    the time is that of (rates + 1) runs. Of one rate nothing is held out.

    Every rank calls, and takes its share of each batch, at most `at_once` images at a time. Gradients are summed over the
    ranks, and what is drawn depends on the seed, the image and the step alone: the numbers are those of one process, but
    for rounding. BatchNorm keeps the running statistics of the encoder; its weights are trained. All in float32. An image
    that cannot be decoded is missing from its batches. device: unset, the CPU. Raises UserError for a training set of one
    class or with missing labels, where nothing can be held out, and where training diverges at every rate."""
    place = torch.device(device or "cpu")
    expect_labels(train.labels)
    classes = classes_of_labels(train.labels)
    targets = torch.searchsorted(classes, train.labels)
    rates, found, best = sorted(recipe.learning_rates), dict[str, Any](), 0
    everything = torch.arange(len(targets))
    work = _Work(train, targets, len(classes), recipe, at_once, place, name)
    if len(rates) > 1:
        kept, held = hold_out(train.labels, recipe.held_out, recipe.seed)
        scores = [work.accuracy(work.trained(model, rate, kept), held) for rate in rates]
        best = best_rate(name, rates, scores, aloud=rank() == 0)
        found = {
            "held_out_images": len(held),
            "held_out_accuracy": scores[best],
            "accuracy_by_rate": {r: score for r, score in zip(rates, scores, strict=True) if not math.isnan(score)},
            "diverged": [rate for rate, score in zip(rates, scores, strict=True) if math.isnan(score)],
        }
    tuned = work.trained(model, rates[best], everything)
    if tuned is None:
        best_rate(name, [rates[best]], [math.nan])
    ranked = [torch.zeros(0, min(5, len(classes)), dtype=torch.long)]
    for batch in test:
        ranked += [likeliest(logits.cpu(), classes) for logits in work.logits(tuned, batch.images)]
    said = asdict(recipe)
    del said["learning_rates"], said["held_out"]
    steps, batch_size = work.steps(len(targets))
    scaled = {"learning_rate": rates[best], "scaled_rate": rates[best] * batch_size / 256}
    of_all = {"batch": batch_size, "steps": steps, "train_images": len(targets)}
    return Guesses(torch.cat(ranked), {**scaled, **found, **said, **of_all})


@dataclass(frozen=True)
class _Work:
    train: Samples
    targets: Int[Tensor, " n"]
    classes: int
    recipe: FinetuneRecipe
    at_once: int
    device: torch.device
    name: str

    def steps(self, count: int) -> tuple[int, int]:
        """Of all epochs, each without its last, smaller batch; and the size of a batch."""
        batch = min(self.recipe.batch, count)
        return self.recipe.epochs * (count // batch), batch

    def trained(self, model: nn.Module, rate: float, index: Int[Tensor, " k"]) -> Any:
        """A copy of the model, fine-tuned on the rows in `index`, in eval mode; None where it diverged."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.recipe.seed)  # of dropout, where the model has any
            tuned = with_classifier(model, self.classes).to(self.device)
            finite = self._fit(tuned, rate, index)
        return tuned.eval() if finite else None

    def _fit(self, tuned: nn.Module, rate: float, index: Int[Tensor, " k"]) -> bool:
        """Train the model; whether all stayed finite."""
        recipe, (steps, batch) = self.recipe, self.steps(len(index))
        drops = with_drop_path(tuned, recipe.drop_path)
        optimizer = torch.optim.AdamW(rated_groups(tuned, rate * batch / 256, recipe))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_cosine, steps=steps))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        training_mode(tuned)
        crop = RandomCrop((recipe.crop, 1.0), recipe.flip, recipe.seed)
        ahead, whole = tee(batches(index, batch, steps, recipe.seed))
        part = part_of(batch, (rank(), world_size()))
        images = self.train.batches((some[part.start : part.stop] for some in ahead), crop)
        bad = torch.zeros((), device=self.device)
        both = zip(images, whole, strict=True)
        progress = bar(self.name, both, unit="step", total=steps, shown=rank() == 0)
        for step, ((views, rows), some) in enumerate(progress):
            optimizer.zero_grad()
            places = torch.searchsorted(some, rows)  # of these images in the batch
            for now in torch.arange(len(rows)).split(self.at_once):
                if not len(now):  # a rank without an image
                    continue
                drops.draw(places[now], batch, (recipe.seed, step))
                loss = self.loss(tuned, views[now], rows[now])
                bad += ~loss.detach().isfinite()
                (loss / batch).backward()
            sum_gradients(parameters)
            optimizer.step()
            schedule.step()
        return not any_rank(bool(bad), self.device) and all(bool(p.isfinite().all()) for p in parameters)

    def loss(self, model: nn.Module, images: Real[Tensor, "b c h w"], rows: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Sum over the images."""
        targets = self.targets[rows].to(self.device)
        try:
            logits = model(normalize(images.to(self.device), self.train.pixels))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(images)} images at once are too many to fine-tune on {self.device}: use a smaller --batch, by which "
                "the numbers do not change."
            ) from error
        return F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing, reduction="sum")

    @torch.no_grad()
    def logits(self, model: nn.Module, images: Real[Tensor, "b c h w"]) -> Iterator[Float[Tensor, "_k classes"]]:
        """Of parts of the images."""
        for some in images.split(self.at_once):
            yield model(normalize(some.to(self.device), self.train.pixels)).float()

    def accuracy(self, model: nn.Module | None, index: Int[Tensor, " k"]) -> float:
        """On the rows in `index`, of all ranks; NaN where there is no model."""
        if model is None:
            return math.nan
        own = part_of(len(index), (rank(), world_size()))
        found = torch.zeros(2, dtype=torch.float64)
        for images, rows in self.train.batches(index[own.start : own.stop].split(self.at_once)):
            for logits in self.logits(model, images):
                found[0] += (logits.argmax(1).cpu() == self.targets[rows]).sum()
                found[1] += len(rows)
        hits, count = all_reduce_sum(found).tolist()
        return hits / max(1.0, count)


def with_classifier(model: nn.Module, classes: int) -> Any:
    """A copy with timm's classifier, all of whose weights are 0. Raises UserError for a model that takes none."""
    tuned: Any = copy.deepcopy(model)
    try:
        tuned.reset_classifier(classes)
        found = tuned.get_classifier()
    except (AttributeError, AssertionError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"a {type(model).__name__} takes no classifier, so it cannot be fine-tuned: {error}."
        ) from error
    for layer in found if isinstance(found, tuple) else (found,):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    return tuned


def rated_groups(model: nn.Module, rate: float, recipe: FinetuneRecipe) -> list[dict[str, Any]]:
    """timm's groups of parameters, whose learning rate falls by `layer_decay` from each layer to the one before it."""
    groups = layer_groups(model, recipe.layer_decay, recipe.weight_decay)
    return [{**group, "lr": rate * group["lr_scale"]} for group in groups]


def training_mode(model: nn.Module) -> None:
    """But for BatchNorm, whose statistics would be those of a rank's part of a batch."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


class PartialDropPath(nn.Module):
    """timm's DropPath for a part of a batch: `kept` says which of its images keep the branch."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.kept = torch.zeros(0, dtype=torch.bool)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """In training alone."""
        if not self.training or not self.drop_prob:
            return x
        kept = self.kept.to(device=x.device, dtype=x.dtype) / (1 - self.drop_prob)
        return x * kept.view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class _Drops:
    modules: list[PartialDropPath]

    def draw(self, places: Int[Tensor, " b"], batch: int, seed: tuple[int, int]) -> None:
        """For the images that have these places in a batch: drawn for all of it, so that it does not depend on the ranks."""
        drawn = np.random.default_rng(seed).random((len(self.modules), batch))
        for module, row in zip(self.modules, torch.from_numpy(drawn)[:, places], strict=True):
            module.kept = row >= module.drop_prob


def with_drop_path(model: nn.Module, rate: float) -> _Drops:
    """Put drop path into all blocks of a model of timm's, in its place: from 0 in the first to `rate` in the last, as timm
    does. Of a model whose blocks have no place for it, none, with a warning."""
    places = [
        (block, [name for name in _DROP_PATHS if _is_place(block, name)])
        for block in model.modules()
        if any(_is_place(block, name) for name in _DROP_PATHS)
    ]
    if rate and not places and rank() == 0:
        logger.warning("a %s has no place for drop path: it is fine-tuned without.", type(model).__name__)
    modules = []
    for (block, names), of_block in zip(places, torch.linspace(0, rate, len(places)).tolist(), strict=True):
        for name in names:
            modules.append(PartialDropPath(of_block))
            setattr(block, name, modules[-1])
    return _Drops(modules)


_DROP_PATHS = ("drop_path", "drop_path1", "drop_path2")


def _is_place(block: nn.Module, name: str) -> bool:
    return hasattr(block, name) and isinstance(getattr(block, name), nn.Identity | DropPath | None)
