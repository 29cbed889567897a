"""Which sample when: a pure function of (seed, position), without state. Positions count samples of the global
stream, so neither ranks nor workers enter the order. Permutations are computed, never stored: a billion samples cost what
their list of shards costs. Refuses to touch files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from lejepa_scale.config import BatchPlan
from lejepa_scale.seeds import GAMMA, splitmix64

_ROUNDS = 10  # of the Feistel network; few leave a bias that shows where there are only a handful of shards
_EPOCHS_HELD = 4
_SHARES = 1 << 30  # weights of a mixture are rounded to parts of this
_GAMMA = np.uint64(GAMMA)


class Location(NamedTuple):
    """A sample by numbers: the source, the epoch of that source, the shard in it and the sample in that."""

    source: int
    epoch: int  # of this source
    shard: int  # in the order of the configuration
    member: int  # in the order of the shard


class SourceOrder:
    """Endless epochs over one source: shards permuted per epoch, samples permuted within blocks of that sequence.

    Every epoch visits each sample exactly once. Reading stays local, since a block spans few shards; a block of at least
    the source's size makes the order one permutation of everything. Memory is 16 bytes a shard for each of the last four
    epochs asked for; the first question about an epoch permutes its shards.
    """

    def __init__(
        self, counts: Sequence[int] | Int64[np.ndarray, " shards"], seed: int, block: int, source: int = 0
    ) -> None:
        self.counts = np.asarray(counts, np.int64)  # samples of each shard
        self.total = int(self.counts.sum())
        self.block = min(block, self.total)
        self._seed = np.random.SeedSequence((seed, source)).generate_state(1, np.uint64)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def locate(
        self, indices: Int64[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """(epoch, shard, member) of each index, which counts the samples ever drawn from this source."""
        epoch, place = np.divmod(indices, self.total)
        block, offset = np.divmod(place, self.block)
        start = block * self.block
        place = start + permute(offset, np.minimum(self.block, self.total - start), self._keys(epoch, 1 + block))
        shard, member = np.empty_like(place), np.empty_like(place)
        for number in set(epoch.tolist()):
            here = epoch == number
            shards, starts = self._permuted_shards(number)
            slot = np.searchsorted(starts, place[here], side="right") - 1
            shard[here] = shards[slot]
            member[here] = place[here] - starts[slot]
        return epoch, shard, member

    def _permuted_shards(self, epoch: int) -> tuple[Int64[np.ndarray, " shards"], Int64[np.ndarray, " shards"]]:
        """The shards in this epoch's order, and at which place of the epoch each begins."""
        if epoch not in self._epochs:
            if len(self._epochs) == _EPOCHS_HELD:
                del self._epochs[next(iter(self._epochs))]
            number = np.arange(len(self.counts))
            shards = permute(number, np.full_like(number, len(number)), self._keys(np.full_like(number, epoch), 0))
            self._epochs[epoch] = shards, np.cumsum(self.counts[shards]) - self.counts[shards]
        return self._epochs[epoch]

    def _keys(self, epoch: Int64[np.ndarray, " n"], part: Int64[np.ndarray, " n"] | int) -> UInt64[np.ndarray, " n"]:
        """What chooses the permutation of an epoch's shards (part 0) or of one of its blocks (1 + block)."""
        return splitmix64(
            splitmix64(self._seed + epoch.astype(np.uint64) * _GAMMA) + np.asarray(part).astype(np.uint64) * _GAMMA
        )


class Order:
    """A weighted mixture of sources, each with its own epochs, interleaved evenly."""

    def __init__(
        self,
        counts: Sequence[Sequence[int] | Int64[np.ndarray, " _shards"]],
        weights: list[float],
        seed: int,
        block: int,
    ) -> None:
        self.sources = [SourceOrder(shards, seed, block, source) for source, shards in enumerate(counts)]
        self._shares = [max(1, round(weight / sum(weights) * _SHARES)) for weight in weights]

    def locate(self, positions: Sequence[int] | Int64[np.ndarray, " n"]) -> list[Location]:
        """Where the samples at these positions of the global stream lie."""
        source, index = interleave(np.asarray(positions, np.int64), self._shares)
        found = np.empty((len(source), 4), np.int64)
        for number in set(source.tolist()):
            here = source == number
            found[here] = np.stack([source[here], *self.sources[number].locate(index[here])], 1)
        return [Location(*row) for row in found.tolist()]


def interleave(
    positions: Int64[np.ndarray, " n"], shares: list[int]
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """(source, how many samples of that source came before) at each position.

    The first source takes its share of all positions at even distances, the second its share of those that are left, and so
    on: at every position each source has had what its weight promises to within 1 + ln(sources) samples.
    """
    source, index = np.full_like(positions, len(shares) - 1), positions.copy()
    left, rest = np.arange(len(positions)), sum(shares)
    for number, share in enumerate(shares[:-1]):
        before, after = _taken(index[left], share, rest), _taken(index[left] + 1, share, rest)
        index[left] -= before
        mine = left[after > before]
        source[mine], index[mine] = number, before[after > before]
        left, rest = left[after == before], rest - share
    return source, index


def _taken(n: Int64[np.ndarray, " n"], share: int, rest: int) -> Int64[np.ndarray, " n"]:
    """ceil(n share / rest), without overflow."""
    periods, n = np.divmod(n, rest)
    return periods * share - (-n * share) // rest


def permute(
    x: Int64[np.ndarray, " m"], n: Int64[np.ndarray, " m"], key: UInt64[np.ndarray, " m"]
) -> Int64[np.ndarray, " m"]:
    """Element x of the permutation of range(n) that `key` chooses, elementwise.

    A Feistel network over pairs in range(a) x range(b), a b just above n, walked on until it falls into range(n).
    """
    x, n = x.astype(np.uint64), n.astype(np.uint64)
    out = _feistel(x, n, key)
    while (outside := np.flatnonzero(out >= n)).size:
        out[outside] = _feistel(out[outside], n[outside], key[outside])
    return out.astype(np.int64)


def _feistel(
    x: UInt64[np.ndarray, " m"], n: UInt64[np.ndarray, " m"], key: UInt64[np.ndarray, " m"]
) -> UInt64[np.ndarray, " m"]:
    a = np.ceil(np.sqrt(n)).astype(np.uint64)
    b = (n + a - np.uint64(1)) // a
    left, right = np.divmod(x, b)
    for _ in range(_ROUNDS):
        key = key + _GAMMA
        left, right = right, (left + splitmix64(key + right) % a) % a
        a, b = b, a
    return left * b + right


def positions(step: int, micro: int, rank: int, plan: BatchPlan) -> range:
    """Positions of one rank's micro-batch. Micro-batch `micro` of all ranks together is one contiguous run, so that a
    step sees the same micro-batches at any number of ranks as long as micro_batch x ranks is the same."""
    per_round = plan.micro_batch * plan.ranks
    start = (step * plan.accumulation + micro) * per_round + rank * plan.micro_batch
    return range(start, start + plan.micro_batch)
