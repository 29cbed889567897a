"""The papers' formulas once more, in NumPy and float64, from their text. Refuses to import the package: what agrees with
these agrees with something outside it."""

from __future__ import annotations

import numpy as np
from scipy import stats


def quadrature(knots: int, t_max: float) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of the trapezoid rule on [-t_max, t_max], with `knots` points from 0 on."""
    t = np.linspace(-t_max, t_max, 2 * knots - 1)
    weights = np.full(len(t), t[1] - t[0])
    weights[[0, -1]] /= 2
    return t, weights


def epps_pulley(p: np.ndarray, knots: int = 17, t_max: float = 3.0, factor: float | None = None) -> float:
    """N integral |ECF(t) - exp(-t^2/2)|^2 exp(-t^2/2) dt of the sample p [N]; `factor` in the place of N."""
    t, weights = quadrature(knots, t_max)
    gaussian = np.exp(-(t**2) / 2)
    distance = np.abs(np.exp(1j * t[:, None] * p).mean(1) - gaussian) ** 2
    return float((len(p) if factor is None else factor) * np.sum(weights * gaussian * distance))


def epps_pulley_unbiased(p: np.ndarray, knots: int = 17, t_max: float = 3.0, factor: float | None = None) -> float:
    """The same integral with the squared modulus estimated over pairs of different samples."""
    t, weights = quadrature(knots, t_max)
    gaussian, n = np.exp(-(t**2) / 2), len(p)
    cosines = np.cos(t[:, None, None] * (p[:, None] - p))  # [K, N, N]
    pairs = (cosines.sum((1, 2)) - n) / (n * (n - 1))
    distance = pairs - 2 * gaussian * np.cos(t[:, None] * p).mean(1) + gaussian**2
    return float((n if factor is None else factor) * np.sum(weights * gaussian * distance))


def sigreg(z: np.ndarray, directions: np.ndarray, unbiased: bool = False, **options: float) -> float:
    """Mean of the statistic over views and directions: z [V, N, D], directions [M, D]."""
    statistic = epps_pulley_unbiased if unbiased else epps_pulley
    return float(np.mean([statistic(view @ a, **options) for view in z for a in directions]))  # type: ignore[arg-type]


def weak_sigreg(z: np.ndarray) -> float:
    """Mean over views of || Cov - I ||_F, z [V, N, D], without a sketch."""
    return float(np.mean([np.linalg.norm(np.cov(view.T) - np.eye(view.shape[1])) for view in z]))


def scale_and_centre(z: np.ndarray) -> float:
    """Mean over views and dimensions of (1 - sigma)^2 + mu^2, z [V, N, D]; sigma as in VISReg's published code, biased and
    plus 1e-6."""
    return float(np.mean((1 - (z.std(1) + 1e-6)) ** 2 + z.mean(1) ** 2))


def scale_and_centre_gradient(z: np.ndarray) -> np.ndarray:
    """Its gradient: d sigma / dz = (z - mu) / (N std) and d mu / dz = 1 / N."""
    views, n, width = z.shape
    mu, std = z.mean(1, keepdims=True), z.std(1, keepdims=True)
    return (-2 * (1 - std - 1e-6) * (z - mu) / (n * std) + 2 * mu / n) / (views * width)


def shape(z: np.ndarray, directions: np.ndarray) -> float:
    """VISReg's: mean over views, directions and order statistics of their squared distance from normal quantiles, of
    embeddings [V, N, D] whose every dimension is standardized."""
    x = (z - z.mean(1, keepdims=True)) / (z.std(1, keepdims=True) + 1e-6)
    target = stats.norm.ppf(np.arange(1, z.shape[1] + 1) / (z.shape[1] + 1))
    return float(np.mean([(np.sort(view @ a) - target) ** 2 for view in x for a in directions]))


def prediction(z: np.ndarray, num_global: int) -> np.ndarray:
    """Squared distance of every embedding from its sample's target, the mean of the global views: [V, N, D]."""
    return (z - z[:num_global].mean(0)) ** 2


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five steps of X <- a X + b X X^T X + c X X^T X X^T X from X / ||X||, with K. Jordan's constants (Muon, 2024)."""
    x = matrix / max(np.linalg.norm(matrix), 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


def muon(
    weight: np.ndarray, gradients: list[np.ndarray], *, lr: float, momentum: float, weight_decay: float, factor: float
) -> np.ndarray:
    """The weight after one update per gradient (torch.optim.Muon's documentation, with an average of gradients for its sum).
    factor: of the learning rate, for the matrix's sides."""
    average = np.zeros_like(weight)
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient
        ahead = momentum * average + (1 - momentum) * gradient  # Nesterov's
        weight = weight * (1 - lr * weight_decay) - lr * factor * newton_schulz(ahead)
    return weight


def adamw(
    weight: np.ndarray,
    gradients: list[np.ndarray],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> np.ndarray:
    """The weight after one update per gradient (Loshchilov and Hutter 2019, algorithm 2, decay times lr as in torch)."""
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for t, gradient in enumerate(gradients, 1):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        update = first / (1 - betas[0] ** t) / (np.sqrt(second / (1 - betas[1] ** t)) + eps)
        weight = weight - lr * weight_decay * weight - lr * update
    return weight
