"""A step with a lambda of its own is that of a configuration with that lambda: value and gradient, under every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import small_config
from ranks import run_ranks
from steps import of_this_rank, start, take_step

from lejepa_scale.checkpoint import gather
from lejepa_scale.config import validate
from lejepa_scale.parallel import process_group

GLOBAL, OWN, OTHER = 16, 0.05, 0.4


def _step(engine_name: str, configured: float, given: float | None, exact: bool, weighting: str = "convex") -> Any:
    config = validate(
        small_config(
            "unused",
            "unused",
            train={"global_batch": GLOBAL, "micro_batch": GLOBAL // process_group.world_size() // (2 if exact else 1)},
            engine={"name": engine_name, "precision": "fp32"},
            objective={
                "lambda": configured, "accumulation": "exact" if exact else "micro", "weighting": weighting,
                "visreg": {"weight": 0.1},
            },
        )
    )  # fmt: skip
    engine, plan = start(config)
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randn(2, GLOBAL, 3, s, s, generator=generator) for s in (32, 16)]
    result = take_step(engine, plan, of_this_rank(groups, plan), 5, exact=exact, lambda_=given)
    state = gather(engine)
    moments = state and state.moments["exp_avg"]  # 1 - beta of the gradient
    terms = {name: float(result.outputs[0][name]) for name in ("loss", "prediction", "sigreg")}
    return terms, float(result.grad_norm), moments


def _all(names: list[str]) -> Any:
    return {
        (name, exact): [_step(name, OWN, OTHER, exact), _step(name, OTHER, None, exact), _step(name, OWN, None, exact)]
        for name in names
        for exact in (False, True)
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_steps_lambda_takes_the_place_of_the_configurations(ranks: int) -> None:
    found = _all(["single"]) if ranks == 1 else run_ranks(_all, ranks, ["ddp", "fsdp", "zero1", "zero3"])[0]
    for case, (given, configured, own) in found.items():
        (terms, norm, moments), (expected, expected_norm, gradient) = given, configured
        assert terms == expected, case
        assert norm == expected_norm, case
        assert all(torch.equal(moments[key], gradient[key]) for key in gradient), case
        assert terms["loss"] == pytest.approx(0.6 * terms["prediction"] + 0.4 * terms["sigreg"], rel=1e-6)
        assert own[1] != norm, case
        assert own[0]["loss"] == pytest.approx(0.95 * terms["prediction"] + 0.05 * terms["sigreg"], rel=1e-6)


def test_of_the_additive_loss_too() -> None:
    terms, *_ = _step("single", OWN, OTHER, False, "additive")
    assert terms["loss"] == pytest.approx(terms["prediction"] + 0.4 * terms["sigreg"], rel=1e-6)
