"""The objective's values and defaults against the papers' formulas (see formulas.py)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from truth import formulas

from lejepa_scale.objective import LeJEPALoss, SIGReg, WeakSIGReg, visreg
from lejepa_scale.objective.sigreg import best_scale
from lejepa_scale.parallel.collectives import mean_of_rows

CPU = torch.device("cpu")


def sample(*shape: int, seed: int = 0) -> torch.Tensor:
    """Skewed, shifted, unequally scaled embeddings, in float64."""
    x = np.random.default_rng(seed).gamma(2.0, size=shape) - 1.2
    return torch.from_numpy(x * np.linspace(0.3, 1.7, shape[-1]))


def directions(sigreg: SIGReg, width: int, step: int = 0) -> np.ndarray:
    return sigreg.directions(step, width, CPU, torch.float64).numpy()


def test_by_default_sigreg_is_the_published_statistic() -> None:
    """17 knots on [0, 3], 1024 directions, N in front, each view by itself."""
    z, sigreg = sample(3, 20, 5), SIGReg()
    assert directions(sigreg, 5).shape == (1024, 5)
    expected = formulas.sigreg(z.numpy(), directions(sigreg, 5), knots=17, t_max=3.0)
    assert float(sigreg(z, step=0)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("backend", ["reference", "fused", "native"])
@pytest.mark.parametrize(("options", "formula"), [
    ({}, {}),
    ({"knots": 9, "t_max": 5.0}, {"knots": 9, "t_max": 5.0}),
    ({"knots": 2, "t_max": 1.0}, {"knots": 2, "t_max": 1.0}),  # one trapezoid on each side of 0
    ({"scale": "none"}, {"factor": 1.0}),
    ({"scale": "reference"}, {"factor": 256.0}),
    ({"scale": "reference", "reference_n": 77}, {"factor": 77.0}),
    ({"estimator": "u"}, {"unbiased": True}),
    ({"estimator": "u", "scale": "none", "knots": 5}, {"unbiased": True, "factor": 1.0, "knots": 5}),
])  # fmt: skip
def test_every_option_of_sigreg_is_in_the_formula(options: dict, formula: dict, backend: Any) -> None:
    z, sigreg = sample(2, 15, 4), SIGReg(num_slices=13, backend=backend, **options)
    expected = formulas.sigreg(z.numpy(), directions(sigreg, 4, step=3), **formula)
    assert float(sigreg(z, step=3)) == pytest.approx(expected, rel=1e-10)


def test_joint_pools_the_views() -> None:
    z = sample(3, 10, 4)
    z[1] += 1  # views that differ, or pooling changes little
    pooled = z.flatten(0, 1)[None].numpy()
    sigreg = SIGReg(num_slices=9, joint=True)
    assert float(sigreg(z, step=1)) == pytest.approx(formulas.sigreg(pooled, directions(sigreg, 4, 1)), rel=1e-12)
    assert float(WeakSIGReg(joint=True)(z, step=1)) == pytest.approx(formulas.weak_sigreg(pooled), rel=1e-12)
    assert float(WeakSIGReg()(z, step=1)) == pytest.approx(formulas.weak_sigreg(z.numpy()), rel=1e-12)


def test_directions_are_uniform_on_the_sphere() -> None:
    """In three dimensions every coordinate of a uniform unit vector is uniform on [-1, 1] (Archimedes)."""
    a = directions(SIGReg(num_slices=20_000), 3)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1)
    for column in (*a.T, a @ np.full(3, 3**-0.5)):
        assert stats.kstest(column, "uniform", (-1, 2)).pvalue > 1e-3


def test_the_seed_chooses_directions_and_sketch() -> None:
    z = sample(1, 40, 8)
    for kind in (lambda seed: SIGReg(num_slices=4, seed=seed), lambda seed: WeakSIGReg(sketch=3, seed=seed)):
        values = {seed: float(kind(seed)(z, step=0)) for seed in (0, 1, 2)}
        assert len(set(values.values())) == 3
        assert values[1] == float(kind(1)(z, step=0))


@pytest.mark.parametrize("width", [1, 6, 64])
def test_weak_sigreg_is_the_distance_of_the_covariance_from_the_identity(width: int) -> None:
    z = sample(2, 50, width)
    assert float(WeakSIGReg()(z, step=0)) == pytest.approx(formulas.weak_sigreg(z.numpy()), rel=1e-10)


def test_weak_sigreg_vanishes_at_the_identity() -> None:
    z = torch.cat([torch.eye(5), -torch.eye(5)]).double() * (9 / 2) ** 0.5  # unbiased covariance I
    assert float(WeakSIGReg()(z, step=0)) == pytest.approx(0, abs=1e-12)
    assert float(WeakSIGReg()(3 * z, step=0)) == pytest.approx(8 * 5**0.5)  # || 9 I - I ||_F


def test_a_sketch_keeps_the_scale_of_the_covariance() -> None:
    """A covariance s^2 I becomes s^2 S' S, with S [D, k] of variance 1/D: a Wishart matrix, of which the expectation of
    || S' S ||_F^2 is k + k (k + 1) / D."""
    width, sketch, scale = 256, 16, 1e3
    z = torch.cat([torch.eye(width), -torch.eye(width)]).double() * ((2 * width - 1) / 2) ** 0.5
    found = [float(WeakSIGReg(sketch=sketch)(scale * z, step=step)) / scale**2 for step in range(20)]
    expected = sketch + sketch * (sketch + 1) / width
    assert np.mean(np.square(found)) == pytest.approx(expected, rel=0.03)


def test_by_default_weak_sigreg_sketches_beyond_64_dimensions() -> None:
    """Up to there it is exact and the same at every step; a sketch is drawn anew."""
    assert WeakSIGReg().sketch == 64
    for width, steps_agree in ((64, True), (65, False)):
        z = sample(1, 80, width)
        assert (float(WeakSIGReg()(z, step=0)) == float(WeakSIGReg()(z, step=1))) == steps_agree


@pytest.mark.parametrize("weight", [0.1, 2.5])
def test_visregs_terms_stand_beside_the_regularizer(weight: float) -> None:
    z = sample(3, 12, 4)
    terms = [LeJEPALoss(SIGReg(num_slices=5), 0.3, scale_centre=w)(z, 2, step=0) for w in (0.0, weight)]
    expected = weight * formulas.scale_and_centre(z.numpy())
    assert float(terms[1].sigreg - terms[0].sigreg) == pytest.approx(expected, rel=1e-10)
    assert float(terms[1].loss - terms[0].loss) == pytest.approx(0.3 * expected, rel=1e-10)


def test_visregs_terms_of_embeddings_that_are_all_the_same() -> None:
    """sigma is 0, the centre is what it is, and there is no direction to part in: a gradient of the centre's alone."""
    z = torch.full((2, 6, 3), 0.5, dtype=torch.float64, requires_grad=True)
    terms = [LeJEPALoss(SIGReg(num_slices=5), 0.3, scale_centre=w)(z, 1, step=0) for w in (0.0, 1.0)]
    difference = terms[1].sigreg - terms[0].sigreg
    assert float(difference.detach()) == pytest.approx((1 - 1e-6) ** 2 + 0.25, rel=1e-9)
    (gradient,) = torch.autograd.grad(difference, z)
    torch.testing.assert_close(gradient, torch.full_like(z, 2 * 0.5 / (6 * 2 * 3)))


def collapsed(sigma: float, mean: float) -> torch.Tensor:
    z = torch.randn(2, 256, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return (mean + sigma * z).float()


@pytest.mark.parametrize("mean", [0.0, 5.0])
@pytest.mark.parametrize("sigma", [1.0, 1e-2, 1e-4, 1e-5])
def test_visregs_pull_apart_does_not_end_at_collapse(sigma: float, mean: float) -> None:
    """d/dz of mean((1 - sigma)^2 + mu^2) in closed form, in float64 of the fp32 embeddings; as strong at 1e-5 as at 1e-2."""
    z = collapsed(sigma, mean).requires_grad_()
    origin = mean_of_rows(z)
    value = visreg.scale_and_centre(visreg.scale_and_centre_sums(z, origin), torch.tensor(256.0), origin)
    assert float(value) == pytest.approx(formulas.scale_and_centre(z.detach().double().numpy()), rel=1e-5)
    (gradient,) = torch.autograd.grad(value, z)
    expected = formulas.scale_and_centre_gradient(z.detach().double().numpy())
    apart = gradient.double().numpy() - gradient.double().numpy().mean(1, keepdims=True)
    expected_apart = expected - expected.mean(1, keepdims=True)
    np.testing.assert_allclose(apart, expected_apart, rtol=1e-3, atol=1e-3 * np.abs(expected_apart).max())
    pull = (apart * (z.detach().double().numpy() - mean)).sum() / sigma
    assert pull == pytest.approx(-2 * (1 - sigma), abs=0.05)


@pytest.mark.parametrize("sigma", [1e-2, 1e-4, 1e-5])
def test_weak_sigreg_sees_a_small_covariance_beside_a_large_mean(sigma: float) -> None:
    """Its value and gradient in fp32 are those of the centred embeddings, whose covariance nothing drowns."""
    found, centred = collapsed(sigma, 5.0).requires_grad_(), collapsed(sigma, 5.0).double()
    centred = (centred - centred.mean(1, keepdim=True)).requires_grad_()
    value, expected = WeakSIGReg()(found, step=0), WeakSIGReg()(centred, step=0)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    value.backward()
    expected.backward()
    torch.testing.assert_close(
        found.grad.double(), centred.grad, rtol=2e-3, atol=2e-3 * float(centred.grad.abs().max())
    )


@pytest.mark.parametrize("num_global", [1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighting", ["convex", "additive"])
def test_the_loss_is_algorithm_2(weighting: Any, reduction: Any, num_global: int) -> None:
    """The error is the mean over views and samples, and the mean or the sum over dimensions."""
    z, sigreg = sample(4, 10, 6), SIGReg(num_slices=7)
    terms = LeJEPALoss(sigreg, 0.2, weighting=weighting, prediction=reduction)(z, num_global, step=2)
    error = formulas.prediction(z.numpy(), num_global)
    prediction = error.mean() if reduction == "mean" else error.sum(2).mean()
    regularizer = formulas.sigreg(z.numpy(), directions(sigreg, 6, 2))
    share = 0.8 if weighting == "convex" else 1.0
    assert [float(t) for t in terms] == pytest.approx(
        [share * prediction + 0.2 * regularizer, prediction, regularizer], rel=1e-10
    )


def test_additive_weighting_is_convex_up_to_a_factor() -> None:
    """L_pred + lambda / (1 - lambda) R = L / (1 - lambda)."""
    z, lambda_ = sample(3, 10, 5), 0.25
    convex = LeJEPALoss(SIGReg(num_slices=4), lambda_)(z, 2, step=0).loss
    additive = LeJEPALoss(SIGReg(num_slices=4), lambda_ / (1 - lambda_), weighting="additive")(z, 2, step=0).loss
    assert float(additive) == pytest.approx(float(convex) / (1 - lambda_), rel=1e-12)


def test_lambda_is_0_05_by_default() -> None:
    z, sigreg = sample(2, 8, 3), SIGReg(num_slices=4)
    terms = LeJEPALoss(sigreg)(z, 2, step=0)
    expected = 0.95 * formulas.prediction(z.numpy(), 2).mean() + 0.05 * formulas.sigreg(
        z.numpy(), directions(sigreg, 3)
    )
    assert float(terms.loss) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("knots", "t_max", "known"), [(17, 3.0, 1.0525), (2001, 10.0, None)])
def test_the_expectation_at_a_gaussian(knots: int, t_max: float, known: float | None) -> None:
    """Theorem 6 at P = N(0, 1): sum of weights (1 - phi^2), which tends to sqrt(2 pi) - sqrt(2 pi / 3)."""
    t, weights = formulas.quadrature(knots, t_max)
    expected = float(np.sum(weights * np.exp(-(t**2) / 2) * (1 - np.exp(-(t**2)))))
    assert expected == pytest.approx(known or math.sqrt(2 * math.pi) * (1 - 3**-0.5), abs=2e-4)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((400, 50, 1)))  # 400 samples of 50
    values = SIGReg(num_slices=1, knots=knots, t_max=t_max)(x, step=0)
    assert float(values) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(("samples", "scale"), [(1, 0.0), (2, 0.43), (4, 0.745), (16, 0.938), (10**6, 1.0)])
def test_few_samples_ask_for_a_smaller_scale(samples: int, scale: float) -> None:
    assert best_scale(samples) == pytest.approx(scale, abs=0.0101)


def test_the_scale_that_few_samples_ask_for_is_where_the_statistic_is_least() -> None:
    """4 embeddings at a time, drawn 4,000 times: the mean statistic is lower there than at 1 and on either side."""
    draws = torch.randn(4000, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    least = best_scale(4)
    found = {s: float(SIGReg(num_slices=1)(s * draws, step=0)) for s in (least, 1.0, least - 0.2, least + 0.15)}
    assert min(found, key=lambda s: found[s]) == least
