"""VISReg's shape term against SciPy, closed forms, its textbook form and itself on other numbers of ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from scipy import integrate, optimize, special, stats
from truth import formulas

from lejepa_scale.objective import LeJEPALoss, VISReg
from lejepa_scale.objective import visreg as module
from lejepa_scale.parallel import collectives, process_group


def textbook(z: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The paper's shape term, differentiated by autograd."""
    centred = z - z.mean(1, keepdim=True)
    sigma = centred.square().mean(1, keepdim=True).sqrt() + 1e-6
    p = ((centred / sigma.detach()) @ a.T).sort(dim=1).values
    i = torch.arange(1, z.shape[1] + 1, dtype=torch.float64)
    return (p - torch.distributions.Normal(0, 1).icdf(i / (len(i) + 1)).to(p)[:, None]).square().mean()


def sample(*shape: int) -> torch.Tensor:
    return torch.distributions.Gamma(2.0, 1.0).sample(shape).double() * torch.linspace(0.3, 1.7, shape[-1]) - 1.2


def of(visreg: VISReg, z: torch.Tensor, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = z.clone().requires_grad_()
    value = visreg(x, step=step)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


def directions(visreg: VISReg, z: torch.Tensor, step: int = 0) -> torch.Tensor:
    return visreg.directions(step, z.shape[-1], z.device, z.dtype)


@pytest.mark.parametrize("joint", [False, True])
def test_it_is_the_published_formula(joint: bool) -> None:
    z, visreg = sample(3, 20, 5), VISReg(num_slices=13, joint=joint)
    z[1] += 1
    pooled = z.flatten(0, 1)[None] if joint else z
    a = directions(visreg, z, 3).numpy()
    assert float(visreg(z, step=3)) == pytest.approx(formulas.shape(pooled.numpy(), a), rel=1e-12)
    terms = LeJEPALoss(visreg, 0.6)(z, 2, step=3)
    whole = formulas.shape(pooled.numpy(), a) + formulas.scale_and_centre(z.numpy())
    assert float(terms.sigreg) == pytest.approx(whole, rel=1e-12)
    assert VISReg().num_slices == 4096


def test_it_is_the_transport_to_the_quantiles() -> None:
    """In one dimension the cheapest assignment of the sample to the quantiles, which sorting has to find."""
    x = sample(1, 30, 1)
    p = ((x - x.mean()) / (x.std(correction=0) + 1e-6)).flatten().numpy()
    costs = (p[:, None] - stats.norm.ppf(np.arange(1, 31) / 31)) ** 2
    expected = costs[optimize.linear_sum_assignment(costs)].mean()
    plus_and_minus = [float(VISReg(num_slices=1)(sign * x, step=0)) for sign in (1, -1)]  # a direction is 1 or -1
    assert expected in [pytest.approx(value, rel=1e-12) for value in plus_and_minus]


def test_the_expectation_at_a_gaussian() -> None:
    """In one dimension: 1 - 2 mean(E[y_(i)] q_i) / E[s] + mean q^2, since the standardized order statistics are independent
    of s (Basu); E[y_(i)] by integration, E[s] of a chi distribution."""
    n = 12
    q = stats.norm.ppf(np.arange(1, n + 1) / (n + 1))

    def order_statistic(i: int) -> float:
        return integrate.quad(lambda y: y * stats.beta.pdf(stats.norm.cdf(y), i, n + 1 - i) * stats.norm.pdf(y), -9, 9)[
            0
        ]

    s = math.sqrt(2 / n) * math.exp(special.gammaln(n / 2) - special.gammaln((n - 1) / 2))
    expected = 1 - 2 * np.mean([order_statistic(i) * q[i - 1] for i in range(1, n + 1)]) / s + np.mean(q**2)
    z = torch.randn(20_000, n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(VISReg(num_slices=1)(z, step=0)) == pytest.approx(float(expected), rel=0.01)


def test_gaussian_embeddings_are_where_it_is_least() -> None:
    """It is next to nothing of many of N(0, I), whatever their scale and mean, of which it knows nothing; of others it is
    not. In one dimension the quantiles themselves, divided by their deviation s, leave (1 - s)^2."""
    z = torch.randn(1, 4000, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    visreg = VISReg(num_slices=64)
    least = float(visreg(z, step=0))
    assert least < 2e-3
    assert float(visreg(7 * z + 3, step=0)) == pytest.approx(least, rel=1e-4)
    for other in (z.square(), z.sign() + 0.1 * z):
        assert float(visreg(other, step=0)) > 10 * least
    q = torch.from_numpy(stats.norm.ppf(np.arange(1, 51) / 51))
    s = float(q.std(correction=0))
    assert float(visreg(q[None, :, None], step=0)) == pytest.approx((1 - s) ** 2, abs=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_blocks_equal_the_textbook_form(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient, in several blocks of directions of which the last is shorter."""
    monkeypatch.setattr(module, "_CPU_BLOCK", 1)
    z, visreg = sample(3, 50, 12).to(dtype), VISReg(num_slices=150)
    x = z.clone().requires_grad_()
    expected = textbook(x, directions(visreg, z, 5))
    expected.backward()
    torch.testing.assert_close(of(visreg, z, 5), (expected.detach(), x.grad), rtol=tolerance, atol=tolerance)


def test_the_gradient_is_that_of_finite_differences() -> None:
    """Of the sorted distance of what is standardized: sigma, a constant, would be differentiated too else."""
    x, a = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 3, dtype=torch.float64)
    target = module.quantiles(7, x.device, x.dtype)
    assert torch.autograd.gradcheck(lambda y: module._SortedDistance.apply(y, a, target), x)
    squared = module._SortedDistance.apply(x, a, target) ** 2
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(squared, x, create_graph=True)[0].sum().backward()


def test_without_a_gradient_none_is_made() -> None:
    z, visreg = sample(2, 9, 4), VISReg(num_slices=6)
    expected, _ = of(visreg, z, 1)
    with torch.no_grad():
        assert torch.equal(visreg(z.requires_grad_(), step=1), expected)


@pytest.mark.parametrize("mean", [0.0, 5.0])
@pytest.mark.parametrize("sigma", [1.0, 1e-2, 1e-4])
def test_the_gradient_does_not_vanish_at_collapse(sigma: float, mean: float) -> None:
    """fp32 embeddings beside a large mean: the gradient of float64, which grows as 1 / sigma."""
    z = (mean + sigma * sample(1, 200, 4)).float()
    visreg = VISReg(num_slices=32)
    a = visreg.directions(0, 4, z.device, torch.float32).double()
    x = z.double().requires_grad_()
    expected = textbook(x, a)
    expected.backward()
    assert x.grad is not None
    value, gradient = of(visreg, z)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-3)
    assert float((gradient - x.grad).norm()) < 1e-2 * float(x.grad.norm())
    assert float(gradient.norm()) * sigma > 0.005


def test_embeddings_that_are_all_the_same_are_parted() -> None:
    """Their projections are all 0: the value is the mean square of the quantiles, and equal ones have the order of the
    samples, so that the sample n is drawn to the quantile n."""
    z, visreg = torch.full((1, 6, 3), 0.5, dtype=torch.float64), VISReg(num_slices=20)
    q = stats.norm.ppf(np.arange(1, 7) / 7)
    value, gradient = of(visreg, z)
    assert float(value) == pytest.approx(np.mean(q**2), rel=1e-12)
    expected = -2 * q[:, None] * directions(visreg, z).numpy().mean(0) / (6 * 1e-6)
    np.testing.assert_allclose(gradient[0].numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_faulty_embeddings_are_never_a_number(fault: float) -> None:
    z = torch.randn(40, 3)
    z[7, 1] = fault
    value, gradient = of(VISReg(num_slices=4), z)
    assert value.isnan()
    assert gradient.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_embeddings_have_fp32_statistics(dtype: torch.dtype) -> None:
    z = torch.randn(300, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = of(VISReg(num_slices=32), z)
    expected = of(VISReg(num_slices=32), z.float())
    assert torch.equal(value, expected[0])
    assert torch.equal(gradient, expected[1].to(dtype))


def test_what_has_no_statistic_is_refused() -> None:
    with pytest.raises(ValueError, match="VISReg needs num_slices >= 1; got 0"):
        VISReg(num_slices=0)
    with pytest.raises(ValueError, match=r"VISReg needs at least 2 samples over all ranks; got 1"):
        VISReg()(torch.zeros(1, 3), step=0)
    assert VISReg(4, joint=True)(torch.randn(2, 1, 3), step=0).isfinite()


def test_memory_is_that_of_the_gradient_and_of_blocks() -> None:
    """Half of one [V, N, M] at 16 blocks, where the textbook form holds several."""
    from benchmarks.measure import peak_bytes  # not known to the process with the interpreter

    z, visreg = torch.randn(4, 512, 8, requires_grad=True), VISReg(num_slices=16 * 128)
    projections = 4 * z[..., 0].numel() * visreg.num_slices
    peak = peak_bytes(lambda: torch.autograd.grad(visreg(z, step=0), z), z.device)
    assert peak < 0.5 * projections
    a = directions(visreg, z)
    assert peak_bytes(lambda: torch.autograd.grad(textbook(z, a), z), z.device) > 3 * projections


@pytest.mark.traced
def test_no_graph_break_under_compile() -> None:
    visreg, z = VISReg(num_slices=8), torch.randn(2, 20, 6, dtype=torch.float64)
    whole = torch.compile(lambda x, step: visreg(x, step=step), fullgraph=True, backend="aot_eager")
    for step in (0, 1, 7):
        x = z.clone().requires_grad_()
        value = whole(x, step)
        value.backward()
        torch.testing.assert_close((value.detach(), x.grad), of(visreg, z, step))


def _loss(joint: bool, slices: int) -> LeJEPALoss:
    return LeJEPALoss(VISReg(num_slices=slices, joint=joint), lambda_=0.6)


CASES = [(joint, slices) for joint in (False, True) for slices in (50, 3)]  # 3: fewer than ranks


Found = tuple[list[torch.Tensor], torch.Tensor]


def _of_loss(loss: LeJEPALoss, z: torch.Tensor, counts: list[int] | None = None) -> Found:
    x = z.clone().requires_grad_()
    terms = loss(x, 2, step=11, counts=counts)
    terms.loss.backward()
    assert x.grad is not None
    return [term.detach() for term in terms], x.grad


def _on_rank(z: torch.Tensor, shardings: list[list[int]]) -> list[Found]:
    me, found = process_group.rank(), []
    for counts in shardings:
        mine = z[:, sum(counts[:me]) : sum(counts[: me + 1])]
        found += [_of_loss(_loss(*case), mine, given) for case in CASES for given in (None, counts)]
    return found


@pytest.mark.parametrize("shardings", [[[8, 8], [5, 11]], [[4, 4, 4, 4], [7, 1, 0, 8]]])
def test_any_sharding_equals_one_process(shardings: list[list[int]]) -> None:
    """Value on every rank, and W times the gradient of its own samples, for unequal and empty ranks; with samples that are
    equal, whose order then decides."""
    z = sample(3, 16, 10)
    z[0, 4] = z[0, 2]
    results = run_ranks(_on_rank, len(shardings[0]), z, shardings)
    expected = [_of_loss(_loss(*case), z) for _ in shardings for case in CASES for _ in (None, "counts")]
    for i, (values, whole) in enumerate(expected):
        for found in results:
            torch.testing.assert_close(found[i][0], values, rtol=1e-10, atol=1e-10)
        gradient = torch.cat([found[i][1] for found in results], dim=1) / len(results)
        torch.testing.assert_close(gradient, whole, rtol=1e-6, atol=1e-12)


def _counted_and_faulty() -> tuple[list[Any], float, float, str]:
    visreg = VISReg(num_slices=64)
    z = torch.randn(2, 24, 16, dtype=torch.bfloat16, requires_grad=True)
    with collectives.CountBytes() as calls:
        visreg(z, step=0, counts=[24, 24]).backward()
    faulty = torch.randn(2, 6, 5)
    if process_group.rank() == 1:
        faulty[0, 0, 0] = math.nan
    value, gradient = of(visreg, faulty)
    with pytest.raises(ValueError, match="VISReg needs at least 2 samples over all ranks; got 1") as refused:
        visreg(torch.zeros(2, 1 - process_group.rank(), 3), step=0)
    return calls.calls, float(value), float(gradient.sum()), str(refused.value)


def test_what_ranks_send_and_a_fault_on_one_of_them() -> None:
    """A gather in the embeddings' precision, the value and the count, and a reduce-scatter in fp32: no other collective."""
    block = 2 * 24 * 16
    for calls, value, gradient, _ in run_ranks(_counted_and_faulty, 2):
        assert calls == [("allgather_base", 2 * block), ("allreduce", 2 * 4), ("reduce_scatter", 2 * 4 * block)]
        assert math.isnan(value)
        assert math.isnan(gradient)
    assert VISReg(num_slices=64).traffic(2, [24, 24], 16, 2) == (2 + 4) * block
