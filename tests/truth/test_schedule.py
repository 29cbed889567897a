"""The learning rate against torch's schedulers."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from lejepa_scale.config import Optim
from lejepa_scale.training.schedule import learning_rate


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
