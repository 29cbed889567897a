"""A step of the real model on tensors without memory against the formulas: FLOPs and bytes exactly, memory to 10 %, where
there are more blocks than are gathered at once."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from conftest import mostly_slow, small_config
from cost_cases import config_of

from lejepa_scale.config import Config, check_world, validate
from lejepa_scale.errors import UserError
from lejepa_scale.operations.tracing import trace

COUNTERS = 1e-7  # GB of norms and flags
CASES = {
    "fsdp": {"engine": {"name": "fsdp"}},
    "fsdp bf16": {"engine": {"name": "fsdp", "precision": "bf16"}},
    "replicas of shards": {"engine": {"name": "fsdp", "shard_degree": 4}},
    "bf16 replicas": {"engine": {"name": "ddp", "precision": "bf16"}},
    "recomputing": {"engine": {"name": "fsdp", "activation_checkpointing": "full"}},
    "exact": {"engine": {"name": "fsdp"}, "objective": {"accumulation": "exact"}},
    "visreg": {"engine": {"name": "fsdp"}, "objective": {"regularizer": "visreg"}},
    "muon": {"engine": {"name": "fsdp"}, "optim": {"name": "muon"}},
}


def configured(name: str, ranks: int) -> Config:
    accumulation = 2 if name == "exact" else 1
    train = {"micro_batch": 8, "global_batch": 8 * ranks * accumulation}
    return config_of("wide", 0.25, train=train, model={"options": {"depth": 12}}, **CASES[name])


@pytest.mark.parametrize("name", mostly_slow(CASES, "fsdp bf16"))
def test_the_formulas_are_what_a_traced_step_does(name: str) -> None:
    config = configured(name, 16)
    rows = {row["of a step and a rank"]: row for row in trace(config, check_world(config, 16))}
    # torch ends a recomputation when it has what it needs: a block's last product is often not made again
    # and the formula is of the passes: Muon's iterations are a twelfth of what this small batch takes
    exactly = {"recomputing": 0.04, "muon": 0.1}.get(name, 1e-3)
    assert float(rows["TFLOP"]["ratio"]) == pytest.approx(1, abs=exactly)
    assert float(rows["GiB"]["ratio"]) == pytest.approx(1, abs=0.15 if name == "recomputing" else 0.1)
    sent = [row for what, row in rows.items() if what.startswith("GB handed to")]
    assert sent
    for row in sent:
        assert float(row["formula"]) == pytest.approx(float(row["traced"]), rel=1e-3, abs=COUNTERS)
    assert not dist.is_initialized()


def test_one_process_has_no_ranks() -> None:
    config = validate(small_config("r", "s", engine={"name": "single"}))
    rows = trace(config, check_world(config, 1))
    assert [row["of a step and a rank"] for row in rows] == ["TFLOP", "GiB"]


def test_what_cannot_be_traced_says_so() -> None:
    for engine, said in (("zero2", "DeepSpeed looks at numbers"), ("ddp", "DDP's buckets are memory")):
        config = validate(small_config("r", "s", engine={"name": engine}))
        with pytest.raises(UserError, match=said):
            trace(config, check_world(config, 2))
