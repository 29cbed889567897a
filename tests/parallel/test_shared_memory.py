"""Exchange in shared memory against the ordinary collective."""

from __future__ import annotations

import mmap
import random
import subprocess
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from lejepa_scale.parallel import collectives, living, process_group, shared_memory
from lejepa_scale.parallel.shared_memory import RankLost, SharedMemoryGather


def _many() -> list[str]:
    """Hundreds of exchanges of changing size and type, by ranks that arrive at different times; the differences found."""
    rank, wrong = process_group.rank(), []
    shapes, arrivals = random.Random(0), random.Random(rank)
    for turn in range(300):
        shape = [shapes.randint(1, 40), shapes.randint(1, 40)]
        x = torch.randn(shape, dtype=shapes.choice([torch.float32, torch.float64])) + rank
        if arrivals.random() < 0.02:
            time.sleep(0.004)
        found = collectives.gather_statistics(x.T)
        if not torch.equal(found, collectives.all_gather(x.T.contiguous())):
            wrong.append(f"turn {turn}")
    large = torch.full((1 << 15,), float(rank), dtype=torch.float64)  # more than a slot holds
    if not torch.equal(collectives.gather_statistics(large), collectives.all_gather(large)):
        wrong.append("large")
    board = collectives._shared[1]
    return [*wrong, *(["no board"] if board is None else [f"{board.turn} turns"])]


@pytest.mark.skipif(not shared_memory._able(), reason="needs shared memory and x86")
def test_every_exchange_is_that_of_the_collective() -> None:
    before = set(Path("/dev/shm").glob("lejepa_scale-*"))
    assert run_ranks(_many, 3) == [["300 turns"]] * 3
    assert set(Path("/dev/shm").glob("lejepa_scale-*")) <= before


def _elsewhere() -> torch.Tensor:
    if process_group.rank() == 1:
        shared_memory._FOLDER = Path("/nowhere")
    return collectives.gather_statistics(torch.tensor([float(process_group.rank())]))


def test_where_one_rank_cannot_share_all_use_the_collective() -> None:
    for found in run_ranks(_elsewhere, 2):
        assert found.tolist() == [[0.0], [1.0]]


def test_a_lost_rank_is_named() -> None:
    board = SharedMemoryGather(mmap.mmap(-1, 2 * (64 + 2 * (1 << 16))), rank=0, world=2, timeout=0.01)
    with pytest.raises(RuntimeError, match="waited 0 s for rank 1"):
        board.gather(torch.ones(3))


@pytest.mark.parametrize("reaped", [True, False])
def test_a_rank_that_has_ended_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, reaped: bool) -> None:
    """Also where its launcher has not looked yet; one that lives, or cannot be seen from here, is."""
    monkeypatch.setattr(shared_memory, "_LOOK", 0.01)
    process = subprocess.Popen(["sleep", "60"])
    peer = living.Process(process.pid, living.begun(process.pid), living.namespace())
    memory = mmap.mmap(-1, 2 * (64 + 2 * (1 << 16)))
    for alive in (peer, peer._replace(pid=1 << 30, namespace="of another container")):
        board = SharedMemoryGather(memory, rank=0, world=2, timeout=0.2, peers=[living.myself(), alive])
        with pytest.raises(RankLost, match="waited 0 s for rank 1"):
            board.gather(torch.ones(3))
    process.kill()
    if reaped:
        process.wait()
    board = SharedMemoryGather(memory, rank=0, world=2, timeout=60, peers=[living.myself(), peer])
    began = time.monotonic()
    with pytest.raises(RankLost, match=rf"rank 1 \(process {process.pid} of this host\) is gone"):
        board.gather(torch.ones(3))
    assert time.monotonic() - began < 10
    process.wait()
