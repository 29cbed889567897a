"""The step against what it promises: the order of calls, the random numbers, and nothing but its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import small_config
from steps import start, take_step
from torch import Tensor

from lejepa_scale.config import BatchPlan, validate
from lejepa_scale.engine import Update
from lejepa_scale.training.step import train_step

made_up = pytest.mark.unchecked  # the engine is


class Recorder:
    """An engine that computes nothing: it notes its calls, and gives a random number as features."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def buffers(self) -> dict[str, Tensor]:
        return {}

    def encode(self, views: list[Tensor]) -> Tensor:
        self.calls.append(("encode", views[0].item()))
        return torch.rand(1)

    def forward(self, views: list[Tensor], step: int, replay: Any, lambda_: float | None) -> dict[str, Tensor]:
        self.calls.append(("forward", views[0].item(), step))
        drawn = torch.rand(1)
        if replay is not None:
            assert torch.equal(replay.features[replay.index], drawn)  # the first pass's numbers, drawn again
        loss = views[0].clone().requires_grad_() * 1
        return {"loss": loss, "features": drawn}

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        self.calls.append(("backward", loss.item(), last_micro_batch))

    def step(self, lr: float, weight_decay: float) -> Update:
        self.calls.append(("step", lr, weight_decay))
        return Update(torch.tensor(2.5), torch.tensor(True))


def _take(engine: Recorder, exact: bool, values: list[float], seed: int = 3, **more: Any) -> Any:
    plan = BatchPlan(micro_batch=4, ranks=1, accumulation=3)
    makers = [lambda value=value: [torch.tensor(value)] for value in values]
    return train_step(
        engine, plan, makers, number=5, seed=seed, lr=0.1, weight_decay=0.2, exact=exact, **more  # type: ignore[arg-type]
    )  # fmt: skip


@made_up
def test_micro_batches_in_turn_then_one_update() -> None:
    engine = Recorder()
    result = _take(engine, False, [3.0, 6.0, 9.0])
    passes = [
        (("forward", value, 5), ("backward", value / 3, value == 9.0)) for value in (3.0, 6.0, 9.0)
    ]  # a third of each: the gradient is that of their mean
    assert engine.calls == [*(call for pair in passes for call in pair), ("step", 0.1, 0.2)]
    assert float(result.loss) == 6.0
    assert float(result.grad_norm) == 2.5
    assert not any(tensor.requires_grad for out in result.outputs for tensor in out.values())
    assert len({float(out["features"]) for out in result.outputs}) == 3  # each micro-batch draws numbers of its own


@made_up
def test_an_exact_step_encodes_all_first_with_the_same_random_numbers() -> None:
    engine = Recorder()
    result = _take(engine, True, [3.0, 6.0, 9.0])
    assert [call[0] for call in engine.calls] == ["encode"] * 3 + ["forward", "backward"] * 3 + ["step"]
    again = _take(Recorder(), False, [3.0, 6.0, 9.0])
    other = _take(Recorder(), False, [3.0, 6.0, 9.0], seed=4)
    drawn = [[float(out["features"]) for out in r.outputs] for r in (result, again, other)]
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])


@made_up
def test_what_is_drawn_follows_from_seed_step_micro_batch_and_rank_alone() -> None:
    """splitmix and friends are in seeds.py; here only that a step does not depend on what was drawn before it."""
    torch.manual_seed(1)
    first = _take(Recorder(), False, [1.0, 1.0, 1.0])
    torch.manual_seed(2)
    second = _take(Recorder(), False, [1.0, 1.0, 1.0])
    assert [float(o["features"]) for o in first.outputs] == [float(o["features"]) for o in second.outputs]


@made_up
@pytest.mark.parametrize("count", [0, 2])
def test_too_few_micro_batches_are_refused_before_the_update(count: int) -> None:
    engine = Recorder()
    with pytest.raises(ValueError, match=f"takes 3 micro-batches of this plan, and was given {count}"):
        _take(engine, False, [1.0] * count)
    assert "step" not in {call[0] for call in engine.calls}


@made_up
def test_phases_have_names() -> None:
    seen: list[str] = []

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        seen.append(name)
        yield

    _take(Recorder(), True, [1.0] * 3, phase=phase)
    assert seen == ["first pass"] * 3 + ["forward", "backward"] * 3 + ["optimizer"]


def test_a_step_of_a_linear_model_is_adamw() -> None:
    """The norm and the update of a real engine against torch's own AdamW and gradient, on the module's parameters."""
    config = validate(small_config("u", "u", optim={"betas": (0.8, 0.9), "eps": 1e-6}))
    engine, plan = start(config)
    views = [torch.randn(2, 16, 3, 32, 32), torch.randn(2, 16, 3, 16, 16)]
    from copy import deepcopy

    from lejepa_scale.training.step import seed_micro_batch

    module = deepcopy(engine.module)
    seed_micro_batch(0, 7, 0)
    module(views, 7)["loss"].backward()
    norm = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
    decayed = [p for p in module.parameters() if p.ndim > 1 and p.numel() != 17 * 128]  # position embedding: 17 tokens
    rest = [p for p in module.parameters() if not any(p is q for q in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    named = dict(module.named_parameters())
    assert {n for n, p in named.items() if p.ndim > 1 and not any(p is q for q in decayed)} == {
        "encoder.backbone.pos_embed"
    }
    cls = named["encoder.backbone.cls_token"]
    groups[0]["params"] = [p for p in decayed if p is not cls]
    groups[1]["params"] = [*rest, cls]
    torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-6).step()
    result = take_step(engine, plan, [views], 7, lr=0.01, weight_decay=0.3)
    torch.testing.assert_close(result.grad_norm, norm)
    for name, parameter in engine.module.named_parameters():
        torch.testing.assert_close(parameter, named[name], msg=name)
