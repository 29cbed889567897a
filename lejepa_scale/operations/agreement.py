"""How well loss / lambda^alpha orders runs as labels do (arXiv 2511.08544, section 6): Spearman's correlation with an
accuracy that `lejepa evaluate` has measured, with bootstrap intervals over runs, and a scatter plot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lejepa_scale.errors import UserError
from lejepa_scale.operations.selection import Candidate, Selection

ALPHAS = tuple(round(0.05 * i, 2) for i in range(31))  # 0 to 1.5
DRAWS = 2000


@dataclass(frozen=True)
class Agreement:
    """Spearman's correlation of -loss / lambda^alpha with accuracy: 1 where the smallest score is the highest accuracy."""

    alpha: float
    value: float
    low: float  # 95 % interval, runs drawn again
    high: float


@dataclass(frozen=True)
class Agreements:
    """Of the alphas asked for, and of the best on the grid, whose own interval says how well it is known."""

    runs: int
    asked: list[Agreement]
    best: Agreement
    best_low: float
    best_high: float
    loss: list[float]
    lam: list[float]
    accuracy: list[float]


def accuracy_of(path: Path, protocol: str, metric: str = "top1") -> float:
    """That of a run's own weights, out of the evaluation.json that `lejepa evaluate RUN` has written. Raises UserError where
    it is not there."""
    file = path / "evaluation.json"
    try:
        rows = json.loads(file.read_text())["results"]
        return next(float(row["metrics"][metric]) for row in rows if row["protocol"] == protocol)
    except FileNotFoundError:
        raise UserError(
            f"{file} is not there: `lejepa evaluate {path} --train ... --test ... --protocols {protocol}` writes it."
        ) from None
    except (StopIteration, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} has no {metric} of {protocol}: evaluate with --protocols {protocol}.") from error


def spearman(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Correlation of ranks, ties at their mean; NaN where either is constant."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else math.nan


def _ranks(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return np.asarray((x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) + 1) / 2)


def agreements(
    runs: Sequence[Candidate], accuracy: Sequence[float], alphas: Sequence[float] = (0.0, 0.4), seed: int = 0
) -> Agreements:
    """Of runs with a finite loss. Raises UserError for fewer than three."""
    pairs = [(run, value) for run, value in zip(runs, accuracy, strict=True) if math.isfinite(run.loss)]
    if len(pairs) < 3:
        raise UserError(f"a correlation is over three runs or more with a finite loss, not {len(pairs)}.")
    loss = np.array([run.loss for run, _ in pairs])
    lam = np.array([run.lam for run, _ in pairs])
    labels = np.array([value for _, value in pairs])
    grid = list(dict.fromkeys([*alphas, *ALPHAS]))
    values = _over(grid, loss, lam, labels)
    generator = np.random.default_rng(seed)
    drawn = np.array(
        [_over(grid, loss[i], lam[i], labels[i]) for i in generator.integers(len(loss), size=(DRAWS, len(loss)))]
    )
    found = [
        Agreement(alpha, value, *np.nanquantile(drawn[:, i], [0.025, 0.975]).tolist())
        for i, (alpha, value) in enumerate(zip(grid, values, strict=True))
    ]
    best = max(range(len(grid)), key=lambda i: (-math.inf if math.isnan(values[i]) else values[i], -grid[i]))
    chosen = np.array(grid)[np.nanargmax(np.where(np.isnan(drawn), -2.0, drawn), axis=1)]
    low, high = np.quantile(chosen, [0.025, 0.975]).tolist()
    return Agreements(
        len(loss), found[: len(alphas)], found[best], low, high, loss.tolist(), lam.tolist(), labels.tolist()
    )


def _over(
    grid: Sequence[float], loss: Float[np.ndarray, " n"], lam: Float[np.ndarray, " n"], labels: Float[np.ndarray, " n"]
) -> list[float]:
    return [spearman(-loss / lam**alpha, labels) for alpha in grid]


def runs_of(found: Selection) -> list[Candidate]:
    """All of them, best first."""
    return [run for one in found.ranked for run in one.runs]


def in_words(found: Agreements, protocol: str) -> str:
    """A line for each alpha."""
    lines = [
        f"Spearman's correlation of -loss / lambda^alpha with {protocol} over {found.runs} runs (95 % by bootstrap):"
    ]
    for name, one in [*(("", one) for one in found.asked), ("best ", found.best)]:
        lines.append(f"  {name}alpha = {one.alpha:g}: {one.value:+.2f} ({one.low:+.2f} to {one.high:+.2f})")
    lines[-1] += f"; the best alpha is {found.best_low:g} to {found.best_high:g}, and chosen by these labels"
    return "\n".join(lines)


def plot(found: Agreements, out: Path, protocol: str) -> None:
    """Accuracy over the score for every alpha: a point for each run, coloured by lambda. Writes PNG, PDF or SVG. Raises
    UserError where matplotlib is absent."""
    pyplot: Any
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.colors import LogNorm
    except ImportError as error:
        raise UserError("a plot needs matplotlib: pip install 'lejepa_scale[report]'.") from error
    panels = list({one.alpha: one for one in [*found.asked, found.best]}.values())
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.6 * len(panels) + 0.6, 3.4), layout="constrained", sharey=True, squeeze=False
    )
    loss, lam = np.array(found.loss), np.array(found.lam)
    norm = LogNorm(lam.min(), lam.max()) if lam.min() < lam.max() else None
    for axis, one in zip(axes[0], panels, strict=True):
        points = axis.scatter(loss / lam**one.alpha, [100 * a for a in found.accuracy], c=lam, norm=norm, s=30)
        named = "best: " if one is found.best and one not in found.asked else ""
        axis.set_title(f"{named}alpha = {one.alpha:g}, Spearman {one.value:+.2f}", fontsize="medium")
        axis.set_xlabel("loss" if one.alpha == 0 else f"loss / lambda^{one.alpha:g}")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(f"{protocol}, top-1 in %")
    figure.colorbar(points, ax=axes[0].tolist(), label="lambda")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def as_json(found: Agreements, protocol: str) -> dict[str, Any]:
    """Everything, for a program."""
    return {"protocol": protocol, **asdict(found)}
