"""Tensors between the CPU ranks of one host, through memory that they share. A layer's statistics are a few hundred numbers,
exchanged dozens of times a step: each takes a socket longer than the layer takes to compute. Refuses to be needed: where it
cannot be had, the ordinary collectives do the same."""

from __future__ import annotations

import mmap
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from lejepa_scale.parallel import living

_FOLDER = Path("/dev/shm")
_SLOT = 1 << 18  # bytes of one rank's part; what is larger goes piece by piece
_LINE = 64  # bytes between counters, lest ranks write to one cache line
_LOOK = 1.0  # seconds between two looks whether the rank that is waited for still lives
_SPIN = 2e-3  # seconds of asking without rest: the ranks of a step arrive within microseconds of each other
_REST = 1e-4, 1e-2  # seconds between two questions afterwards: at first, at last


class RankLost(RuntimeError):
    """Another rank has ended, or takes longer than ranks wait."""


class SharedMemory:
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
        parts = list(self._exchanged(x, torch.Tensor.clone))
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return whole.view(self.world, *x.shape)

    def sum(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Of all ranks' x, added in rank order: the same to the bit on all of them. Raises what `gather` raises."""
        return torch.cat(list(self._exchanged(x, lambda rows: rows.sum(0, dtype=x.dtype)))).view(x.shape)

    def _exchanged(
        self, x: Shaped[Tensor, "..."], take: Callable[[Shaped[Tensor, "ranks n"]], Tensor]
    ) -> Iterator[Tensor]:
        """What `take` makes of all ranks' pieces, one after another, before the next is written over it."""
        for piece in x.detach().flatten().split(_SLOT // x.element_size()):
            self.turn += 1
            size, slots = piece.numel() * piece.element_size(), self.slots[self.turn % 2]
            slots[self.rank, :size].copy_(piece.contiguous().view(torch.uint8))
            self.counters[self.rank * _LINE // 8] = self.turn
            self._wait()
            yield take(slots[:, :size].view(x.dtype))

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
                    time.sleep(min(_REST[1], max(_REST[0], 0.01 * waited)))
                    if began + waited - looked > _LOOK:
                        looked = began + waited
                        if self.peers and self.peers[rank].gone():
                            raise RankLost(f"rank {rank} (process {self.peers[rank].pid} of this host) is gone")


def shared(timeout: float) -> SharedMemory | None:
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
    return SharedMemory(memory, rank, world, timeout, [process for _, process in got])


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
