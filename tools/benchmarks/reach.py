"""Is isotropy really reached? Free embeddings are moved by SIGReg's gradient alone, from starts that are far from it; after
that every direction is tested, with directions that were not used before, against samples of a true N(0, I)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.measure import Row
from lejepa_scale.evaluation.isotropy import epps_pulley
from lejepa_scale.objective import SIGReg

STEPS, SAMPLES, WIDTH = 600, 1024, 32
_UNUSED_SEED = 987654


def starts(samples: int, width: int) -> dict[str, Float[Tensor, "n d"]]:
    """Nearly one point; and a diagonal covariance with entries from 0.1 to 1.9."""
    noise = torch.randn(samples, width, generator=torch.Generator().manual_seed(0))
    centre = torch.randn(width, generator=torch.Generator().manual_seed(1))
    return {
        "collapsed": centre + 0.01 * noise,
        "variances 0.1 to 1.9": noise * torch.linspace(0.1, 1.9, width).sqrt(),
    }


def per_direction(z: Float[Tensor, "n d"], directions: int = 512) -> Float[Tensor, " m"]:
    """The statistic of each of many directions that training never drew."""
    a = SIGReg(directions, seed=_UNUSED_SEED).directions(0, z.shape[1], z.device, z.dtype)
    return epps_pulley(z @ a.T)


def descend(start: Float[Tensor, "n d"], steps: int, lr: float = 0.1) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """(final embeddings, statistics per direction along the way)."""
    z = start.clone().requires_grad_()
    optimizer, sigreg = torch.optim.Adam([z], lr=lr, betas=(0.9, 0.95)), SIGReg(num_slices=128, backend="fused")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    path = []
    for step in range(steps + 1):
        if step % max(1, steps // 30) == 0:
            path.append((step, per_direction(z.detach())))
        optimizer.zero_grad()
        sigreg(z, step=step).backward()
        optimizer.step()
        schedule.step()
    return z.detach(), path


def reach(plot: Path | None, steps: int = STEPS, samples: int = SAMPLES, width: int = WIDTH) -> Iterator[Row]:
    gaussian = per_direction(torch.randn(samples, width, generator=torch.Generator().manual_seed(2)))
    floor, worst = float(gaussian.mean()), float(gaussian.max())
    paths = {}
    for name, start in starts(samples, width).items():
        z, paths[name] = descend(start, steps)
        before, after = paths[name][0][1], paths[name][-1][1]
        eigenvalues = torch.linalg.eigvalsh(torch.cov(z.T))
        yield {
            "case": f"{name}: N={samples} D={width}, {steps} steps",
            "ok": float(after.max()) < worst,
            "mean before": float(before.mean()),
            "mean after": float(after.mean()),
            "worst direction after": float(after.max()),
            "N(0, I) mean": floor,
            "N(0, I) worst": worst,
            "eigenvalues from": float(eigenvalues[0]),
            "to": float(eigenvalues[-1]),
        }
    if plot is not None:
        _draw(paths, gaussian, plot)


def _draw(paths: dict[str, list[tuple[int, Tensor]]], gaussian: Tensor, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(paths), figsize=(5 * len(paths), 3.6), sharey=True, layout="constrained")
    low, high = (float(x) for x in (gaussian.min(), gaussian.max()))
    for axis, (name, path) in zip(axes, paths.items(), strict=True):
        steps = [step for step, _ in path]
        values = torch.stack([v for _, v in path])  # [steps, directions]
        axis.fill_between(steps, values.amin(1), values.amax(1), alpha=0.25, label="all directions")
        axis.plot(steps, values.mean(1), label="their mean")
        axis.axhspan(low, high, color="0.6", alpha=0.35, label="directions of a sample of N(0, I)")
        axis.set(title=f"start: {name}", xlabel="step", yscale="log")
    axes[0].set_ylabel("statistic of a direction")
    axes[-1].legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
