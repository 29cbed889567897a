"""A step whose gradient is not finite never was: every tensor of the state equals that of a run that did not take it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import mostly_slow, small_config
from ranks import run_ranks
from steps import start, take_step

from lejepa_scale.checkpoint import CanonicalState, gather
from lejepa_scale.config import Config, validate
from lejepa_scale.parallel import process_group

ENGINES = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
MODELS: dict[str, dict[str, Any]] = {
    "vit_nano": {"encoder": "vit_nano", "options": {"depth": 1}},
    "muon": {"encoder": "vit_nano", "options": {"depth": 1}},
    # running averages
    "resnet10t": {"encoder": "resnet10t", "options": {"channels": [8, 16, 32, 64]}, "predictor": {"hidden": 9}},
}


def _config(engine: str, model: str, precision: str) -> Config:
    section = {"name": engine, "precision": precision}
    optim = {"clip_norm": 1.0, "name": "muon" if model == "muon" else "adamw"}
    return validate(small_config("unused", "unused", engine=section, model=MODELS[model], optim=optim))


def _run(engine: str, model: str, precision: str, poison: str | None) -> CanonicalState | None:
    """Steps 0, 1 and 3; between them step 2 with one pixel on the last rank that is not a number, with a gradient whose
    squares are too large for fp32, or not at all."""
    ranks = process_group.world_size()
    built, plan = start(_config(engine, model, precision))
    for number in (0, 1, 2, 3) if poison else (0, 1, 3):
        generator = torch.Generator().manual_seed(10 * number + process_group.rank())
        views = [torch.randn(2, plan.micro_batch, 3, 32, 32, generator=generator)]
        if number == 2 and poison == "nan" and process_group.rank() == ranks - 1:
            views[0][0, 0, 0, 0, 0] = torch.nan
        with pytest.MonkeyPatch.context() as patch:
            if number == 2 and poison == "huge":
                patch.setattr(built, "backward", lambda loss, last, own=built.backward: own(loss * 1e22, last))
            result = take_step(built, plan, [views], number)
        assert bool(result.finite) == (number != 2)
    state = gather(built)
    built.close()
    return state


def _both(engines: list[str], model: str, precision: str, poison: str) -> list[Any]:
    return [[_run(engine, model, precision, kind) for kind in (poison, None)] for engine in engines]


@pytest.mark.parametrize(
    ("model", "precision", "poison"),
    mostly_slow(
        [(m, p, "nan") for m in MODELS for p in ("fp32", "bf16")]
        + [("resnet10t", "fp32", "huge"), ("vit_nano", "bf16", "huge"), ("muon", "fp32", "huge")],
        ("vit_nano", "fp32", "nan"),
        ("vit_nano", "bf16", "huge"),
        ("muon", "fp32", "huge"),
    ),
)
def test_it_changes_nothing(model: str, precision: str, poison: str) -> None:
    settings = model, precision, poison
    engines = [engine for engine in ENGINES if model != "muon" or not engine.startswith("zero")]
    found = [*run_ranks(_both, 1, ["single"], *settings)[0], *run_ranks(_both, 2, engines, *settings)[0]]
    for engine, (with_it, without) in zip(["single", *engines], found, strict=True):
        assert with_it.updates == without.updates == 3, engine
        assert ("momentum_buffer" in without.moments) == (model == "muon")
        assert any("running_var" in name for name in without.model) == (model == "resnet10t")
        for kind, group in {"model": without.model, **without.moments}.items():
            other = with_it.model if kind == "model" else with_it.moments[kind]
            assert other.keys() == group.keys()
            for name, tensor in group.items():
                assert torch.equal(other[name], tensor), (engine, kind, name)
