"""Every engine against one process: the same losses, the same final parameters, from the same first weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import mostly_slow, on_a_gpu, small_config, without_gradient
from ranks import run_ranks
from steps import CPU, of_this_rank, start, take_step

from lejepa_scale.checkpoint import CanonicalState, gather
from lejepa_scale.config import Config, validate
from lejepa_scale.objective import sigreg
from lejepa_scale.parallel import process_group

GLOBAL, STEPS = 16, 6
# A key's bias and a bias before batch normalization have no gradient but rounding, which AdamW scales up to a full step; an
# epsilon far above the noise and far below real gradients keeps the comparison meaningful.
EPSILON = 1e-4


def _config(
    engine_name: str, accumulation: int = 1, precision: str = "fp32", objective: dict[str, Any] | None = None
) -> Config:
    micro_batch = GLOBAL // process_group.world_size() // accumulation
    tree = small_config(
        "unused",
        "unused",
        train={"steps": STEPS, "global_batch": GLOBAL, "micro_batch": micro_batch},
        engine={"name": engine_name, "precision": precision},
        model={"predictor": {"hidden": 33}},
        objective=dict(objective or {}),
        optim={"eps": EPSILON, "clip_norm": 0.5},
    )
    return validate(tree)


def train(
    engine_name: str,
    accumulation: int,
    precision: str = "fp32",
    poison: int | None = None,
    device: torch.device = CPU,
    objective: dict[str, Any] | None = None,
) -> tuple[list[tuple[float, float]], CanonicalState | None]:
    """Losses and gradient norms of STEPS steps on fixed random views, and the final state (rank 0)."""
    engine, plan = start(_config(engine_name, accumulation, precision, objective), device)
    history = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        views = [torch.randn(2, GLOBAL, 3, 32, 32, generator=generator) for _ in range(1)]
        views.append(torch.randn(3, GLOBAL, 3, 16, 16, generator=generator))
        if step == poison:
            views[0][0, 0, 0, 0, 0] = torch.inf  # one pixel on one rank
        mine = [[v.to(device) for v in micro] for micro in of_this_rank(views, plan)]
        result = take_step(engine, plan, mine, step)
        assert bool(result.finite) == (step != poison)
        history.append((float(result.loss), float(result.grad_norm)))
    return history, gather(engine)


def _all_on_rank(name: str) -> Any:
    return [train(name, 1), train(name, 2), train(name, 1, poison=2), _round_trip(name)]


def _round_trip(name: str) -> bool:
    """Save, load into a fresh engine, save: every tensor is the same bit for bit."""
    _, state = train(name, 1)
    again = gather(start(_config(name), state=state)[0])
    if state is None or again is None:
        return True
    same = state.updates == again.updates == STEPS
    for kind, group in {"model": state.model, **state.moments}.items():
        other = again.model if kind == "model" else again.moments[kind]
        same = same and group.keys() == other.keys() and all(torch.equal(group[k], other[k]) for k in group)
    return same


@pytest.fixture(scope="module")
def oracle() -> Any:
    torch.set_num_threads(1)
    return [train("single", 1), train("single", 2), train("single", 1, poison=2)]


def _close(found: Any, expected: Any) -> None:
    (history, state), (true_history, true_state) = found, expected
    torch.testing.assert_close(torch.tensor(history), torch.tensor(true_history), rtol=1e-5, atol=0, equal_nan=True)
    assert state.updates == true_state.updates
    still = without_gradient(_config("single"))
    assert still == {"encoder.backbone.norm.bias"}
    for name, value in true_state.model.items():
        if name in still:
            assert max(value.norm(), state.model[name].norm()) < 1e-5, name
        else:
            difference = float((state.model[name] - value).norm() / value.norm().clamp_min(1e-2))
            assert difference < 1e-5, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_two_ranks_equal_one_process(name: str, oracle: Any, tmp_path: Path) -> None:
    results = run_ranks(_all_on_rank, 2, name)
    single, accumulated, poisoned, round_trip = results[0]
    _close(single, oracle[0])
    _close(accumulated, oracle[1])
    _close(poisoned, oracle[2])  # the non-finite step changed nothing on either rank
    assert poisoned[1].updates == STEPS - 1
    assert round_trip
    assert [h[0] for h in results[1][0][0]] == [h[0] for h in single[0]]  # the same loss on every rank


OTHER_OBJECTIVES: dict[str, dict[str, Any]] = {
    "VISReg": {"regularizer": "visreg"},
    "VISReg beside SIGReg": {"visreg": {"weight": 0.1}},
    "weak SIGReg": {"regularizer": "weak_sigreg"},
}


def _objective_on_rank(names: list[str], objective: dict[str, Any]) -> Any:
    return {name: train(name, 1, objective=objective) for name in names}


@pytest.mark.parametrize("objective", mostly_slow(OTHER_OBJECTIVES, "VISReg"))
def test_other_objectives_on_ranks_equal_one_process(objective: str) -> None:
    """Sharded gradients, and each rank's own directions with the samples of all."""
    settings = OTHER_OBJECTIVES[objective]
    expected = train("single", 1, objective=settings)
    found = run_ranks(_objective_on_rank, 2, ["fsdp", "zero1", "zero2", "zero3"], settings)[0]
    for result in found.values():
        _close(result, expected)


def _bf16_on_rank(names: list[str]) -> Any:
    return {name: train(name, 2, "bf16")[0] for name in names}


def test_bf16_on_ranks_follows_one_process_and_fp32(oracle: Any) -> None:
    """Rounding to bf16 grows from step to step: what engines share is compared closely, the two precisions loosely."""
    single = torch.tensor(train("single", 2, "bf16")[0])  # losses and gradient norms
    torch.testing.assert_close(single, torch.tensor(oracle[1][0]), rtol=0.05, atol=0)
    torch.testing.assert_close(single[:, 0], torch.tensor(oracle[1][0])[:, 0], rtol=0.01, atol=0)
    names = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
    for name, history in run_ranks(_bf16_on_rank, 2, names)[0].items():
        found = torch.tensor(history)
        for column, rtol in ((0, 0.01), (1, 0.04)):  # what norms differ by depends on the chip: 0.02 to 0.025 seen
            same = partial(torch.testing.assert_close, rtol=rtol, atol=0, msg=lambda text, n=name: f"{n}: {text}")
            same(found[:, column], single[:, column])


def _hybrid_on_rank() -> Any:
    config = validate(small_config("unused", "unused", engine={"name": "fsdp", "shard_degree": 2}))
    engine, plan = start(config)
    views = torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    result = take_step(engine, plan, of_this_rank([views], plan))
    placements = str(next(engine.module.parameters()).placements)
    state = gather(engine)
    return float(result.loss), float(result.grad_norm), placements, state and state.model


def test_hybrid_sharding_on_four_ranks() -> None:
    """HSDP 2 x 2: the loss and gradient norm of one process."""
    config = validate(small_config("unused", "unused"))
    engine, plan = start(config)
    result = take_step(engine, plan, [[torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0))]])
    expected = float(result.loss), float(result.grad_norm)
    found = run_ranks(_hybrid_on_rank, 4)
    weights = gather(
        engine
    ).model  # after one update, whose direction alone counts: AdamW's first is the gradient's sign
    assert found[0][3].keys() == weights.keys()
    assert all(found[0][3][name].shape == weights[name].shape for name in weights)
    for loss, norm, placements, _ in found:
        assert (loss, norm) == pytest.approx(expected, rel=1e-5)
        assert "Replicate" in placements
        assert "Shard" in placements


def _on_the_gpu(name: str) -> Any:
    draw = sigreg._draw  # devices draw different numbers
    sigreg._draw = lambda *a: draw(*a[:4], CPU, a[5]).to(a[4])
    return [train(name, 1, device=torch.device("cuda")), train(name, 1, "bf16", device=torch.device("cuda"))]


@on_a_gpu
@pytest.mark.parametrize("name", ["single", "ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_on_a_gpu_steps_are_those_of_the_cpu(name: str, oracle: Any) -> None:
    """Convolutions are tf32 there."""
    ((exact, low),) = run_ranks(_on_the_gpu, 1, name)
    torch.testing.assert_close(torch.tensor(exact[0]), torch.tensor(oracle[0][0]), rtol=3e-3, atol=0)
    torch.testing.assert_close(torch.tensor(low[0]), torch.tensor(oracle[0][0]), rtol=0.1, atol=0)
    for found, expected in zip(exact[1].model.values(), oracle[0][1].model.values(), strict=True):
        assert float((found - expected).detach().norm()) < 1e-2 * max(1.0, float(expected.detach().norm()))
