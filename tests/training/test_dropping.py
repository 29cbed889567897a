"""Token dropping in the trainer's step: what is drawn follows from seed, step, micro-batch and rank, under every engine and
however blocks run; and what the start says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_config
from ranks import run_ranks
from steps import of_this_rank, start, take_step
from torch import Tensor

from lejepa_scale import seeds
from lejepa_scale.config import Config, check_world, validate
from lejepa_scale.model import Replay, build, check
from lejepa_scale.model.dropping import draw
from lejepa_scale.training import summary

DROPPED = {"global": 0.5, "local": 0.3}


def config_of(engine: dict[str, Any] | None = None, exact: bool = False, **model: Any) -> Config:
    return validate(
        small_config(
            "u", "u",
            train={"global_batch": 8, "micro_batch": 4 if exact else None}, engine={"name": "single", **(engine or {})},
            model={"patch_drop": DROPPED, **model}, objective={"accumulation": "exact" if exact else "micro"},
        )
    )  # fmt: skip


def views_of_a_batch() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 8, 3, side, side, generator=generator) for side in (64, 32)]


def losses(config: Config, numbers: tuple[int, ...] = (0, 1)) -> list[float]:
    module, plan = start(config)
    exact = config.objective.accumulation == "exact"
    views = of_this_rank(views_of_a_batch(), plan)
    found = [float(take_step(module, plan, views, n, exact=exact).outputs[-1]["loss"]) for n in numbers]
    module.close()
    return found


def test_a_step_draws_by_its_seed_step_and_rank() -> None:
    """The features of a step are those of a forward pass after that seed, and the places those of `draw`."""
    config = config_of()
    module, plan = start(config)
    encoder = module.module.encoder
    seen = []
    for number in (3, 4):
        torch.manual_seed(seeds.of_micro_batch(0, number, 0, 0))
        expected = [draw(16, 64, 1, 0.5, torch.device("cpu")), draw(16, 16, 1, 0.3, torch.device("cpu"))]
        torch.manual_seed(seeds.of_micro_batch(0, number, 0, 0))
        with torch.no_grad():
            pooled = encoder([v.flatten(0, 1) for v in views_of_a_batch()])[0].unflatten(0, (2, 8)).mean(0)
        out = take_step(module, plan, [views_of_a_batch()], number, lr=0.0).outputs[0]
        torch.testing.assert_close(out["features"], pooled)
        seen.append([places.tolist() for places in expected])
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    "engine",
    [{"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}],
    ids=["full", "selective"],
)
@pytest.mark.parametrize("encoder", ["vit_nano", "vit_small_patch16_dinov3"])
def test_recomputation_sees_the_same_patches(engine: dict[str, Any], encoder: str) -> None:
    model = {"encoder": encoder, "patch_size": 8, "drop_path": 0.5}
    assert losses(config_of(engine, **model)) == pytest.approx(losses(config_of(**model)), rel=1e-6)


def test_both_passes_of_an_exact_objective_draw_the_same() -> None:
    """Every micro-batch then reports the loss of the whole batch."""
    module = build(config_of(exact=True)).double()
    halves = [[v[:, i : i + 4].double() for v in views_of_a_batch()] for i in (0, 4)]
    features, found = [], []
    for i, half in enumerate(halves):
        torch.manual_seed(i)
        features.append(module(half, None)["features"].detach())
    for i, half in enumerate(halves):
        torch.manual_seed(i)
        found.append(module(half, 3, Replay(features, i))["loss"].detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
    again = losses(config_of(exact=True))
    assert again == losses(config_of(exact=True))


@pytest.mark.parametrize("drop", [{"global": 0.5}, {"local": 0.3}, DROPPED], ids=str)
def test_a_group_alone_and_both(drop: dict[str, float]) -> None:
    """The other group's features are as without dropping."""
    config = config_of(patch_drop=drop)
    module, plain = (build(c).encoder.train() for c in (config, config_of(patch_drop={})))
    plain.load_state_dict(module.state_dict())
    views = [v.flatten(0, 1) for v in views_of_a_batch()]
    for name, ours, theirs in zip(("global", "local"), module(views), plain(views), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6) == (name not in drop)


def _on_ranks(engines: list[str], model: dict[str, Any]) -> tuple[list[list[float]], Tensor]:
    """Losses under each engine; features of the same four images on every rank."""
    found = [losses(config_of({"name": name}, **model)) for name in engines]
    module, plan = start(config_of({"name": "ddp"}))
    half = [v[:, :4] for v in views_of_a_batch()]
    same = of_this_rank([torch.cat([v, v], 1) for v in half], plan)
    return found, take_step(module, plan, same, 0).outputs[0]["features"]


DINOV3 = {"encoder": "vit_small_patch16_dinov3", "patch_size": 8, "drop_path": 0.5}


@pytest.mark.parametrize(
    ("engines", "model"),
    [(["fsdp"], {"drop_path": 0.5}), pytest.param(["fsdp", "zero1", "zero3"], DINOV3, marks=pytest.mark.slow)],
    ids=["vit_nano", "dinov3"],
)
def test_ranks_draw_for_themselves_and_engines_alike(engines: list[str], model: dict[str, Any]) -> None:
    ((ddp, again, *others), first), (_, second) = run_ranks(_on_ranks, 2, ["ddp", "ddp", *engines], model)
    assert again == ddp
    for found in others:
        assert found == pytest.approx(ddp, rel=1e-5)
    assert (first - second).abs().max() > 1e-2 * first.abs().max()


def notice(tmp_path: Path, **sections: Any) -> str:
    config = validate(small_config(tmp_path, "s", **sections))
    shapes, plan = check(config), check_world(config, 1)
    device = torch.device("cpu")
    return (
        summary._patches_notice(config, shapes)
        + summary._draws_notice(config, plan, shapes)
        + summary._blocks_notice(config, plan, shapes, device)
    )


def test_what_the_start_says(tmp_path: Path) -> None:
    """32 px in patches of 8 are 16, of which int(16 x 0.7) = 11 stay; 16 px are 4, of which 2 do."""
    found = notice(tmp_path, model={"patch_drop": {"global": 0.3, "local": 0.3}})
    assert (
        "Training sees 11 of the 16 patches of a global view and 2 of the 4 patches of a local view (50.0% left out, not "
        "30.0%): model.patch_drop."
    ) in found
    assert "Patch dropping draws by seed, step, micro-batch and rank" in found
    assert f"{2 * 16 * 12 + 2 * 16 * 3:,} tokens of 64 views in a row" in found
    both = notice(tmp_path, model={"patch_drop": {"global": 0.5}, "drop_path": 0.5})
    assert "Training sees 8 of the 16 patches of a global view: model.patch_drop." in both
    assert "Stochastic depth and patch dropping draw by" in both
    assert "patch" not in notice(tmp_path)
