"""The three ways in which ranks meet: one value, one gradient, and the bytes that each costs, counted."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from ranks import run_ranks

from lejepa_scale.objective import LeJEPALoss, SIGReg, WeakSIGReg
from lejepa_scale.objective.comm_cost import MODES, traffic
from lejepa_scale.parallel import collectives, process_group


def _loss(mode: str, joint: bool, estimator: str = "v") -> LeJEPALoss:
    sigreg = SIGReg(num_slices=50, communication=mode, joint=joint, estimator=estimator)
    return LeJEPALoss(sigreg, lambda_=0.3, scale_centre=0.5)


def _all_modes(z: torch.Tensor, counts: list[int]) -> list:
    me = process_group.rank()
    start = sum(counts[:me])
    found = []
    for mode in MODES:
        for joint in (False, True):
            for given in (None, counts):
                mine = z[:, start : start + counts[me]].clone().requires_grad_()
                terms = _loss(mode, joint, "u")(mine, 2, step=11, counts=given)
                terms.loss.backward()
                found.append(([t.detach() for t in terms], mine.grad))
    return found


@pytest.mark.parametrize("counts", [[5, 12], [7, 1, 0, 9]])
def test_every_mode_equals_one_process(counts: list[int]) -> None:
    z = torch.randn(3, sum(counts), 10, dtype=torch.float64)
    expected = []
    for joint in (False, True):
        whole = z.clone().requires_grad_()
        terms = _loss("sums", joint, "u")(whole, 2, step=11)
        terms.loss.backward()
        expected.append(([t.detach() for t in terms], whole.grad))
    results = run_ranks(_all_modes, len(counts), z, counts)
    for i in range(len(results[0])):
        values, gradient = expected[i // 2 % 2]
        for found in results:
            torch.testing.assert_close(found[i][0], values, rtol=1e-10, atol=1e-10)
        found_gradient = torch.cat([found[i][1] for found in results], dim=1) / len(counts)
        torch.testing.assert_close(found_gradient, gradient, rtol=1e-6, atol=1e-12)


def _counted(mode: str, samples: int, width: int, slices: int, knots: int, dtype: torch.dtype) -> list:
    z = torch.randn(2, samples, width, dtype=dtype, requires_grad=True)
    sigreg = SIGReg(slices, knots, communication=mode)
    world = process_group.world_size()
    with collectives.CountBytes() as forward:
        loss = sigreg(z, step=0, counts=[samples] * world)
    with collectives.CountBytes() as backward:
        loss.backward()
    return [forward.calls, backward.calls]


def _all_counted() -> dict:
    cases = {}
    for samples in (128, 1024):
        cases["sums", samples] = _counted("sums", samples, 16, 64, 17, torch.float32)
    cases["embeddings"] = _counted("embeddings", 24, 16, 64, 17, torch.bfloat16)
    cases["distinct"] = _counted("distinct", 24, 16, 64, 17, torch.bfloat16)
    return cases


def test_bytes_are_what_is_promised() -> None:
    """sums: 4 (2 V M K' + 1) bytes in one all-reduce, whatever N is, and nothing in backward."""
    for cases in run_ranks(_all_counted, 2):
        for samples in (128, 1024):
            assert cases["sums", samples] == [[("allreduce", 4 * (2 * 2 * 64 * 16 + 1))], []]
        assert cases["embeddings"][0][0] == ("allgather_base", 2 * 2 * 24 * 16)
        assert sum(size for _, size in cases["embeddings"][0][1:]) == 0
        assert cases["embeddings"][1] == []
        assert cases["distinct"][0] == [("allgather_base", 2 * 2 * 24 * 16), ("allreduce", 4)]
        assert cases["distinct"][1] == [("reduce_scatter", 2 * 4 * 2 * 24 * 16)]


def test_the_cheapest_way_is_chosen() -> None:
    """Large batches reduce sums; few samples of narrow embeddings with many directions gather."""
    large = traffic(8, [1024] * 8, 512, slices=1024, knots=17, itemsize=2)
    assert large.sums == 2 * 7 * 4 * 2 * 8 * 1024 * 16 // 8
    assert large.embeddings == 7 * 8 * 1024 * 512 * 2
    assert large.cheapest == "sums"
    assert traffic(8, [4] * 8, 64, slices=4096, knots=17).cheapest == "distinct"
    assert traffic(1, [2] * 64, 4, slices=8, knots=17).cheapest != "distinct"  # fewer directions than ranks
    assert "sums" in str(large)
    sigreg = SIGReg(num_slices=4096)
    assert sigreg.mode(8, None, 64) == "sums"  # without counts ranks could disagree
    assert sigreg.mode(8, [4] * 8, 64) == "distinct"


def _faulty_on_rank() -> list[float]:
    values = []
    for mode, fault in product(MODES, (math.nan, math.inf)):
        z = torch.randn(2, 6, 5, requires_grad=True)
        with torch.no_grad():
            if process_group.rank() == 1:
                z[0, 0, 0] = fault
        value = SIGReg(num_slices=8, communication=mode)(z, step=0)
        value.backward()
        values += [float(value.detach()), float(z.grad.sum())]
    return values


def test_a_fault_on_one_rank_shows_on_all() -> None:
    """Value and gradient are NaN everywhere, so that every rank skips the step."""
    for values in run_ranks(_faulty_on_rank, 2):
        assert all(math.isnan(value) for value in values)


def _relatives_on_rank(z: torch.Tensor, counts: list[int]) -> tuple:
    me = process_group.rank()
    start = sum(counts[:me])
    mine = z[:, start : start + counts[me]].clone().requires_grad_()
    value = WeakSIGReg(sketch=6)(mine, step=4)
    value.backward()
    return value.detach(), mine.grad


def test_weak_sigreg_equals_one_process() -> None:
    counts = [5, 12]
    z = torch.randn(3, 17, 10, dtype=torch.float64)
    whole = z.clone().requires_grad_()
    expected = WeakSIGReg(sketch=6)(whole, step=4)
    expected.backward()
    results = run_ranks(_relatives_on_rank, 2, z, counts)
    for value, _ in results:
        torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.cat([g for _, g in results], 1) / 2, whole.grad, rtol=1e-6, atol=1e-12)
