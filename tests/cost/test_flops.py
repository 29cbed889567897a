"""FLOPs by formula against what torch counts in real steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cost_cases import ENCODERS, batch, config_of, plan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lejepa_scale.config import Config
from lejepa_scale.cost import describe, step_flops
from lejepa_scale.engine.wrap import prepare_blocks
from lejepa_scale.model import Replay, build


def counted(config: Config, images: int, accumulation: int = 1) -> int:
    """What torch counts of the step, forward and backward. Attention is taken apart into its products: torch counts five of
    them, with the scores again, in the backward pass of a fused kernel."""
    model = build(config).train()
    prepare_blocks(model, config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        held, replays = [batch(config, images) for _ in range(accumulation)], [None] * accumulation
        if accumulation > 1 and config.objective.accumulation == "exact":
            with torch.no_grad():
                features = [model(views, None)["features"] for views in held]
            replays = [Replay(features, i) for i in range(accumulation)]  # type: ignore[misc]
        for views, replay in zip(held, replays, strict=True):
            model(views, 0, replay)["loss"].backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("case", ENCODERS)
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_the_formula_is_what_torch_counts(case: str, drop_path: float) -> None:
    config = config_of(case, drop_path)
    flops = step_flops(config, plan(5))
    assert flops.total == counted(config, 5)
    assert flops.hardware == flops.total
    assert flops.attention > 0  # it is packed
    assert (flops.tokens_processed < flops.tokens) == (drop_path > 0)


@pytest.mark.parametrize("case", ENCODERS)
def test_patches_that_are_left_out_are_not_counted(case: str) -> None:
    """Half of 65 or more tokens a view, and some of a local view's 16; their embedding is counted all the same."""
    model = {"patch_drop": {"global": 0.5, "local": 0.3}}
    config, whole = config_of(case, 0.4, model=model), step_flops(config_of(case, 0.4), plan(5))
    flops = step_flops(config, plan(5))
    assert flops.total == counted(config, 5)
    assert flops.patch_embedding == whole.patch_embedding
    assert flops.mlp < 0.7 * whole.mlp


def test_tokens_of_an_image_without_some_patches() -> None:
    """By hand: 64 patches of a global view and 16 of a local one, int(64 x 0.7) = 44 and int(16 x 0.5) = 8, and a class
    token each."""
    model = {"patch_drop": {"global": 0.3, "local": 0.5}}
    assert describe(config_of("plain", model=model), 1)["tokens per image"] == 2 * 45 + 3 * 9
    assert describe(config_of("plain"), 1)["tokens per image"] == 2 * 65 + 3 * 17


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"predictor": {"hidden": 33}}},
        {"model": {"head_dim": 40}},
        {"objective": {"joint": True}},
        {"objective": {"regularizer": "weak_sigreg", "weak_sigreg": {"sketch": 5}}},
        {"objective": {"regularizer": "weak_sigreg", "weak_sigreg": {"sketch": 17}, "joint": True}},
        {"objective": {"regularizer": "visreg", "visreg": {"num_slices": 150}}},
    ],
    ids=["predictor", "head", "joint", "weak", "weak joint", "visreg"],
)
def test_heads_and_regularizers(sections: dict[str, Any]) -> None:
    config = config_of("plain", **sections)
    assert step_flops(config, plan(4)).total == counted(config, 4)


def test_what_is_computed_twice_is_counted_apart() -> None:
    once = step_flops(config_of("plain", 0.3), plan(4, accumulation=3))
    assert once.hardware == once.total == counted(config_of("plain", 0.3), 4, accumulation=3)

    # torch stops recomputing a block where nothing more is needed: after the last product only where layer scale follows it
    full = config_of("registers, layer scale, swiglu", 0.3, engine={"activation_checkpointing": "full"})
    flops = step_flops(full, plan(4))
    assert flops.total == step_flops(config_of("registers, layer scale, swiglu", 0.3), plan(4)).total
    assert flops.hardware == counted(full, 4)

    exact = config_of("plain", 0.3, objective={"accumulation": "exact"})
    flops = step_flops(exact, plan(4, accumulation=3))
    assert flops.total == once.total
    assert flops.hardware == counted(exact, 4, accumulation=3)


def test_a_convolutional_network_is_counted_whole() -> None:
    config = config_of("plain", model={"encoder": "resnet10t", "options": {}})
    flops, truth = step_flops(config, plan(4)), counted(config, 4)
    assert flops.tokens == flops.attention == 0
    assert truth <= flops.total < 1.03 * truth  # three forwards: one gradient with respect to pixels too many


def test_stochastic_depth_is_counted_by_the_sequences_that_stay() -> None:
    """A group of one sequence cannot be thinned; of ten at a rate of 0.25, eight stay (7.5 rounds to even)."""
    model = {"drop_path_uniform": True}
    one, ten = (step_flops(config_of("plain", 0.25, model=model), plan(n)) for n in (1, 10))
    kept_one, kept_ten = 2 * 65 + 2 * 17, 15 * 65 + 22 * 17
    assert (one.tokens, one.tokens_processed) == (2 * 65 + 3 * 17, kept_one)
    assert (ten.tokens, ten.tokens_processed) == (20 * 65 + 30 * 17, kept_ten)
