"""SIGReg against closed forms, Monte Carlo and itself on other numbers of ranks."""

from __future__ import annotations

import math

import pytest
import torch
from ranks import run_ranks

from lejepa_scale.objective import LeJEPALoss, SIGReg, WeakSIGReg
from lejepa_scale.parallel import process_group


def exact_integral(x: torch.Tensor) -> torch.Tensor:
    """N * integral over the line of |ECF - exp(-t^2/2)|^2 exp(-t^2/2) dt, for one slice."""
    n = len(x)
    pairs = torch.exp(-((x[:, None] - x[None]) ** 2) / 2).mean()
    singles = torch.exp(-(x**2) / 4).mean()
    return n * (math.sqrt(2 * math.pi) * pairs - 2 * math.sqrt(math.pi) * singles + math.sqrt(2 * math.pi / 3))


@pytest.mark.parametrize("mean", [0.0, 1.5])
def test_fine_quadrature_approaches_the_closed_form(mean: float) -> None:
    z = torch.randn(200, 1, dtype=torch.float64) + mean
    sigreg = SIGReg(num_slices=1, knots=2001, t_max=10.0)
    # in one dimension the only directions are +1 and -1, which give the same statistic
    torch.testing.assert_close(sigreg(z, step=0), exact_integral(z[:, 0]), rtol=1e-6, atol=0)


def test_published_settings_expect_the_known_values() -> None:
    """In 1024 dimensions, where random directions share least; the expectation depends on neither N nor D."""
    sigreg = SIGReg(num_slices=1024)
    values = torch.stack([sigreg(torch.randn(64, 1024), step=i) for i in range(200)])
    assert values.std() / math.sqrt(len(values)) < 0.0035  # one per cent is three standard errors
    assert float(values.mean()) == pytest.approx(1.0525, rel=0.01)
    collapsed = sigreg(torch.zeros(1000, 8), step=0)
    assert float(collapsed) / 1000 == pytest.approx(0.402, abs=1e-3)


@pytest.mark.parametrize("n", [4, 16, 256])
def test_unbiased_estimator_has_mean_zero(n: int) -> None:
    sigreg = SIGReg(num_slices=64, estimator="u")
    values = torch.stack([sigreg(torch.randn(n, 32), step=i) for i in range(400)])
    assert values.mean().abs() < 3 * values.std() / math.sqrt(len(values))
    assert (values < 0).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("estimator", ["v", "u"])
def test_fused_equals_the_textbook_form(dtype: torch.dtype, tolerance: float, estimator: str) -> None:
    z = torch.randn(3, 150, 12, dtype=dtype)
    results = []
    for backend in ("reference", "fused"):
        x = z.clone().requires_grad_()
        value = SIGReg(num_slices=700, backend=backend, estimator=estimator)(x, step=5)
        value.backward()
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


def test_scales_and_gradient() -> None:
    z = torch.randn(48, 6, dtype=torch.float64, requires_grad=True)
    by_n, by_reference, bare = (
        SIGReg(num_slices=8, scale=scale, reference_n=96)(z, step=0) for scale in ("n", "reference", "none")
    )
    torch.testing.assert_close(by_n, 48 * bare)
    torch.testing.assert_close(by_reference, 96 * bare)
    assert torch.autograd.gradcheck(lambda x: SIGReg(num_slices=8)(x, step=0), z)


def test_directions_follow_the_step_alone() -> None:
    sigreg = SIGReg(num_slices=16)
    arguments = (32, torch.device("cpu"), torch.float32)
    a, again, other = (sigreg.directions(step, *arguments) for step in (7, 7, 8))
    assert torch.equal(a, again)
    assert not torch.allclose(a, other)
    torch.testing.assert_close(a.norm(dim=1), torch.ones(16))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_slices": 0},
        {"knots": 1},
        {"t_max": 0.0},
        {"t_max": math.nan},
        pytest.param({"estimator": "w"}, marks=pytest.mark.unchecked),
        pytest.param({"scale": 3}, marks=pytest.mark.unchecked),
        pytest.param({"backend": "cuda"}, marks=pytest.mark.unchecked),
        pytest.param({"communication": "smoke"}, marks=pytest.mark.unchecked),
    ],
)
def test_impossible_settings_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="SIGReg"):
        SIGReg(**arguments)


def test_samples_that_have_no_statistic_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 1 sample over .*\[2, 0, 3\]"):
        SIGReg(num_slices=4)(torch.zeros(2, 0, 3), step=0)
    with pytest.raises(ValueError, match="at least 2 samples"):
        SIGReg(num_slices=4, estimator="u")(torch.zeros(1, 3), step=0)
    with pytest.raises(ValueError, match="WeakSIGReg needs at least 2 samples"):
        WeakSIGReg()(torch.zeros(1, 3), step=0)


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_faulty_embeddings_are_never_a_number(backend: str, fault: float) -> None:
    z = torch.randn(40, 3)
    z[7, 1] = fault
    z.requires_grad_()
    value = SIGReg(num_slices=4, backend=backend)(z, step=0)
    value.backward()
    assert value.isnan()
    assert not torch.isfinite(z.grad).all()


def test_one_dimension_and_one_sample_have_a_statistic() -> None:
    """D = 1 leaves the directions +1 and -1, which agree; N = 1 has |ECF| = 1 everywhere."""
    x = torch.randn(20, 1, dtype=torch.float64)
    torch.testing.assert_close(SIGReg(num_slices=7)(x, step=1), SIGReg(num_slices=1)(-x, step=2))
    assert float(SIGReg(num_slices=7)(torch.zeros(1, 5), step=0)) == pytest.approx(0.402, abs=1e-3)


def test_even_numbers_of_knots_converge_to_the_same_integral() -> None:
    """The trapezoid rule needs no odd number of knots."""
    z = torch.randn(100, 4, dtype=torch.float64)
    even, odd = (SIGReg(num_slices=9, knots=k)(z, step=0) for k in (16, 17))
    torch.testing.assert_close(even, odd, rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_embeddings_have_fp32_statistics(dtype: torch.dtype) -> None:
    z = torch.randn(300, 16).to(dtype).requires_grad_()
    x = z.detach().float().requires_grad_()
    value, expected = (SIGReg(num_slices=32)(y, step=0) for y in (z, x))
    value.backward()
    expected.backward()
    assert torch.equal(value, expected)
    assert torch.equal(z.grad, x.grad.to(dtype))


def _loss_on_rank(z: torch.Tensor, counts: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    start = sum(counts[: process_group.rank()])
    mine = z[:, start : start + counts[process_group.rank()]].clone().requires_grad_()
    terms = LeJEPALoss(SIGReg(num_slices=50), lambda_=0.3)(mine, 2, step=11)
    terms.loss.backward()
    return [t.detach() for t in terms], mine.grad


@pytest.mark.parametrize("counts", [[5, 12], [7, 1, 0, 9]])
def test_any_sharding_equals_one_process(counts: list[int]) -> None:
    """Value on every rank, and W times the gradient of its own samples, for unequal and empty ranks."""
    z = torch.randn(3, sum(counts), 10, dtype=torch.float64)
    whole = z.clone().requires_grad_()
    terms = LeJEPALoss(SIGReg(num_slices=50), lambda_=0.3)(whole, 2, step=11)
    terms.loss.backward()
    results = run_ranks(_loss_on_rank, len(counts), z, counts)
    for values, _ in results:
        torch.testing.assert_close(values, [t.detach() for t in terms], rtol=1e-10, atol=1e-10)
    gradient = torch.cat([g for _, g in results], dim=1) / len(counts)
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-6, atol=1e-12)
