"""What stochastic depth promises at other engines and numbers of ranks, as docs/step.md says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_config
from ranks import run_ranks
from steps import of_this_rank, start, take_step

from lejepa_scale.config import check_world, validate
from lejepa_scale.model.lejepa import check
from lejepa_scale.training import summary


def _losses(engine: str, drop_path: float, encoder: str) -> list[float]:
    """Of two steps on 8 images."""
    options = {"depth": 3} if encoder == "vit_nano" else {"ls_init_value": 1.0}
    config = validate(
        small_config(
            "u", "u",
            train={"global_batch": 8}, engine={"name": engine},
            model={"encoder": encoder, "options": options, "drop_path": drop_path},
        )
    )  # fmt: skip
    module, plan = start(config)
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(2, 8, 3, side, side, generator=generator) for side in (64, 32)]
    return [float(take_step(module, plan, of_this_rank(views, plan), n).outputs[0]["loss"]) for n in range(2)]


def _on(ranks: int, engine: str, drop_path: float, encoder: str = "vit_nano") -> list[float]:
    return run_ranks(_losses, ranks, engine, drop_path, encoder)[0]


def test_without_it_every_number_of_ranks_has_the_same_losses() -> None:
    one = _on(1, "single", 0.0)
    for ranks in (2, 4):
        assert _on(ranks, "ddp", 0.0) == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("encoder", ["vit_nano", pytest.param("convnext_atto", marks=pytest.mark.slow)])
def test_with_it_engines_draw_the_same_and_numbers_of_ranks_do_not(encoder: str) -> None:
    two = _on(2, "ddp", 0.5, encoder)
    assert _on(2, "ddp", 0.5, encoder) == two
    for engine in ("fsdp", "zero3") if encoder == "vit_nano" else ():
        assert _on(2, engine, 0.5, encoder) == pytest.approx(two, rel=1e-5)
    one, none = _on(1, "single", 0.5, encoder), _on(2, "ddp", 0.0, encoder)
    assert abs(one[0] - two[0]) > 1e-4 * two[0]
    assert abs(none[0] - two[0]) > 1e-4 * two[0]


def _features_of_the_same_images(drop_path: float) -> torch.Tensor:
    """Of the first step, on every rank."""
    model = {"options": {"depth": 3}, "drop_path": drop_path}
    config = validate(small_config("u", "u", train={"global_batch": 8}, engine={"name": "ddp"}, model=model))
    module, plan = start(config)
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(2, 4, 3, side, side, generator=generator) for side in (64, 32)]
    return take_step(module, plan, of_this_rank([torch.cat([v, v], 1) for v in views], plan), 0).outputs[0]["features"]


def test_ranks_draw_for_themselves() -> None:
    first, second = run_ranks(_features_of_the_same_images, 2, 0.0)
    assert torch.equal(first, second)
    first, second = run_ranks(_features_of_the_same_images, 2, 0.5)
    assert (first - second).abs().max() > 1e-2 * first.abs().max()


def notices(tmp_path: Path, ranks: int, **sections: Any) -> str:
    config = validate(small_config(tmp_path, "s", engine={"name": "ddp"}, **sections))
    return summary._draws_notice(config, check_world(config, ranks), check(config))


def test_a_rate_that_rounding_changes_is_named(tmp_path: Path) -> None:
    """4 + 4 views in a micro-batch of 2 images: a tenth of 4 is no whole view; of 40 it is 4."""
    model = {"drop_path": 0.1, "drop_path_uniform": True}
    assert not notices(tmp_path, 2, train={"global_batch": 40})
    few = notices(tmp_path, 2, train={"global_batch": 4, "micro_batch": 2}, model=model)
    assert "by seed, step, micro-batch and rank" in few
    assert "Of 8 views in a rank's micro-batch stochastic depth leaves out 0.0% on average, not 10.0%" in few
    many = notices(tmp_path, 2, train={"global_batch": 40, "micro_batch": 20}, model=model)
    assert "by seed, step, micro-batch and rank" in many
    assert "whole views" not in many
