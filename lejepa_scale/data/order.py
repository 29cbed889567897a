"""Which sample when: a pure function of (seed, position), without state. Positions count samples of the global
stream, so neither ranks nor workers enter the order. Refuses to touch files."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lejepa_scale.config import BatchPlan

_PERIOD = 4096  # slots of the mixture schedule: weights are honoured to 1 / 4096


class Location(NamedTuple):
    source: int
    epoch: int
    shard: int
    member: int


class SourceOrder:
    """Endless epochs over one source: shards permuted per epoch, samples permuted within blocks of that sequence.

    Every epoch visits each sample exactly once. Reading stays local: a block spans few shards.
    """

    def __init__(self, counts: list[int], seed: int, block: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.total = int(self.counts.sum())
        self.seed, self.block = seed, block
        self._shards = lru_cache(maxsize=4)(self._permuted_shards)
        self._within = lru_cache(maxsize=8)(self._permuted_block)

    def locate(self, index: int) -> tuple[int, int, int]:
        """index-th sample ever drawn from this source -> (epoch, shard, member)."""
        epoch, position = divmod(index, self.total)
        block, offset = divmod(position, self.block)
        position = block * self.block + int(self._within(epoch, block)[offset])
        shards, ends = self._shards(epoch)
        slot = int(np.searchsorted(ends, position, side="right"))
        shard = int(shards[slot])
        return epoch, shard, position - int(ends[slot] - self.counts[shard])

    def _permuted_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = _rng(self.seed, epoch, 0).permutation(len(self.counts))
        return shards, np.cumsum(self.counts[shards])

    def _permuted_block(self, epoch: int, block: int) -> np.ndarray:
        size = min(self.block, self.total - block * self.block)
        return _rng(self.seed, epoch, 1, block).permutation(size)


class Order:
    """A weighted mixture of sources, interleaved by a fixed low-discrepancy schedule."""

    def __init__(self, sources: list[list[int]], weights: list[float], seed: int, block: int) -> None:
        self.sources = [SourceOrder(counts, seed + 1_000_003 * i, block) for i, counts in enumerate(sources)]
        self._slots = _schedule(weights)
        # _before[s][slot]: how many of the slots before `slot` belong to source s
        one_hot = self._slots[:, None] == np.arange(len(sources))
        self._before = np.concatenate([np.zeros((1, len(sources)), np.int64), one_hot.cumsum(0)])

    def locate(self, position: int) -> Location:
        period, slot = divmod(position, len(self._slots))
        source = int(self._slots[slot])
        index = period * int(self._before[-1, source]) + int(self._before[slot, source])
        return Location(source, *self.sources[source].locate(index))


def _schedule(weights: list[float]) -> np.ndarray:
    """Slot -> source for one period: always the source that is furthest behind its share."""
    if len(weights) == 1:
        return np.zeros(1, np.int64)
    share = np.asarray(weights) / sum(weights)
    given = np.zeros(len(weights))
    slots = np.empty(_PERIOD, np.int64)
    for i in range(_PERIOD):
        slots[i] = source = int(np.argmax(share * (i + 1) - given))
        given[source] += 1
    return slots


def _rng(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def positions(step: int, micro: int, rank: int, plan: BatchPlan) -> range:
    """Positions of one rank's micro-batch. Micro-batch `micro` of all ranks together is one contiguous run, so that a
    step sees the same micro-batches at any number of ranks as long as micro_batch x ranks is the same."""
    per_round = plan.micro_batch * plan.ranks
    start = (step * plan.accumulation + micro) * per_round + rank * plan.micro_batch
    return range(start, start + plan.micro_batch)
