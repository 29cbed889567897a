"""Exchange in shared memory against the ordinary collective."""

from __future__ import annotations

import mmap
import random
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from lejepa_scale.parallel import collectives, living, process_group, shared_memory
from lejepa_scale.parallel.shared_memory import RankLost, SharedMemory


def _many() -> list[str]:
    """Hundreds of exchanges and sums of changing size and type, by ranks that arrive at different times; the differences
    found."""
    rank, wrong = process_group.rank(), []
    shapes, arrivals = random.Random(0), random.Random(rank)
    for turn in range(300):
        shape = [shapes.randint(1, 40), shapes.randint(1, 40)]
        x = torch.randn(shape, dtype=shapes.choice([torch.float32, torch.float64])) + rank
        if arrivals.random() < 0.02:
            time.sleep(0.004)
        wrong += [f"{what} of turn {turn}" for what in _different(x.T)]
    for numbers in (1, shared_memory._SLOT // 8, shared_memory._SLOT // 8 + 1, 3 * shared_memory._SLOT // 8 - 1):
        x = torch.arange(numbers, dtype=torch.float64) * 2**-10 + rank  # up to more than one slot holds, summed exactly
        wrong += [f"{what} of {numbers}" for what in _different(x)]
    for dtype in (torch.int64, torch.int32, torch.bfloat16):  # keep their type
        wrong += [f"{what} of {dtype}" for what in _different(torch.tensor(rank + 1, dtype=dtype))]
    board = collectives._shared[1]
    return [*wrong, *(["no board"] if board is None else [f"{board.turn} turns"])]


def _different(x: torch.Tensor) -> list[str]:
    """What is not that of the group's own collectives: gathered to the bit, a sum to rounding and of one value on all."""
    gathered, total = collectives.all_gather(x), collectives.all_reduce_sum(x)
    with collectives.without_shared_memory():
        expected, of_gloo, totals = (
            collectives.all_gather(x),
            collectives.all_reduce_sum(x),
            collectives.all_gather(total),
        )
    same = (
        total.dtype == of_gloo.dtype and total.shape == of_gloo.shape and all(torch.equal(one, total) for one in totals)
    )
    sums = same and torch.allclose(total.double(), of_gloo.double(), rtol=1e-6, atol=1e-6)
    return [what for what, right in (("gather", torch.equal(gathered, expected)), ("sum", sums)) if not right]


@pytest.mark.skipif(not shared_memory._able(), reason="needs shared memory and x86")
def test_every_exchange_is_that_of_the_collective() -> None:
    before = set(Path("/dev/shm").glob("lejepa_scale-*"))
    pieces = 300 + (1 + 1 + 2 + 3) + 3
    assert run_ranks(_many, 3) == [[f"{2 * pieces} turns"]] * 3
    assert set(Path("/dev/shm").glob("lejepa_scale-*")) <= before


def _of_two() -> tuple[int, float] | None:
    """Of a group of the last two of three ranks, while the first is elsewhere."""
    group, me = dist.new_group([1, 2]), process_group.rank()
    if me == 0:
        return None
    x = torch.tensor([float(me)])
    return len(collectives.all_gather(x, group)), float(collectives.all_reduce_sum(x, group))


def test_a_group_of_some_ranks_is_not_all() -> None:
    assert run_ranks(_of_two, 3) == [None, (2, 3.0), (2, 3.0)]


def _elsewhere() -> torch.Tensor:
    if process_group.rank() == 1:
        shared_memory._FOLDER = Path("/nowhere")
    return collectives.all_gather(torch.tensor([float(process_group.rank())]))


def test_where_one_rank_cannot_share_all_use_the_collective() -> None:
    for found in run_ranks(_elsewhere, 2):
        assert found.tolist() == [[0.0], [1.0]]


def test_a_lost_rank_is_named() -> None:
    board = SharedMemory(mmap.mmap(-1, 2 * (64 + 2 * shared_memory._SLOT)), rank=0, world=2, timeout=0.01)
    with pytest.raises(RuntimeError, match="waited 0 s for rank 1"):
        board.gather(torch.ones(3))


@pytest.mark.parametrize("reaped", [True, False])
def test_a_rank_that_has_ended_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, reaped: bool) -> None:
    """Also where its launcher has not looked yet; one that lives, or cannot be seen from here, is."""
    monkeypatch.setattr(shared_memory, "_LOOK", 0.01)
    process = subprocess.Popen(["sleep", "60"])
    peer = living.Process(process.pid, living.begun(process.pid), living.namespace())
    memory = mmap.mmap(-1, 2 * (64 + 2 * shared_memory._SLOT))
    for alive in (peer, peer._replace(pid=1 << 30, namespace="of another container")):
        board = SharedMemory(memory, rank=0, world=2, timeout=0.2, peers=[living.myself(), alive])
        with pytest.raises(RankLost, match="waited 0 s for rank 1"):
            board.gather(torch.ones(3))
    process.kill()
    if reaped:
        process.wait()
    board = SharedMemory(memory, rank=0, world=2, timeout=60, peers=[living.myself(), peer])
    began = time.monotonic()
    with pytest.raises(RankLost, match=rf"rank 1 \(process {process.pid} of this host\) is gone"):
        board.gather(torch.ones(3))
    assert time.monotonic() - began < 10
    process.wait()
