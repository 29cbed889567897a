"""Seconds of a step: against steps that were measured on an H200, and the arithmetic of links."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
from benchmarks import plans
from conftest import ROOT

from lejepa_scale.config import BatchPlan, Config, check_world, load_config
from lejepa_scale.cost.forecast import CALL_SECONDS, HOP_SECONDS, LINK_SHARE, forecast, seconds_of
from lejepa_scale.cost.machines import machine
from lejepa_scale.cost.traffic import Transfer

H200, H100, A100 = machine("h200"), machine("h100"), machine("a100")


class Measured(NamedTuple):
    """A row of docs/benchmarks.md, "On a GPU" (2026-11-26, engine single, bf16, 2 + 6 views)."""

    images: int
    ms: float
    recipe: str
    overrides: tuple[str, ...]


SMALL = ("model.encoder=vit_small_patch16_224", "data.views.local.size=96", "model.drop_path=0.1")
LARGE = ("model.encoder=vit_large_patch14_dinov2", "data.views.local.size=98", "model.drop_path=0.1")
FULL = ("engine.activation_checkpointing=full",)
ROWS = {
    "ViT-S": Measured(256, 152.5, "vitl_in1k", SMALL),
    "ViT-S, compiled": Measured(256, 118.5, "vitl_in1k", (*SMALL, "engine.compile=true")),
    "ViT-L": Measured(64, 325.6, "vitl_in1k", LARGE),
    "ViT-g": Measured(24, 231.2, "vitg_lvd", ()),
    "ViT-g, recomputing": Measured(48, 552.6, "vitg_lvd", FULL),
}


def of(row: Measured) -> Config:
    plain = ["engine.name=single", "engine.activation_checkpointing=none", "engine.compile=false"]
    views = ["data.views.global.count=2", "data.views.local.count=6"]
    batch = [f"train.global_batch={row.images}", f"train.micro_batch={row.images}"]
    return load_config(ROOT / f"configs/{row.recipe}.yaml", [*plain, *views, *batch, *row.overrides])


@pytest.mark.parametrize("name", list(ROWS))
def test_measured_steps_lie_in_the_range(name: str) -> None:
    """What a forecast is for: the range holds the truth, whose middle is within a quarter of it."""
    row, config = ROWS[name], of(ROWS[name])
    found = forecast(config, check_world(config, 1), H200)
    assert found.fastest < row.ms / 1e3 < found.slowest
    assert found.seconds == pytest.approx(row.ms / 1e3, rel=0.25)
    assert found.slowest < 2 * found.fastest


def test_mfu_is_that_of_the_benchmark() -> None:
    """353 TFLOP/s of 989 were reported for 231.2 ms of ViT-g; the count of FLOPs has changed by less than 3 % since."""
    config = of(ROWS["ViT-g"])
    assert forecast(config, check_world(config, 1), H200).mfu(0.2312) == pytest.approx(0.356, rel=0.03)


def test_links() -> None:
    inside = Transfer("x", "all-gather", 8e9, 10, 8)
    assert seconds_of(inside, H100) == pytest.approx(7e9 / 450e9 / LINK_SHARE + 10 * CALL_SECONDS)
    # each of four hosts takes in what the other three have, by eight adapters; on faster ones the links inside are slower
    outside = Transfer("x", "all-gather", 32e9, 10, 32)
    latency = 10 * (CALL_SECONDS + 2 * HOP_SECONDS)
    assert seconds_of(outside, A100) == pytest.approx(24e9 / 8 / 25e9 / LINK_SHARE + latency)
    assert seconds_of(outside, H100) == pytest.approx(31e9 / 450e9 / LINK_SHARE + latency)
    # 31 of 32 parts of a GB are sent, three quarters of them to other hosts, by each GPU's own adapter
    exchanged = Transfer("x", "all-to-all", 32e9, 10, 32)
    assert exchanged.sent == pytest.approx(31e9 / 32)
    assert seconds_of(exchanged, H100) == pytest.approx(24e9 / 32 / H100.outside / LINK_SHARE + latency)
    # a replica's ranks lie on different hosts, with an adapter each
    apart = Transfer("x", "all-reduce", 4e9, 1, 4, near=False)
    assert seconds_of(apart, H100) == pytest.approx(2 * 3e9 / 50e9 / LINK_SHARE + CALL_SECONDS + 2 * HOP_SECONDS)


def test_what_is_not_beside_the_passes_is_waited_for() -> None:
    config = load_config(ROOT / "configs/vitg_lvd.yaml", ["engine.name=fsdp"])
    plan = BatchPlan(micro_batch=48, ranks=64)
    found = forecast(config, plan, H100)
    assert 0 < found.waited < found.network
    slow = forecast(config, plan, replace(H100, outside=H100.outside / 100))
    assert slow.waited > slow.network - found.seconds
    assert slow.seconds > 3 * found.seconds


def test_more_work_takes_longer() -> None:
    base = ["engine.name=fsdp", "engine.compile=false"]

    def seconds(*overrides: str) -> float:
        config = load_config(ROOT / "configs/vitg_lvd.yaml", [*base, *overrides])
        return forecast(config, check_world(config, 64), H100).seconds

    none = seconds("engine.activation_checkpointing=none")
    assert none < seconds("engine.activation_checkpointing=selective") < seconds("engine.activation_checkpointing=full")
    assert seconds("engine.activation_checkpointing=none", "engine.compile=true") < none
    assert seconds("engine.activation_checkpointing=none", "engine.fp8=true") < none
    assert (
        seconds("engine.activation_checkpointing=none", "model.drop_path=0", "model.drop_path_uniform=false")
        > 1.4 * none
    )


def test_muons_iterations_are_shared_by_the_ranks_of_a_matrix() -> None:
    """ViT-g of 40 blocks, by hand: qkv, proj, two of SwiGLU; five steps of 4 s^2 l + 2 s^3 FLOPs on sides s < l. Eight ranks
    make five of each."""
    sides = [(1536, 4608), (1536, 1536), (1536, 8192), (1536, 4096)]
    exact = 40 * 5 * sum(4 * short**2 * long + 2 * short**3 for short, long in sides)

    def update(engine: str, optimizer: str, ranks: int) -> float:
        config = load_config(ROOT / "configs/vitg_lvd.yaml", [f"engine.name={engine}", f"optim.name={optimizer}"])
        return forecast(config, BatchPlan(micro_batch=8, ranks=ranks), H100).update

    for engine, share in (("ddp", 1), ("fsdp", 8)):
        more = update(engine, "muon", 8) - update(engine, "adamw", 8)
        assert more == pytest.approx(exact / share / (H100.peak * H100.product)), engine


def test_published_runs_lie_in_the_range() -> None:
    """Of other people, on other code: DINOv2's ViT-g and DINOv3's 7B, by the GPU-hours that their papers give."""
    rows = list(plans.published())
    assert [row["images/s a GPU, reported"] for row in rows] == [24.0, 18.5]
    for row in rows:
        low, high = (float(text) for text in str(row["between"]).split(" and "))
        assert low < float(row["images/s a GPU, reported"]) < high
