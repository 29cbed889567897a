"""What a packed step sends over ranks: parameters are gathered once per block and direction, whatever the number of view
sizes, and gradients are reduced once, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import small_config
from ranks import run_ranks
from steps import start, take_step

from lejepa_scale.config import validate
from lejepa_scale.parallel.collectives import CountBytes

DEPTH = 4
Calls = list[tuple[str, int]]  # kind of collective, bytes


def _count(name: str, settings: dict[str, Any], resolutions: int) -> tuple[Calls, Calls, int, int]:
    """Collectives of the third step, forward and backward; parameters of a block, and those in its matrices."""
    config = validate(
        small_config(
            "unused",
            "unused",
            engine={"name": name, "precision": "bf16", **settings},
            model={"options": {"depth": DEPTH}, "drop_path": 0.25},
        )
    )
    engine, plan = start(config)
    views = [torch.randn(2, 8, 3, 32, 32), *[torch.randn(2, 8, 3, 16, 16)] * (resolutions - 1)]
    for step in range(3):  # DeepSpeed records the order of modules in the first
        marks: list[int] = []

        @contextmanager
        def phase(name: str, marks: list[int] = marks) -> Iterator[None]:
            yield
            marks.append(len(traffic.calls))

        with CountBytes() as traffic:
            take_step(engine, plan, [views], step, phase=phase)
    forward, backward = marks[:2]
    sizes = [getattr(p, "ds_numel", p.numel()) for p in engine.module.encoder.blocks[0].parameters()]
    calls = traffic.calls
    return calls[:forward], calls[forward:backward], sum(sizes), sum(n for n in sizes if n >= 128 * 128)


def _fsdp_on_rank() -> list[tuple[Calls, Calls, int, int]]:
    kinds = [(kind, resolutions) for kind in ("none", "full") for resolutions in (1, 2)]
    return [_count("fsdp", {"activation_checkpointing": kind}, resolutions) for kind, resolutions in kinds]


def test_fsdp_gathers_a_block_once_a_direction() -> None:
    for forward, backward, block, _ in run_ranks(_fsdp_on_rank, 2)[0]:
        gathers = [
            sum(kind.startswith("allgather_base") and size > block // 10 for kind, size in calls)  # not of embeddings
            for calls in (forward, backward)
        ]
        assert gathers == [DEPTH + 1, DEPTH]  # the root, gathered first and released last
        reduced = [size for kind, size in backward if kind == "reduce_scatter_base"]
        assert len(reduced) == DEPTH + 1
        assert reduced.count(4 * block) == DEPTH  # in fp32, although computed in bf16


def _zero3_on_rank() -> list[tuple[Calls, Calls, int, int]]:
    return [_count("zero3", {"prefetch": prefetch}, 2) for prefetch in (0, 1)]


def test_zero3_gathers_a_block_once_a_direction() -> None:
    for prefetch, (forward, backward, _, matrices) in enumerate(run_ranks(_zero3_on_rank, 2)[0]):
        for calls in (forward, backward):
            sizes = [2 * size for kind, size in calls if kind.startswith("allgather_base")]  # of two halves
            assert 2 * matrices < sum(sizes) < 2 * matrices * (DEPTH + 1)  # bf16: every block once, and the small rest
            if not prefetch:  # which joins parts of neighbouring blocks in one collective
                assert sum(size >= 2 * matrices for size in sizes) == DEPTH


def _replicas_on_rank() -> list[Calls]:
    """Collectives in the backward passes of a step of two micro-batches."""
    tree = small_config("u", "u", engine={"name": "ddp", "precision": "bf16"}, model={"options": {"depth": DEPTH}})
    tree["train"] |= {"global_batch": 16, "micro_batch": 4}
    engine, plan = start(validate(tree))
    found = list[Calls]()

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        before = len(traffic.calls)
        yield
        if name == "backward":
            found.append(traffic.calls[before:])

    with CountBytes() as traffic:
        take_step(engine, plan, [[torch.randn(2, 4, 3, 32, 32)]] * 2, phase=phase)
    parameters = 4 * sum(p.numel() for p in engine.module.parameters())
    return [*found, [("parameters", parameters)]]


def test_replicas_in_bf16_are_summed_once_a_step_in_fp32() -> None:
    """Between hosts nothing moves for the first micro-batch, and for the last what DDP would send."""
    first, last, ((_, parameters),) = run_ranks(_replicas_on_rank, 2)[0]
    assert not [call for call in first if call[0].startswith("allreduce") and call[1] > 10_000]
    summed = sum(size for kind, size in last if kind.startswith("allreduce"))
    assert summed == pytest.approx(parameters, rel=0.01)
