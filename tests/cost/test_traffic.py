"""What ranks send by formula against every collective of real steps on gloo ranks, byte for byte."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from conftest import mostly_slow
from cost_cases import batch, config_of
from ranks import run_ranks
from steps import start, take_step

from lejepa_scale.config import BatchPlan, Config
from lejepa_scale.cost.flops import meta_model
from lejepa_scale.cost.machines import MACHINES, machine
from lejepa_scale.cost.traffic import Transfer, step_traffic
from lejepa_scale.errors import UserError
from lejepa_scale.parallel.collectives import CountBytes

DEPTH, MICRO_BATCH = 5, 4
COUNTERS = 32  # bytes of norms and flags, which the formula leaves out
KINDS = {
    "allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "alltoall": "all-to-all",
}
RESNET = {"channels": [5, 8, 12, 16], "stem_width": 8}  # five outputs are cut unevenly
Case = tuple[dict[str, Any], int]  # sections, micro-batches


def case(name: str, accumulation: int = 1, **sections: dict[str, Any]) -> Case:
    return sections | {"engine": {"name": name} | sections.get("engine", {})}, accumulation


OF_ENGINES = {
    f"{engine} {precision}": case(engine, 2, engine={"precision": precision})
    for engine in ("ddp", "fsdp", "zero1", "zero2", "zero3")
    for precision in ("fp32", "bf16")
}
OTHERS = {
    "zero3 without prefetching": case("zero3", engine={"prefetch": 0}),
    "zero3 far ahead": case("zero3", engine={"prefetch": 2}),
    "ddp exact": case("ddp", 2, objective={"accumulation": "exact"}),
    "fsdp exact": case("fsdp", 2, objective={"accumulation": "exact"}),
    "fsdp recomputing": case("fsdp", engine={"activation_checkpointing": "full"}),
    "Muon": case("fsdp", optim={"name": "muon"}),
    "Muon, copies": case("ddp", optim={"name": "muon"}),
    "Muon, convolutions": case("fsdp", optim={"name": "muon"}, model={"encoder": "resnet10t", "options": RESNET}),
    "layers' own rates": case("zero1", engine={"precision": "bf16"}, optim={"layer_decay": 0.7}),
    "VISReg": case("fsdp", objective={"regularizer": "visreg"}),
    "Weak-SIGReg": case("fsdp", objective={"regularizer": "weak_sigreg"}),
    "Weak-SIGReg, joint": case("fsdp", objective={"regularizer": "weak_sigreg", "joint": True}),
    "joint": case("fsdp", objective={"joint": True}),
    "sums": case("ddp", objective={"sigreg": {"communication": "sums"}}),
    "sums, joint, scale and centre": case(
        "ddp", objective={"joint": True, "sigreg": {"communication": "sums"}, "visreg": {"weight": 0.5}}
    ),
    "embeddings": case("ddp", objective={"sigreg": {"communication": "embeddings"}}),
}
FEW = (
    "ddp bf16",
    "fsdp fp32",
    "zero2 bf16",
    "zero3 fp32",
    "fsdp exact",
    "Muon, copies",
    "Muon, convolutions",
    "VISReg",
    "sums, joint, scale and centre",
)
OF_FOUR = {
    "two replicas": case("fsdp", 2, engine={"shard_degree": 2}),
    "two replicas bf16": case("fsdp", engine={"shard_degree": 2, "precision": "bf16"}),
    "fsdp": case("fsdp"),
    "Muon": case("fsdp", optim={"name": "muon"}),
    "Muon, copies": case("ddp", optim={"name": "muon"}),
    "Muon, two replicas": case("fsdp", optim={"name": "muon"}, engine={"shard_degree": 2}),
    "zero3": case("zero3"),
    "zero1": case("zero1", engine={"precision": "bf16"}),
    "VISReg": case("ddp", objective={"regularizer": "visreg"}),
}


def configured(one: Case, ranks: int) -> Config:
    sections, accumulation = one
    train = {"micro_batch": MICRO_BATCH, "global_batch": MICRO_BATCH * ranks * accumulation}
    return config_of("plain", **{"train": train, "model": {"options": {"depth": DEPTH}}, **sections})


def _counted(cases: dict[str, Case], ranks: int) -> dict[str, tuple[dict[str, int], dict[str, float]]]:
    """Bytes handed to each kind of collective in a step, as counted and as the formula has them."""
    found = {}
    for name, one in cases.items():
        config = configured(one, ranks)
        engine, plan = start(config)
        views = [batch(config, MICRO_BATCH) for _ in range(plan.accumulation)]
        exact = config.objective.accumulation == "exact"
        for step in range(3):  # DeepSpeed records the order of modules in the first
            take_step(engine, plan, views, step, exact=exact)
        with CountBytes() as traffic:
            take_step(engine, plan, views, 3, exact=exact)
        counted, formula = Counter[str](), Counter[str]()
        for kind, size in traffic.calls:
            counted[KINDS[kind.removesuffix("_base")]] += size
        for transfer in step_traffic(config, plan, "cpu"):
            formula[transfer.collective] += transfer.handed
        found[name] = dict(counted), dict(formula)
        engine.close()
    return found


def _on_two(few: bool) -> Any:
    cases = OF_ENGINES | OTHERS
    return _counted({name: cases[name] for name in FEW} if few else cases, 2)


def _on_four() -> Any:
    return _counted(OF_FOUR, 4)


def agree(found: dict[str, tuple[dict[str, int], dict[str, float]]]) -> None:
    for name, (counted, formula) in found.items():
        assert sum(formula.values()) > 100 * COUNTERS, name
        for kind in KINDS.values():
            assert counted.get(kind, 0) == pytest.approx(formula.get(kind, 0), abs=COUNTERS, rel=0), (name, kind)


@pytest.mark.parametrize("few", mostly_slow([True, False], True))
def test_the_formula_is_what_two_ranks_send(few: bool) -> None:
    agree(run_ranks(_on_two, 2, few, timeout=400)[0])


@pytest.mark.slow
def test_the_formula_is_what_four_ranks_send() -> None:
    agree(run_ranks(_on_four, 4)[0])


def test_ddp_sends_every_gradient_twice_around_the_ring() -> None:
    """Closed form: 2 (W - 1) / W of 4 bytes a parameter."""
    config = configured(case("ddp"), 8)
    (gradients,) = [one for one in step_traffic(config, BatchPlan(micro_batch=4, ranks=8)) if one.what == "gradients"]
    parameters = sum(p.numel() for p in meta_model(config).parameters())
    assert gradients.sent == pytest.approx(2 * 7 / 8 * 4 * parameters)


def test_batch_statistics_on_gpus() -> None:
    """Two batch normalizations of the projector (64 wide): [1 + 2 C] forward and [2 C] backward, from every rank."""
    config = configured(case("ddp"), 4)
    head = config.model.projector
    (found,) = [o for o in step_traffic(config, BatchPlan(micro_batch=4, ranks=4)) if o.what == "batch statistics"]
    assert found.handed == (head.layers - 1) * 4 * (4 * head.hidden + 1)
    assert found.calls == 2 * (head.layers - 1)


def test_one_rank_sends_nothing() -> None:
    sections, _ = case("single")
    config = config_of("plain", model={"options": {"depth": DEPTH}}, **sections)
    assert step_traffic(config, BatchPlan(micro_batch=4)) == []


def test_rings() -> None:
    gather, reduce = Transfer("x", "all-gather", 800, 1, 8), Transfer("x", "all-reduce", 800, 1, 8)
    assert (gather.sent, gather.handed) == (700, 100)
    assert (reduce.sent, reduce.handed) == (1400, 800)


@pytest.mark.parametrize("name", list(MACHINES))
def test_machines_are_whole(name: str) -> None:
    found = machine(name.upper())
    assert found.peak > 1e14
    assert 0 < found.attention < found.product < 1
    assert found.outside < found.inside < found.bandwidth
    assert math.log2(found.memory / 2**30) > 6


def test_an_unknown_chip_names_those_that_are_known() -> None:
    with pytest.raises(UserError, match="--chip v100: there are figures for a100, h100"):
        machine("v100")
