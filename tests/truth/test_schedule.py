"""The learning rate against torch's schedulers."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from lejepa_scale.config import Objective, Optim
from lejepa_scale.training.schedule import cooldown_steps, lambda_at, learning_rate, weight_decay


def of_torch(lr: float, final: float, steps: int) -> list[float]:
    """CosineAnnealingLR from `lr` at the first of `steps` steps to `final` at the last."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler = CosineAnnealingLR(optimizer, T_max=steps - 1, eta_min=final)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("lr", "ratio", "warmup", "total"), [(0.3, 0.1, 0, 12), (2e-3, 0.0, 5, 31), (1.0, 1.0, 2, 9)])
def test_linear_warm_up_then_torchs_cosine(lr: float, ratio: float, warmup: int, total: int) -> None:
    optim = Optim(lr=lr, final_lr_ratio=ratio, warmup_steps=warmup)
    rates = [learning_rate(step, total, optim) for step in range(total)]
    assert rates[:warmup] == pytest.approx([lr * k / warmup for k in range(1, warmup + 1)], rel=1e-12)
    assert rates[warmup:] == pytest.approx(of_torch(lr, lr * ratio, total - warmup), rel=1e-9, abs=1e-12)


def test_by_default_the_rate_falls_from_5e_4_to_a_thousandth_without_warm_up() -> None:
    rates = [learning_rate(step, 11, Optim()) for step in range(11)]
    assert rates[0] == 5e-4
    assert rates[5] == pytest.approx(5e-4 * (1 + 1e-3) / 2)
    assert rates[10] == pytest.approx(5e-7)


def test_a_run_of_one_step_or_of_nothing_but_warm_up_has_a_rate() -> None:
    assert learning_rate(0, 1, Optim(lr=0.5)) == 0.5
    assert learning_rate(3, 4, Optim(lr=0.5, warmup_steps=4)) == 0.5


@pytest.mark.parametrize(("total", "warmup", "cooldown"), [(30, 5, 10), (12, 0, 1), (20, 4, 16)])
def test_wsd_is_flat_and_then_the_published_root(total: int, warmup: int, cooldown: int) -> None:
    """f(n) = 1 - sqrt((n - (N - C)) / C) for N - C < n <= N, n = 1 ... N (arXiv 2405.18392, section 3)."""
    optim = Optim(lr=0.3, final_lr_ratio=0.0, warmup_steps=warmup, schedule="wsd", cooldown_steps=cooldown)
    rates = [learning_rate(step, total, optim) for step in range(total)]
    assert rates[:warmup] == pytest.approx([0.3 * k / warmup for k in range(1, warmup + 1)])
    assert rates[warmup : total - cooldown] == [0.3] * (total - cooldown - warmup)
    root = [0.3 * (1 - ((n - (total - cooldown)) / cooldown) ** 0.5) for n in range(total - cooldown + 1, total + 1)]
    assert rates[total - cooldown :] == pytest.approx(root)
    assert rates[-1] == 0


def test_a_wsd_run_can_be_made_longer() -> None:
    """Every step before the cooldown of the shorter run is the same in the longer one."""
    optim = Optim(schedule="wsd", warmup_steps=3)
    assert (cooldown_steps(20, optim), cooldown_steps(3, optim)) == (4, 1)
    short, long = ([learning_rate(step, total, optim) for step in range(16)] for total in (20, 60))
    assert short == long
    assert learning_rate(19, 20, optim) == pytest.approx(5e-7)


def test_weight_decay_moves_by_torchs_cosine_or_not_at_all() -> None:
    optim = Optim(weight_decay=0.04, final_weight_decay=0.4)
    assert [weight_decay(step, 9, optim) for step in range(9)] == pytest.approx(of_torch(0.04, 0.4, 9), rel=1e-9)
    assert {weight_decay(step, 9, Optim(weight_decay=0.04)) for step in range(9)} == {0.04}
    assert weight_decay(0, 1, optim) == pytest.approx(0.04)


@pytest.mark.parametrize(("first", "final", "total"), [(0.1, 0.01, 9), (0.02, 0.2, 30), (0.05, 0.05, 4)])
def test_lambda_moves_by_torchs_cosine_or_not_at_all(first: float, final: float, total: int) -> None:
    objective = Objective(lambda_=first, final_lambda=final)
    found = [lambda_at(step, total, objective) for step in range(total)]
    assert found == pytest.approx(of_torch(first, final, total), rel=1e-9)
    assert found[-1] == final
    assert {lambda_at(step, total, Objective(lambda_=first)) for step in range(total)} == {first}
    assert lambda_at(0, 1, objective) == pytest.approx(first)
    assert lambda_at(4, 9, Objective(lambda_=0.1, final_lambda=0.01)) == pytest.approx(0.055)  # half way
