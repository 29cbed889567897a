"""How far a frozen set of features is from an isotropic Gaussian: one-dimensional tests of normality along random
directions. For watching, not for training: they sort all samples of a direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lejepa_scale.objective import SIGReg
from lejepa_scale.objective.characteristic import fused_sums

Test = Callable[[Float[Tensor, "n m"]], Float[Tensor, " m"]]


def epps_pulley(x: Float[Tensor, "n m"]) -> Float[Tensor, " m"]:
    """SIGReg's statistic of each column at the published 17 knots on [0, 3]; 1.0525 is expected at N(0, 1)."""
    sigreg = SIGReg(num_slices=1)
    columns = x.T.unsqueeze(-1)  # [M, N, 1]: a view for each
    sums = fused_sums(columns, x.new_ones(1, 1), sigreg.dt, sigreg.knots, "fused")
    return sigreg.of_each(sums, x.new_tensor(len(x)))[:, 0]


def anderson_darling(x: Float[Tensor, "n m"]) -> Float[Tensor, " m"]:
    """A^2 = -N - mean_i (2i - 1) [ln F(x_i) + ln(1 - F(x_(N+1-i)))] against N(0, 1), x sorted; mean 1 at N(0, 1)."""
    x = x.sort(0).values
    log_below, log_above = torch.special.log_ndtr(x), torch.special.log_ndtr(-x)
    odd = _ranks(x) * 2 - 1
    return -len(x) - (odd * (log_below + log_above.flip(0))).mean(0)


def cramer_von_mises(x: Float[Tensor, "n m"]) -> Float[Tensor, " m"]:
    """W^2 = 1/(12N) + sum_i (F(x_i) - (2i - 1)/(2N))^2 against N(0, 1), x sorted; mean 1/6 at N(0, 1)."""
    below = torch.special.ndtr(x.sort(0).values)
    return 1 / (12 * len(x)) + (below - (_ranks(x) - 0.5) / len(x)).square().sum(0)


def watson(x: Float[Tensor, "n m"]) -> Float[Tensor, " m"]:
    """U^2 = W^2 - N (mean F - 1/2)^2: Cramer-von Mises without the part that a shift makes; mean 1/12 at N(0, 1)."""
    return cramer_von_mises(x) - len(x) * (torch.special.ndtr(x).mean(0) - 0.5).square()


def shapiro_wilk(x: Float[Tensor, "n m"]) -> Float[Tensor, " m"]:
    """W = (sum_i a_i x_i)^2 / sum_i (x_i - mean)^2, x sorted: 1 for a normal sample of any mean and scale, less for
    others. Coefficients by Royston's approximation (Applied Statistics 44, 1995, algorithm AS R94). Raises
    ValueError for N < 12."""
    n = len(x)
    if n < 12:
        raise ValueError(f"shapiro_wilk needs at least 12 samples; got {n}.")
    m = torch.special.ndtri((_ranks(x)[:, 0] - 0.375) / (n + 0.25))
    c, u = m / m.norm(), n**-0.5
    last = c[-1] + _polynomial(u, (0.0, 0.221157, -0.147981, -2.071190, 4.434685, -2.706056))
    previous = c[-2] + _polynomial(u, (0.0, 0.042981, -0.293762, -1.752461, 5.682633, -3.582633))
    phi = (m.square().sum() - 2 * m[-1] ** 2 - 2 * m[-2] ** 2) / (1 - 2 * last**2 - 2 * previous**2)
    a = m / phi.sqrt()
    a[[-1, 0]], a[[-2, 1]] = torch.stack([last, -last]), torch.stack([previous, -previous])
    x = x.sort(0).values
    return (a[:, None] * x).sum(0).square() / (x - x.mean(0)).square().sum(0)


def jarque_bera(x: Float[Tensor, "n m"]) -> Float[Tensor, " m"]:
    """N/6 (skewness^2 + excess kurtosis^2 / 4), blind to mean and scale; about 2 at a Gaussian."""
    x = x - x.mean(0)
    variance = x.square().mean(0)
    skewness, excess = x.pow(3).mean(0) / variance**1.5, x.pow(4).mean(0) / variance**2 - 3
    return len(x) / 6 * (skewness.square() + excess.square() / 4)


def first_four_moments(x: Float[Tensor, "n m"]) -> Float[Tensor, " m"]:
    """Sum over the first four moments of the squared difference from N(0, 1), each over its variance there: N times
    mean^2 + (x^2 - 1)^2/2 + (x^3)^2/15 + (x^4 - 3)^2/96, with means inside the squares; mean 4 at N(0, 1)."""
    targets, variances = (0.0, 1.0, 0.0, 3.0), (1.0, 2.0, 15.0, 96.0)
    powers = (x.pow(k).mean(0) for k in range(1, 5))
    terms = [(p - t).square() / v for p, t, v in zip(powers, targets, variances, strict=True)]
    return len(x) * torch.stack(terms).sum(0)


TESTS: dict[str, Test] = {
    "Epps-Pulley": epps_pulley,
    "Anderson-Darling": anderson_darling,
    "Cramer-von Mises": cramer_von_mises,
    "Watson": watson,
    "Shapiro-Wilk": shapiro_wilk,
    "Jarque-Bera": jarque_bera,
    "first four moments": first_four_moments,
}


@dataclass(frozen=True)
class Isotropy:
    """One test of all directions: its mean, its worst direction (the least for Shapiro-Wilk), and both for as many samples
    of a true N(0, I), which is what can be reached."""

    name: str
    mean: float
    worst: float
    gaussian_mean: float
    gaussian_worst: float


def isotropy(rows: Float[Tensor, "n d"], *, directions: int = 256, seed: int = 0) -> list[Isotropy]:
    """Every test along `directions` random directions. Rows are centred and divided by one number, their root mean square
    (features have a scale of their own; that of each direction is what isotropy is about). Raises ValueError where rows are
    too few, not finite or all the same."""
    if rows.ndim != 2 or len(rows) < 12:
        raise ValueError(f"isotropy needs at least 12 rows [N, D]; got {list(rows.shape)}.")
    if not torch.isfinite(rows).all():
        raise ValueError("isotropy: some rows are not finite.")
    x = rows.double() - rows.double().mean(0)
    scale = x.square().mean().sqrt()
    if scale == 0:
        raise ValueError("isotropy: all rows are the same; there is no scale to divide by.")
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    a = SIGReg(num_slices=directions, seed=seed).directions(0, x.shape[1], x.device, x.dtype).T
    ours, reached = (x / scale) @ a, (gaussian - gaussian.mean(0)) @ a
    found = []
    for name, test in TESTS.items():
        values, floor = test(ours), test(reached)
        worst = torch.min if name == "Shapiro-Wilk" else torch.max
        found.append(Isotropy(name, *(float(v) for v in (values.mean(), worst(values), floor.mean(), worst(floor)))))
    return found


def isotropy_table(found: list[Isotropy]) -> str:
    """The tests as lines of text, a header first."""
    lines = [f"{'test of normality':<20}{'mean':>12}{'worst':>12}{'Gaussian':>12}{'its worst':>12}"]
    for row in found:
        numbers = (row.mean, row.worst, row.gaussian_mean, row.gaussian_worst)
        lines.append(f"{row.name:<20}" + "".join(f"{number:>12.4g}" for number in numbers))
    return "\n".join(lines)


def _ranks(x: Float[Tensor, "n m"]) -> Float[Tensor, "n 1"]:
    return torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)[:, None]


def _polynomial(u: float, coefficients: tuple[float, ...]) -> float:
    return math.fsum(c * u**i for i, c in enumerate(coefficients))
