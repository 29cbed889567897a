"""Learning rates that fall from layer to layer: a plain loop with timm's groups, and every engine on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from conftest import small_config
from ranks import run_ranks
from steps import of_this_rank, start, take_step
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from lejepa_scale.checkpoint import CanonicalState, gather
from lejepa_scale.config import Config, validate
from lejepa_scale.model import build

ENGINES = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
MODELS: dict[str, dict[str, Any]] = {
    "vit": {"encoder": "vit_nano", "options": {"depth": 2}},
    "resnet": {"encoder": "resnet10t", "options": {"channels": [8, 16, 32, 64]}, "predictor": {"hidden": 9}},
    "convnext": {"encoder": "convnext_atto", "options": {"depths": [1, 1, 2, 1], "dims": [8, 16, 16, 24]}},
}
STEPS, DECAY = 3, 0.5


def _config(model: str, engine: str = "single", precision: str = "fp32", **optim: Any) -> Config:
    section = {"name": engine, "precision": precision}
    optim = {"layer_decay": DECAY, "eps": 1e-4, **optim}
    return validate(small_config("unused", "unused", engine=section, model=MODELS[model], optim=optim))


def _views(step: int) -> list[torch.Tensor]:
    return [torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(step))]


def _train(config: Config, state: CanonicalState | None = None) -> CanonicalState | None:
    engine, plan = start(config, state=state)
    for step in range(STEPS):
        take_step(engine, plan, of_this_rank(_views(step), plan), step, lr=0.02, weight_decay=0.1)
    state = gather(engine)
    engine.close()
    return state


@pytest.mark.parametrize("model", MODELS)
def test_steps_are_those_of_a_plain_loop_with_timms_groups(model: str) -> None:
    config = _config(model)
    found = _train(config)
    assert found is not None
    torch.manual_seed(config.run.seed)
    module = build(config).train()
    named = dict(module.named_parameters())
    theirs: Any = timm.create_model(**{**module.encoder.timm_arguments, "num_classes": 3})
    names = {id(p): f"encoder.backbone.{name}" for name, p in theirs.named_parameters()}
    listed = theirs.no_weight_decay() if hasattr(theirs, "no_weight_decay") else ()
    groups = param_groups_layer_decay(theirs, 0.1, listed, layer_decay=DECAY)
    for group in groups:
        group["params"] = [named[names[id(p)]] for p in group["params"] if names[id(p)] in named]
        group["lr"] = 0.02 * group["lr_scale"]
    assert len({group["lr"] for group in groups}) > 3
    heads = torch.nn.ModuleList([part for part in (module.projector, module.predictor) if part is not None])
    groups += [{**group, "lr": 0.02} for group in param_groups_weight_decay(heads, 0.1)]
    assert sum(len(group["params"]) for group in groups) == len(named)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    for step in range(STEPS):
        optimizer.zero_grad()
        module(_views(step), step)["loss"].backward()
        optimizer.step()
    for name, parameter in named.items():
        torch.testing.assert_close(found.model[name], parameter.detach(), rtol=1e-4, atol=2e-6, msg=name)


def test_a_decay_of_1_is_none_and_schedules_reach_every_layer() -> None:
    one, off = (start(_config("vit", layer_decay=decay))[0] for decay in (1, None))
    assert [len(engine.optimizer.param_groups) for engine in (one, off)] == [2, 2]  # type: ignore[attr-defined]
    engine, _ = start(_config("vit"))
    engine.step(0.3, 0.2)
    groups = engine.optimizer.param_groups  # type: ignore[attr-defined]
    assert {group["lr"] for group in groups} == {0.3, 0.3 * 0.5, 0.3 * 0.5**2, 0.3 * 0.5**3}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.2}


def _of_engines(cases: list[tuple[str, str]]) -> list[Any]:
    """The state after steps, and whether a fresh engine that is given it takes the same one after that, to the bit."""
    out = []
    for engine, precision in cases:
        config = _config("vit", engine, precision)
        state = _train(config)
        out.append((state, _train(config, state), _train(config, state)))
    return out


def _expect_close(found: CanonicalState, expected: CanonicalState, case: object) -> None:
    for key, value in expected.model.items():
        difference = float((found.model[key] - value).detach().norm() / value.detach().norm().clamp_min(1e-1))
        assert difference < 1e-4, (case, key, difference)


def test_two_ranks_of_every_engine_are_one_process() -> None:
    cases = [(name, "fp32") for name in ENGINES]
    one = _train(_config("vit"))
    assert one is not None
    two = _train(_config("vit"), one)
    assert two is not None
    for case, (state, after, again) in zip(cases, run_ranks(_of_engines, 2, cases)[0], strict=True):
        assert (state.updates, after.updates) == (STEPS, 2 * STEPS)
        _expect_close(state, one, case)
        _expect_close(after, two, case)
        assert all(torch.equal(after.model[key], again.model[key]) for key in again.model), case


@pytest.mark.slow
def test_deepspeeds_stages_take_the_same_steps_in_bf16() -> None:
    """However they cut the groups: into flat partitions of a group, or each parameter."""
    first, *others = run_ranks(_of_engines, 2, [(name, "bf16") for name in ("zero1", "zero2", "zero3")])[0]
    for other in others:
        _expect_close(other[0], first[0], "before")
        _expect_close(other[1], first[1], "after")
