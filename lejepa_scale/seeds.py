"""How random numbers follow from a run's seed and a place in it: every mixing of seeds, in one file. Pure arithmetic."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt64

GAMMA = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: the increment of splitmix64
_MIX_1, _MIX_2, _MASK = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xFFFFFFFFFFFFFFFF


def splitmix64(x: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """splitmix64's finalizer (Steele, Lea and Flood 2014), elementwise on uint64: a bijection that spreads every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
    return x ^ (x >> np.uint64(31))


def of_directions(seed: int, step: int) -> int:
    """For the random directions of a step, the same on every rank: 63 bits in which neighbouring (seed, step) pairs land far
    apart."""
    x = (seed * GAMMA + step * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & _MASK
    return int(splitmix64(np.array([x], np.uint64))[0]) >> 1


def of_micro_batch(seed: int, step: int, micro: int, rank: int) -> int:
    """For what a rank draws in the forward pass of one micro-batch (stochastic depth): nothing to save, nothing to lose."""
    return (((seed * 1_000_003 + step) * 1_009 + micro) * 65_537 + rank) % (1 << 63)
