"""Small tensors between the CPU ranks of one host, through memory that they share. A layer's statistics are a few hundred
numbers, exchanged dozens of times a step: each takes a socket longer than the layer takes to compute. Refuses to be needed:
where it cannot be had, the ordinary collectives do the same."""

from __future__ import annotations

import mmap
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from lejepa_scale.parallel import living

_FOLDER = Path("/dev/shm")
_SLOT = 1 << 16  # bytes of one rank's part
_LINE = 64  # bytes between counters, lest ranks write to one cache line
_LOOK = 1.0  # seconds between two looks whether the rank that is waited for still lives
_SPIN = 2e-3  # seconds of asking without rest: the ranks of a step arrive within microseconds of each other


class RankLost(RuntimeError):
    """Another rank has ended, or takes longer than ranks wait."""


class SharedMemoryGather:
    """Every rank writes its part of the n-th exchange into one of two sets of slots, then n into its counter, and reads
    when all counters have come to n. Who writes exchange n + 2 into the same slots has seen everyone begin n + 1, and
    therefore end n.

    Needs stores to be seen in the order in which they were made: x86. peers: the ranks' processes, one of which may end.
    """

    def __init__(
        self, memory: mmap.mmap, rank: int, world: int, timeout: float, peers: Sequence[living.Process] = ()
    ) -> None:
        self.rank, self.world, self.timeout, self.turn, self.peers = rank, world, timeout, 0, peers
        view = memoryview(memory)
        self.counters = view[: world * _LINE].cast("Q")
        self.slots = torch.frombuffer(memory, dtype=torch.uint8, offset=world * _LINE).view(2, world, _SLOT)

    def gather(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, " {self.world} *shape"]:
        """[...] on each rank -> [W, ...] on every rank; the same shape everywhere. Raises RankLost where
        another rank has ended, and after `timeout` seconds without the others."""
        self.turn += 1
        data = x.detach().contiguous()
        size, slots = data.numel() * data.element_size(), self.slots[self.turn % 2]
        slots[self.rank, :size].copy_(data.view(-1).view(torch.uint8))
        self.counters[self.rank * _LINE // 8] = self.turn
        self._wait()
        return slots[:, :size].clone().view(x.dtype).view(self.world, *x.shape)

    def _wait(self) -> None:
        began = looked = time.monotonic()
        for rank in range(self.world):
            at = rank * _LINE // 8
            while self.counters[at] < self.turn:
                waited = time.monotonic() - began
                if waited > self.timeout:
                    raise RankLost(f"rank {self.rank} has waited {waited:.0f} s for rank {rank}")
                if waited < _SPIN:
                    os.sched_yield()
                else:
                    time.sleep(1e-4)
                    if began + waited - looked > _LOOK:
                        looked = began + waited
                        if self.peers and self.peers[rank].gone():
                            raise RankLost(f"rank {rank} (process {self.peers[rank].pid} of this host) is gone")


def fits(x: Shaped[Tensor, "..."]) -> bool:
    """Whether a tensor is on the CPU and small enough for a slot."""
    return x.device.type == "cpu" and 0 < x.numel() * x.element_size() <= _SLOT


def shared(timeout: float) -> SharedMemoryGather | None:
    """One for all ranks of the default group, where they are processes of one x86 host with shared memory; every rank
    calls, and all get one or none. timeout: seconds that a rank waits for another."""
    rank, world = dist.get_rank(), dist.get_world_size()
    memory, path = _memory(world * (_LINE + 2 * _SLOT), None) if rank == 0 and _able() else (None, "")
    offered = [path]
    dist.broadcast_object_list(offered, src=0)
    if rank != 0 and offered[0] and _able():
        memory, _ = _memory(0, offered[0])
    got: list[tuple[bool, living.Process]] = [(False, living.myself())] * world
    dist.all_gather_object(got, (memory is not None, living.myself()))
    if rank == 0 and path:  # the memory lasts as long as its ranks, and leaves nothing behind
        os.unlink(path)
    if memory is None or not all(has for has, _ in got):
        return None
    return SharedMemoryGather(memory, rank, world, timeout, [process for _, process in got])


def _able() -> bool:
    return _FOLDER.is_dir() and platform.machine().lower() in ("x86_64", "amd64")


def _memory(size: int, path: str | None) -> tuple[mmap.mmap | None, str]:
    """New memory of `size` bytes, or that of another rank; and its path. None where it cannot be had."""
    try:
        if path is not None:
            handle = os.open(path, os.O_RDWR)  # on another host there is no such file
        else:
            handle, path = tempfile.mkstemp(prefix="lejepa_scale-", dir=_FOLDER)
    except OSError:
        return None, ""
    try:
        if size:
            os.posix_fallocate(handle, 0, size)  # too little room shows here, not as a signal later
        return mmap.mmap(handle, size), path
    except OSError:
        return None, path
    finally:
        os.close(handle)
