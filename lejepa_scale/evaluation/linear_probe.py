"""A linear layer trained by SGD on frozen features, one head for each learning rate, all at once; the rate is chosen on
held-out training rows, never on the test set. Refuses a grid of which every head diverges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import Features
from lejepa_scale.evaluation.heads import batches, best_rate
from lejepa_scale.evaluation.logistic import hold_out
from lejepa_scale.evaluation.metrics import Guesses, classes_of, likeliest

Norm = Literal["none", "batch", "layer"]
# At a batch of 256: of the linear evaluation of dinov2 and dinov3, as momentum, schedule, first weights and steps are.
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
_MOMENTUM = 0.9
_EPS = {"none": 0.0, "batch": 1e-6, "layer": 1e-5}  # batch: of the linear probe of MAE; layer: torch's own
_ROWS = 4096  # guessed at a time


def linear_probe(
    train: Features,
    test: Features,
    *,
    learning_rates: Sequence[float] = RATES,
    batch: int = 1024,
    steps: int = 12_500,
    weight_decay: float = 0.0,
    norm: Norm = "none",
    held_out: float = 0.1,
    refit: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Guesses:
    """Guesses of a linear layer: SGD with momentum 0.9, cosine schedule to 0, rates multiplied by batch / 256.

    batch: rows of a step, no more than there are; the default is dinov2's on 8 GPUs, its 10 x 1250 steps the default of
    `steps`. norm: before the layer; "batch": by batch statistics in training and their running average later, without
    weights, as MAE's probe; "layer": LayerNorm with weights of each head, LeJEPA's probe (on the class tokens of the last
    two blocks, concatenated). held_out: share of every class by which the rate is chosen, the smallest of equals (see
    `logistic.hold_out`). refit: train the head of the chosen rate anew on all training rows; else keep it as it is.
    device: unset, the CPU; another one holds the training rows. Memory: 4 x rates x (width + batch) x classes float32. The
    result depends on seed, not on the grid around the chosen rate. Logs a warning where the best rate is the first or the
    last and where heads diverged. Raises UserError for options out of range, where nothing can be held out, for sets that
    cannot be evaluated, and where every head diverged.
    """
    classes = classes_of(train, test)
    _refuse(learning_rates, batch, steps, weight_decay, norm)
    rates = sorted(learning_rates)
    rows, labels = (x.to(device or "cpu") for x in (train.rows, torch.searchsorted(classes, train.labels)))
    recipe = _Recipe(len(classes), batch, steps, weight_decay, norm, seed)
    kept, held = hold_out(train.labels, held_out, seed)
    heads = _trained(rows, labels, kept, rates, recipe)
    accuracies = _accuracies(heads, rows, labels, held)
    best = best_rate("the linear probe", rates, accuracies, 'smaller rates or norm="batch"')
    lost = [rate for rate, accuracy in zip(rates, accuracies, strict=True) if math.isnan(accuracy)]
    if refit:
        heads, head = _trained(rows, labels, torch.arange(len(rows)), [rates[best]], recipe), 0
    else:
        head = best
    ranked = [likeliest(heads(x.to(rows.device))[head].cpu(), classes) for x in test.rows.split(_ROWS)]
    settings = {
        "learning_rate": rates[best],
        "scaled_rate": rates[best] * heads.batch / 256,
        "held_out_rows": len(held),
        "held_out_accuracy": accuracies[best],
        "accuracies": {rate: accuracy for rate, accuracy in zip(rates, accuracies, strict=True) if rate not in lost},
        "diverged": lost,
        "batch": heads.batch,
        "steps": steps,
        "weight_decay": weight_decay,
        "norm": norm,
        "refit": refit,
        "seed": seed,
    }
    return Guesses(torch.cat(ranked), settings)


@dataclass(frozen=True)
class _Recipe:
    classes: int
    batch: int
    steps: int
    weight_decay: float
    norm: Norm
    seed: int


@dataclass(frozen=True)
class _Heads:
    """All heads and the normalization before them."""

    weight: Float[Tensor, "h e c"]
    bias: Float[Tensor, "h c"]
    gain: Float[Tensor, "h e"]  # of LayerNorm; ones, and `offset` zeros, elsewhere
    offset: Float[Tensor, "h e"]
    mean: Float[Tensor, " e"]  # running, of "batch"
    variance: Float[Tensor, " e"]
    norm: Norm
    batch: int

    def __call__(self, rows: Float[Tensor, "n e"]) -> Float[Tensor, "h n c"]:
        """Logits by running statistics."""
        return self.logits(self.normalized(rows, self.mean, self.variance))

    def normalized(
        self, rows: Float[Tensor, "n e"], mean: Float[Tensor, " e"], variance: Float[Tensor, " e"]
    ) -> Float[Tensor, "n e"]:
        if self.norm == "batch":
            return (rows - mean) * (variance + _EPS["batch"]).rsqrt()
        return F.layer_norm(rows, rows.shape[1:], eps=_EPS["layer"]) if self.norm == "layer" else rows

    def logits(self, x: Float[Tensor, "n e"]) -> Float[Tensor, "h n c"]:
        # LayerNorm's own weights are folded into the layer's: no copy of the batch for each head
        bias = torch.baddbmm(self.bias[:, None], self.offset[:, None], self.weight)  # [H, 1, C]
        weight = self.weight * self.gain[..., None] if self.norm == "layer" else self.weight
        return torch.baddbmm(bias, x.expand(len(weight), -1, -1), weight)


def _trained(
    rows: Float[Tensor, "n e"], labels: Int[Tensor, " n"], index: Int[Tensor, " k"], rates: list[float], recipe: _Recipe
) -> _Heads:
    """Heads after all steps on the rows in `index`, one for each rate. All begin with the same weights."""
    heads = _first(rows, min(recipe.batch, len(index)), len(rates), recipe)
    trained = [heads.weight, heads.bias, *([heads.gain, heads.offset] if recipe.norm == "layer" else [])]
    moments = [torch.zeros_like(parameter) for parameter in trained]
    scaled = torch.tensor(rates, dtype=torch.float64) * heads.batch / 256
    for step, some in enumerate(batches(index, heads.batch, recipe.steps, recipe.seed)):
        some = some.to(rows.device)
        x, mean, variance = rows[some], heads.mean, heads.variance
        if recipe.norm == "batch":
            mean, variance = _observed(x, heads)
        logits = heads.logits(heads.normalized(x, mean, variance))
        targets = labels[some].expand(len(rates), -1)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / len(some)
        gradients = torch.autograd.grad(loss, trained)
        rate = (scaled * (1 + math.cos(math.pi * step / recipe.steps)) / 2).to(rows)
        with torch.no_grad():
            for parameter, moment, gradient in zip(trained, moments, gradients, strict=True):
                moment.mul_(_MOMENTUM).add_(gradient).add_(parameter, alpha=recipe.weight_decay)
                parameter.sub_(rate.view(-1, *[1] * (parameter.ndim - 1)) * moment)
    for parameter in trained:
        parameter.requires_grad_(False)
    return heads


def _first(rows: Float[Tensor, "n e"], batch: int, count: int, recipe: _Recipe) -> _Heads:
    """Heads before the first step: weights of N(0, 0.01^2), as dinov2's, biases 0."""
    width = rows.shape[1]
    weight = 0.01 * torch.randn(width, recipe.classes, generator=torch.Generator().manual_seed(recipe.seed))
    weight = weight.to(rows).repeat(count, 1, 1).requires_grad_()
    bias = rows.new_zeros(count, recipe.classes).requires_grad_()
    affine = recipe.norm == "layer"
    gain = rows.new_ones(count, width).requires_grad_(affine)
    offset = rows.new_zeros(count, width).requires_grad_(affine)
    return _Heads(weight, bias, gain, offset, rows.new_zeros(width), rows.new_ones(width), recipe.norm, batch)


def _observed(x: Float[Tensor, "b e"], heads: _Heads) -> tuple[Float[Tensor, " e"], Float[Tensor, " e"]]:
    """Mean and variance of a batch, after they have moved the running ones (momentum 0.1, unbiased, as BatchNorm1d)."""
    variance, mean = torch.var_mean(x, 0, correction=0)
    heads.mean.lerp_(mean, 0.1)
    heads.variance.lerp_(variance * (len(x) / max(1, len(x) - 1)), 0.1)
    return mean, variance


@torch.no_grad()
def _accuracies(
    heads: _Heads, rows: Float[Tensor, "n e"], labels: Int[Tensor, " n"], index: Int[Tensor, " k"]
) -> list[float]:
    """Of every head on the rows in `index`; NaN where it diverged."""
    hits = torch.zeros(len(heads.weight), dtype=torch.float64)
    for some in index.split(_ROWS):
        some = some.to(rows.device)
        logits = heads(rows[some])
        finite = logits.isfinite().flatten(1).all(1).cpu()
        hits += torch.where(finite, (logits.argmax(2) == labels[some]).sum(1).cpu().double(), torch.nan)
    return (hits / len(index)).tolist()


def _refuse(rates: Sequence[float], batch: int, steps: int, weight_decay: float, norm: str) -> None:
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise UserError(f"the linear probe needs learning rates above 0; got learning_rates={list(rates)}.")
    if batch < 1 or steps < 1 or weight_decay < 0:
        raise UserError(
            "the linear probe needs a batch and steps of at least 1 and a weight decay of at least 0; got "
            f"batch={batch}, steps={steps}, weight_decay={weight_decay}."
        )
    if norm not in _EPS:
        raise UserError(f'norm of the linear probe is "none", "batch" or "layer"; got {norm!r}.')
