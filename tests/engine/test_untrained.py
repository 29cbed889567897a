"""Parameters that timm does not train are kept as they are by every engine, and saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import small_config
from ranks import run_ranks
from steps import start, take_step

from lejepa_scale.checkpoint import gather
from lejepa_scale.config import validate

NAME = "encoder.backbone.weights"  # of efficientvim_m1, without a classifier
ENGINES = ["ddp", "fsdp", "zero1", "zero3"]


def _after_a_step(engines: list[str]) -> list[Any]:
    found = []
    for name in engines:
        engine = {"name": name, "precision": "bf16"}
        model = {"encoder": "efficientvim_m1", "options": {}}
        built, plan = start(validate(small_config("u", "u", train={"global_batch": 4}, engine=engine, model=model)))
        take_step(built, plan, [[torch.randn(2, plan.micro_batch, 3, 64, 64)]])
        state = gather(built)
        built.close()
        if state is not None:
            assert NAME not in state.moments["exp_avg"]
            assert len(state.moments["exp_avg"]) > 100
            found.append(state.model[NAME])
    return found


@pytest.mark.slow
def test_they_stay_as_they_are() -> None:
    for engines, ranks in ((["single"], 1), (ENGINES, 2)):
        for engine, value in zip(engines, run_ranks(_after_a_step, ranks, engines)[0], strict=True):
            assert torch.equal(value, torch.ones(4)), engine
