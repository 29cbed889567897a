"""Micro-batches that add up: `exact` equals the whole batch, under every engine; `unbiased` equals it in expectation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import small_config, without_gradient
from ranks import run_ranks
from steps import of_this_rank, start, take_step

from lejepa_scale.checkpoint import gather
from lejepa_scale.config import Config, validate
from lejepa_scale.errors import UserError
from lejepa_scale.model import Replay, build, check
from lejepa_scale.model.lejepa import build_loss
from lejepa_scale.parallel import process_group

GLOBAL = 32


def _config(engine_name: str, accumulation: int, **objective: Any) -> Config:
    return validate(
        small_config(
            "unused",
            "unused",
            train={"global_batch": GLOBAL, "micro_batch": GLOBAL // process_group.world_size() // accumulation},
            engine={"name": engine_name, "precision": "fp32"},
            model={"predictor": {"hidden": 33}},
            objective={"accumulation": "exact", "visreg": {"weight": 0.1}, **objective},
        )
    )


def one_step(
    engine_name: str, accumulation: int, **objective: Any
) -> tuple[list[float], dict[str, torch.Tensor] | None]:
    """Losses of each micro-batch and the gradient norm of one exact step, and the gradient of every parameter (rank 0)."""
    config = _config(engine_name, accumulation, **objective)
    engine, plan = start(config)
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randn(v, GLOBAL, 3, s, s, generator=generator) for v, s in ((2, 32), (3, 16))]
    result = take_step(engine, plan, of_this_rank(groups, plan), 5, exact=True)
    numbers = [*(float(out["loss"]) for out in result.outputs), float(result.grad_norm)]
    state = gather(engine)
    return numbers, state and {
        name: moment / (1 - config.optim.betas[0]) for name, moment in state.moments["exp_avg"].items()
    }


def _on_rank(names: list[str]) -> Any:
    return {name: one_step(name, 4) for name in names}


def test_four_micro_batches_equal_one_batch() -> None:
    """One process, and two ranks of every engine: value, gradient norm and the gradient of every parameter to 1e-5."""
    torch.set_num_threads(1)
    (loss, norm), gradients = one_step("single", 1)
    names = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
    found = {"single": one_step("single", 4), **run_ranks(_on_rank, 2, names)[0]}
    still = without_gradient(_config("single", 1))
    assert still == {"encoder.backbone.norm.bias"}
    for name, (numbers, of_four) in found.items():
        assert numbers == pytest.approx([loss] * 4 + [norm], rel=1e-5), name
        for key, gradient in gradients.items():
            if key in still:
                assert max(gradient.norm(), of_four[key].norm()) < 1e-6 * norm, (name, key)
            else:
                difference = float((of_four[key] - gradient).norm() / gradient.norm().clamp_min(1e-3 * norm))
                assert difference < 1e-5, (name, key, difference)


def _visreg_on_rank(names: list[str]) -> Any:
    return {name: one_step(name, 4, regularizer="visreg") for name in names}


def test_visregs_order_statistics_are_those_of_all_micro_batches_and_ranks() -> None:
    """Sorted over the 32 images of a step, in one process and on two ranks: the same value and gradients."""
    torch.set_num_threads(1)
    (loss, norm), gradients = one_step("single", 1, regularizer="visreg")
    assert gradients is not None
    found = {"single": one_step("single", 4, regularizer="visreg"), **run_ranks(_visreg_on_rank, 2, ["ddp", "fsdp"])[0]}
    for name, (numbers, of_four) in found.items():
        assert numbers == pytest.approx([loss] * 4 + [norm], rel=1e-5), name
        for key, gradient in gradients.items():
            assert float((of_four[key] - gradient).norm()) < 1e-5 * max(norm, float(gradient.norm())), (name, key)


def _gradients(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def _views(samples: int) -> list[torch.Tensor]:
    return [torch.randn(2, samples, 3, side, side, dtype=torch.float64) for side in (32, 16)]


@pytest.mark.parametrize("regularizer", ["sigreg", "visreg"])
def test_exact_gradient_in_float64(regularizer: str) -> None:
    """To 1e-7, for timm interpolates position embeddings in fp32."""
    module = build(_config("single", 2, regularizer=regularizer)).double()
    views = _views(8)
    module(views, 3)["loss"].backward()
    expected = _gradients(module)
    module.zero_grad()
    halves = [[v[:, :4] for v in views], [v[:, 4:] for v in views]]
    with torch.no_grad():
        features = [module(half, None)["features"] for half in halves]
    for i, half in enumerate(halves):
        (module(half, 3, Replay(features, i))["loss"] / 2).backward()
    assert float((_gradients(module) - expected).norm() / expected.norm()) < 1e-7


def test_replayed_randomness_gives_the_first_passs_features() -> None:
    """Every micro-batch then reports the same loss of the whole batch, although stochastic depth drops half of it."""
    config = validate(small_config("u", "u", model={"drop_path": 0.5}, objective={"accumulation": "exact"}))
    module = build(config).double()
    halves = [_views(4), _views(4)]
    features = []
    for i, half in enumerate(halves):
        torch.manual_seed(i)
        features.append(module(half, None)["features"].detach())
    losses = []
    for i, half in enumerate(halves):
        torch.manual_seed(i)
        losses.append(module(half, 3, Replay(features, i))["loss"].detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    assert module(halves[0], 3, Replay(features, 0))["loss"].detach() != losses[0]  # other drops


def test_micro_batches_are_another_objective_and_unbiased_ones_are_not() -> None:
    """Mean over many splits of N = 64 into 8: the U-statistic per part has the whole batch's expectation, V is far off."""
    z = torch.randn(4000, 64, 6) * 1.5  # 4000 batches
    means = {}
    for estimator, accumulation in (("u", "unbiased"), ("v", "micro")):
        tree = small_config(
            "unused", "unused", train={"global_batch": 64},
            objective={
                "accumulation": accumulation,
                "sigreg": {"estimator": estimator, "num_slices": 8, "backend": "fused"},
            },
        )  # fmt: skip
        sigreg = build_loss(validate(tree)).regularizer
        parts = z.view(4000 * 8, 8, 6)
        means[accumulation] = sigreg(parts, step=1)  # the mean over independent parts
    whole = build_loss(
        validate(small_config("u", "u", objective={"sigreg": {"estimator": "u", "num_slices": 8, "backend": "fused"}}))
    ).regularizer
    expected = whole(z, step=1)
    assert float(means["unbiased"] / expected) == pytest.approx(1, abs=0.03)
    assert abs(float(means["micro"] / expected) - 1) > 0.3


def test_exact_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(UserError, match=r"resnet18.*batch normalization"):
        check(
            validate(
                small_config(
                    "u", "u", model={"encoder": "resnet18", "options": {}}, objective={"accumulation": "exact"}
                )
            )
        )
    with pytest.raises(UserError, match="estimator=u"):
        validate(small_config("u", "u", objective={"accumulation": "unbiased"}))
