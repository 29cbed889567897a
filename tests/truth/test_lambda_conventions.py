"""Every row of the table of conventions in docs/recipes.md: the translated lambda gives the other convention's gradient, up
to a factor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lejepa_scale.objective import LeJEPALoss, SIGReg

VIEWS, SAMPLES, WIDTH = 3, 40, 5
LAMBDA = 0.3


def sigreg(**settings: object) -> SIGReg:
    return SIGReg(num_slices=16, backend="reference", **settings)  # type: ignore[arg-type]


def embeddings() -> Tensor:
    """[V, N, D], every view a sample of the same distribution."""
    return torch.randn(VIEWS, SAMPLES, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gradient(loss: LeJEPALoss, z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    (out,) = torch.autograd.grad(loss(z, 2, step=0).loss, z)
    return out / out.norm()


def convex(r: float) -> float:
    return r / (1 + r)


@pytest.mark.parametrize(
    ("there", "factor"),
    [
        (LeJEPALoss(sigreg(), LAMBDA, weighting="additive"), 1),
        (LeJEPALoss(sigreg(), LAMBDA, weighting="additive", prediction="sum"), 1 / WIDTH),
        (LeJEPALoss(sigreg(scale="none"), LAMBDA, weighting="additive"), 1 / SAMPLES),
        (LeJEPALoss(sigreg(scale="reference", reference_n=7), LAMBDA, weighting="additive"), 7 / SAMPLES),
    ],
    ids=["additive", "sum over dimensions", "without N", "a fixed N"],
)
def test_a_ratio_is_translated_by_the_factor_of_the_table(there: LeJEPALoss, factor: float) -> None:
    z = embeddings()
    ours = LeJEPALoss(sigreg(), convex(factor * LAMBDA))
    torch.testing.assert_close(gradient(ours, z), gradient(there, z))
    other = LeJEPALoss(sigreg(), convex(1.1 * factor * LAMBDA))
    assert (gradient(other, z) - gradient(there, z)).norm() > 1e-3


def test_a_joint_statistic_counts_every_view() -> None:
    """Views that are spread alike, here the same embeddings in another order."""
    z = embeddings()[0]
    alike = torch.stack([z, z.roll(3, 0), z.roll(11, 0)])
    apart, joint = (sigreg(joint=pooled)(alike, step=0) for pooled in (False, True))
    torch.testing.assert_close(joint, VIEWS * apart)


def test_statistics_that_are_added() -> None:
    z = embeddings()
    added = sum(sigreg()(view, step=0) for view in z)
    torch.testing.assert_close(added, VIEWS * sigreg()(z, step=0))


def test_a_half_line_is_half() -> None:
    """The integral over [0, 3] by torch's trapezoid rule, against that over the whole line, which ours is."""
    z = embeddings()[0]
    a = sigreg().directions(0, WIDTH, z.device, z.dtype)
    t = torch.linspace(0, 3, 17, dtype=z.dtype)
    angles = (z @ a.T)[..., None] * t
    phi = torch.exp(-(t**2) / 2)
    error = ((angles.cos().mean(0) - phi) ** 2 + angles.sin().mean(0) ** 2) * phi
    half = SAMPLES * torch.trapezoid(error, t).mean()
    torch.testing.assert_close(2 * half, sigreg()(z, step=0))
