"""Small tensors between the CPU ranks of one host, through memory that they share. A layer's statistics are a few hundred
numbers, exchanged dozens of times a step: each takes a socket longer than the layer takes to compute. Refuses to be needed:
where it cannot be had, the ordinary collectives do the same."""

from __future__ import annotations

import mmap
import os
import platform
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

_FOLDER = Path("/dev/shm")
_SLOT = 1 << 16  # bytes of one rank's part
_LINE = 64  # bytes between counters, lest ranks write to one cache line
_SPIN = 2e-3  # seconds of asking without rest: the ranks of a step arrive within microseconds of each other


class SharedMemoryGather:
    """Every rank writes its part of the n-th exchange into one of two sets of slots, then n into its counter, and reads
    when all counters have come to n. Who writes exchange n + 2 into the same slots has seen everyone begin n + 1, and
    therefore end n.

    Needs stores to be seen in the order in which they were made: x86.
    """

    def __init__(self, memory: mmap.mmap, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world, self.timeout, self.turn = rank, world, timeout, 0
        view = memoryview(memory)
        self.counters = view[: world * _LINE].cast("Q")
        self.slots = torch.frombuffer(memory, dtype=torch.uint8, offset=world * _LINE).view(2, world, _SLOT)

    def gather(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, " {self.world} *shape"]:
        """[...] on each rank -> [W, ...] on every rank; the same shape everywhere. Raises RuntimeError after
        `timeout` seconds without the others."""
        self.turn += 1
        data = x.detach().contiguous()
        size, slots = data.numel() * data.element_size(), self.slots[self.turn % 2]
        slots[self.rank, :size].copy_(data.view(-1).view(torch.uint8))
        self.counters[self.rank * _LINE // 8] = self.turn
        self._wait()
        return slots[:, :size].clone().view(x.dtype).view(self.world, *x.shape)

    def _wait(self) -> None:
        began = time.monotonic()
        for rank in range(self.world):
            at = rank * _LINE // 8
            while self.counters[at] < self.turn:
                waited = time.monotonic() - began
                if waited > self.timeout:
                    raise RuntimeError(f"rank {self.rank} has waited {waited:.0f} s for rank {rank}.")
                if waited < _SPIN:
                    os.sched_yield()
                else:
                    time.sleep(1e-4)


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
    got: list[bool] = [False] * world
    dist.all_gather_object(got, memory is not None)
    if rank == 0 and path:  # the memory lasts as long as its ranks, and leaves nothing behind
        os.unlink(path)
    return SharedMemoryGather(memory, rank, world, timeout) if memory is not None and all(got) else None


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
