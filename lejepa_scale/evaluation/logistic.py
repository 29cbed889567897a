"""Multinomial logistic regression on frozen features, in float64, its strength chosen on held-out training rows. Refuses a
choice between strengths where no class has two images."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import Features
from lejepa_scale.evaluation.metrics import Guesses, classes_of, likeliest, part_of

logger = logging.getLogger(__name__)

STRENGTHS = tuple(
    (10.0 ** torch.linspace(-6, 5, 45, dtype=torch.float64)).tolist()
)  # the logistic regression of dinov2 and dinov3
_STRIDE = 4  # strengths of a long grid: one decade of the published one
_ROWS = 8192  # of features in float64 at a time
_KEPT = 2**31  # bytes of features in float64 that are kept during a fit, in which they are used some hundred times
_WIDEST = 8192  # features whose principal axes are found: a minute on two cores
_TOLERANCE = 1e-6  # of the largest derivative of the mean loss, features scaled to a variance of 1
_LOOSE = (
    1e-4  # scikit-learn's own tolerance: enough to choose a strength by; a fit that ends above it has not converged
)


def logistic(
    train: Features,
    test: Features,
    *,
    strengths: Sequence[float] = STRENGTHS,
    held_out: float = 0.1,
    standardize: bool = False,
    seed: int = 0,
    max_iterations: int = 1000,
    device: torch.device | str | None = None,
    share: tuple[int, int] = (0, 1),
) -> Guesses:
    """Guesses of the classifier that minimizes C x (sum of cross entropies) + |weights|^2 / 2, biases free (C as in
    scikit-learn), by LBFGS.

    strengths: values of C, tried in ascending order, each fit started from the one before. C is the one with the best
    accuracy on a share `held_out` of every class (see `hold_out`), the smallest of equals; then all training rows are
    used. Of a grid of more than 12, every fourth is tried first, until three in a row fall clearly behind, then those
    around the best. These fits end where no derivative of the mean loss is above 1e-4 (scikit-learn's tol), the last one
    at 1e-6. standardize: divide each feature by its standard deviation first. Off, as in dinov2 and dinov3:
    numbers compare with published ones, and how an encoder scales its features is part of what is judged.
    max_iterations: of each fit; 1000 in dinov2.
    device: unset, the CPU; another one holds the training rows in float32. Besides, memory is the training rows in float64
    where these are at most 2 GiB, a few times 8192 x (width + classes) float64, and 25 times the weights. share: (rank,
    world) of this process, which guesses for a contiguous part of the test rows; every process does the same fits;
    `metrics.join` joins the parts. Logs a warning
    where the best C is the first or last one and where the last fit has not converged. Raises UserError for sets that
    cannot be evaluated, for strengths that are not positive, and where there is nothing to hold out.
    """
    classes = classes_of(train, test)
    own = part_of(len(test.rows), share)
    model, settings = fitted(
        train,
        classes,
        strengths,
        held_out=held_out,
        standardize=standardize,
        seed=seed,
        max_iterations=max_iterations,
        device=device,
    )
    if len(strengths) > 1 and settings["strength"] in (min(strengths), max(strengths)):
        logger.warning(
            "the best C, %.3g, is at the end of the grid %.3g..%.3g: a better one may lie outside.",
            settings["strength"],
            min(strengths),
            max(strengths),
        )
    if not settings["converged"]:
        logger.warning(
            "logistic regression has not converged at C = %.3g after %d iterations: give more, or standardize.",
            settings["strength"],
            max_iterations,
        )
    return Guesses(guess(model, test.rows[own.start : own.stop], classes), settings)


@dataclass(frozen=True)
class Linear:
    """A linear classifier of rows x: (x - mean) / scale @ weight[:-1] + weight[-1]."""

    mean: Float64[Tensor, " e"]
    scale: Float64[Tensor, " e"]
    weight: Float64[Tensor, "e+1 c"]

    def __call__(self, rows: Float[Tensor, "n e"]) -> Float64[Tensor, "n c"]:
        """Logits. Raises nothing of its own."""
        return (rows.to(self.mean) - self.mean).div_(self.scale) @ self.weight[:-1] + self.weight[-1]


def fitted(
    train: Features,
    classes: Int[Tensor, " c"],
    strengths: Sequence[float],
    *,
    held_out: float,
    standardize: bool,
    seed: int,
    max_iterations: int,
    device: torch.device | str | None,
) -> tuple[Linear, dict[str, object]]:
    """The classifier of `logistic`, and what was chosen; no warnings. Raises UserError for strengths that are not positive,
    and where there is nothing to hold out."""
    if not strengths or not all(0 < c < math.inf for c in strengths) or max_iterations < 1:
        raise UserError(
            f"logistic regression needs strengths C above 0 and at least 1 iteration; got strengths={list(strengths)}, "
            f"max_iterations={max_iterations}."
        )
    rows, labels = (x.to(device or "cpu") for x in (train.rows, torch.searchsorted(classes, train.labels)))
    mean, scale = _moments(rows, standardize)
    axes = _principal(rows, mean, scale)
    problem = _Problem(rows, labels, mean, scale, *axes, len(classes), standardize, max_iterations)
    everything = torch.arange(len(rows))
    nothing = Linear(problem.mean, problem.scale, problem.mean.new_zeros(rows.shape[1] + 1, len(classes)))
    settings: dict[str, object] = {"standardized": standardize, "held_out_rows": 0, "held_out_accuracy": None}
    chosen = strengths[0]
    if len(strengths) > 1:
        kept, held = hold_out(train.labels, held_out, seed)
        chosen, accuracies = _chosen(problem, nothing, sorted(strengths), kept, held)
        settings |= {"held_out_rows": len(held), "held_out_accuracy": accuracies[chosen], "accuracies": accuracies}
    model, slope = _fit(problem, everything, nothing, chosen, _TOLERANCE)
    return model, settings | {"strength": chosen, "converged": slope <= _LOOSE}


def hold_out(labels: Int[Tensor, " n"], share: float, seed: int) -> tuple[Int[Tensor, " k"], Int[Tensor, " h"]]:
    """Numbers of the rows to fit on and of those held out, ascending: the share of every class that has two rows, at least
    one of them and never all. Raises UserError for a share outside 0..1 and where no class has two rows."""
    if not 0 < share < 1:
        raise UserError(f"the held-out share of the training set must lie between 0 and 1; got held_out={share}.")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].sort(stable=True).indices]  # by class, in random order within
    held = []
    for rows in order.split(labels.unique(return_counts=True)[1].tolist()):
        held.append(rows[: min(len(rows) - 1, max(1, round(share * len(rows))))])
    out = torch.zeros(len(labels), dtype=torch.bool)
    out[torch.cat(held)] = True
    if not out.any():
        raise UserError(
            f"each of the {len(held)} classes has 1 training image: nothing can be held out to choose settings by. Give "
            "more images, or one setting."
        )
    return (~out).nonzero()[:, 0], out.nonzero()[:, 0]


def guess(model: Linear, rows: Float32[Tensor, "n e"], classes: Int[Tensor, " c"]) -> Int[Tensor, "n r"]:
    """The likeliest classes of every row, chunk by chunk."""
    found = [likeliest(model(rows[start : start + _ROWS]).cpu(), classes) for start in range(0, len(rows), _ROWS)]
    return torch.cat(found) if found else torch.empty(0, min(5, len(classes)), dtype=classes.dtype)


@dataclass(frozen=True)
class _Problem:
    """Rows on the device of the fit. Centred and of variance 1 (together, or each column where `standardize`), which changes
    the path to the solution but not the solution: biases are free, and the penalty is of the weights before scaling."""

    rows: Float[Tensor, "n e"]
    labels: Int[Tensor, " n"]  # places in the ascending classes
    mean: Float64[Tensor, " e"]
    scale: Float64[Tensor, " e"]
    axes: Float64[Tensor, "e r"]  # principal ones, in columns; of very wide rows the coordinates'
    variances: Float64[Tensor, " r"]  # along them
    classes: int
    standardize: bool
    max_iterations: int


def _moments(rows: Float[Tensor, "n e"], standardize: bool) -> tuple[Float64[Tensor, " e"], Float64[Tensor, " e"]]:
    """Mean and scale of the columns: standard deviations (1 for a constant column), or one root mean square for all."""
    mean = sum(x.double().sum(0) for x in rows.split(_ROWS)) / len(rows)
    variance = sum((x.double() - mean).square().sum(0) for x in rows.split(_ROWS)) / len(rows)
    if not standardize:
        variance = variance.mean().expand_as(variance)
    return mean, torch.where(variance > 0, variance, 1.0).sqrt()


def _principal(
    rows: Float[Tensor, "n e"], mean: Float64[Tensor, " e"], scale: Float64[Tensor, " e"]
) -> tuple[Float64[Tensor, "e r"], Float64[Tensor, " r"]]:
    """Axes, and variances along them: without them strongly correlated features, as untrained encoders have, take LBFGS
    thousands of iterations at large C."""
    width = rows.shape[1]
    if len(rows) <= min(width, _ROWS):  # weights lie in the space of the rows
        _, sizes, axes = torch.linalg.svd((rows.double() - mean).div_(scale), full_matrices=False)
        return axes.T.contiguous(), sizes.square() / len(rows)
    if width > _WIDEST:
        return torch.eye(width).to(mean), torch.ones_like(mean)
    covariance = mean.new_zeros(width, width)
    for x in rows.split(_ROWS):
        x = (x.double() - mean).div_(scale)
        covariance.addmm_(x.T, x)
    variances, axes = torch.linalg.eigh(covariance / len(rows))
    return axes, variances.clamp_min(0)


def _chosen(
    problem: _Problem, nothing: Linear, strengths: list[float], kept: Int[Tensor, " k"], held: Int[Tensor, " h"]
) -> tuple[float, dict[float, float]]:
    """The strength with the best accuracy on the held-out rows, the smallest of equals, and the accuracies of those that
    were tried: of a long grid every fourth, until three in a row fall clearly behind, then those around the best."""
    found: dict[float, tuple[float, Linear]] = {}

    def tried(strength: float, start: Linear) -> float:
        model, _ = _fit(problem, kept, start, strength, _LOOSE)
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in _batches(problem, held))
        found[strength] = hits / len(held), model
        return hits / len(held)

    stride = _STRIDE if len(strengths) > 3 * _STRIDE else 1
    behind, best, model = 0, 0.0, nothing
    for strength in strengths[::stride]:
        accuracy = tried(strength, model)
        best, model = max(best, accuracy), found[strength][1]
        # Clearly: by more than two standard errors of a difference, and 1 point.
        behind = behind + 1 if accuracy < best - max(0.01, 2 * _error(best, len(held))) else 0
        if behind == 3:
            break
    middle = strengths.index(_best(found))
    for strength in strengths[max(0, middle - stride + 1) : middle + stride]:
        if strength not in found:
            below = max((c for c in found if c < strength), default=None)
            tried(strength, nothing if below is None else found[below][1])
    return _best(found), {strength: found[strength][0] for strength in sorted(found)}


def _best(found: dict[float, tuple[float, Linear]]) -> float:
    return max(sorted(found), key=lambda strength: found[strength][0])


def _error(share: float, count: int) -> float:
    return math.sqrt(2 * share * (1 - share) / count)


def _batches(problem: _Problem, index: Int[Tensor, " k"]) -> Iterator[tuple[Float[Tensor, "_m e"], Int[Tensor, " _m"]]]:
    whole = len(index) == len(problem.rows)
    for start in range(0, len(index), _ROWS):
        some = slice(start, start + _ROWS) if whole else index[start : start + _ROWS].to(problem.rows.device)
        yield problem.rows[some], problem.labels[some]


def _scaled(
    problem: _Problem, index: Int[Tensor, " k"]
) -> Callable[[], Iterable[tuple[Float64[Tensor, "_m e"], Int[Tensor, " _m"]]]]:
    """The batches of the rows in `index`, centred and scaled, for each pass over them: kept, or made again each time."""

    def batches() -> Iterator[tuple[Float64[Tensor, "_m e"], Int[Tensor, " _m"]]]:
        for rows, labels in _batches(problem, index):
            yield (rows.double() - problem.mean).div_(problem.scale), labels

    if 8 * len(index) * problem.rows.shape[1] > _KEPT:
        return batches
    kept = list(batches())
    return lambda: kept


def _fit(
    problem: _Problem, index: Int[Tensor, " k"], start: Linear, strength: float, tolerance: float
) -> tuple[Linear, float]:
    """The classifier of the rows in `index`, and the largest derivative that is left there."""
    # |weights before scaling|^2 / (2 C n), of the mean loss
    penalty = 1 / (strength * len(index)) / (1.0 if problem.standardize else float(problem.scale[0]) ** 2)
    # The variable is the weights along the principal axes of the rows, divided by `unit`, in which the loss curves about as
    # much in every direction, for any C: along an axis of variance v its curvature is about v / classes, and the penalty's.
    unit = start.weight.new_full((len(problem.variances) + 1, 1), problem.classes**0.5)
    unit[:-1, 0] = (problem.variances / problem.classes + penalty) ** -0.5
    variable = torch.cat([problem.axes.T @ start.weight[:-1], start.weight[-1:]]) / unit
    variable.grad = torch.zeros_like(variable)
    batches = _scaled(problem, index)

    def weights() -> Tensor:
        along = variable * unit
        return torch.cat([problem.axes @ along[:-1], along[-1:]])

    def objective() -> Tensor:
        weight = weights()
        gradient = torch.zeros_like(weight)
        loss = weight.new_zeros(())
        for x, labels in batches():
            logits = torch.addmm(weight[-1], x, weight[:-1])
            loss += F.cross_entropy(logits, labels, reduction="sum")
            residual = logits.softmax(1)
            residual[torch.arange(len(labels), device=labels.device), labels] -= 1
            gradient[:-1].addmm_(x.T, residual)
            gradient[-1] += residual.sum(0)
        gradient /= len(index)
        gradient[:-1] += penalty * weight[:-1]
        variable.grad = torch.cat([problem.axes.T @ gradient[:-1], gradient[-1:]]) * unit
        return loss / len(index) + penalty / 2 * weight[:-1].square().sum()

    optimizer = torch.optim.LBFGS(
        [variable],
        max_iter=problem.max_iterations,
        max_eval=2 * problem.max_iterations,
        history_size=10,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(objective)  # type: ignore[arg-type]
    objective()
    return Linear(start.mean, start.scale, weights()), float(variable.grad.abs().max())
