"""How the samples of all ranks meet in one statistic, what each way costs, and which is cheapest. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Mode = Literal["sums", "embeddings", "distinct"]
MODES: tuple[Mode, ...] = get_args(Mode)

# What one more projection on every rank is worth, in bytes sent: about 3 on an H100 with NVLink, 45 on two CPU cores with
# gigabit gloo (both from operation counts at D = 256 and 17 knots, forward and backward).
_BYTES_PER_PROJECTION = 8


@dataclass(frozen=True)
class Traffic:
    """Bytes that one of W ranks sends in a step, forward and backward, with ring collectives: an all-reduce of B bytes
    sends 2 (W-1)/W B, an all-gather or reduce-scatter of B bytes in all (W-1)/W B.

    - sums: one all-reduce of 2 V M (knots-1) sums. Independent of N and D.
    - embeddings: an all-gather of [V, N, D]; every rank evaluates every direction on all samples (W times the arithmetic).
    - distinct: the same all-gather; rank r evaluates its share of the directions, and the gradients are reduce-scattered in
      fp32. The arithmetic of `sums`; at W times `num_slices`, W times the coverage for what `embeddings` computes.
    """

    sums: int
    embeddings: int
    distinct: int
    cheapest: Mode

    def __str__(self) -> str:
        return ", ".join(f"{mode} {getattr(self, mode) / 1e6:.2f} MB" for mode in MODES)


def traffic(views: int, counts: Sequence[int], width: int, *, slices: int, knots: int, itemsize: int = 4) -> Traffic:
    """What each way sends for embeddings [views, counts[r], width] on rank r. itemsize: bytes of one embedding value
    as it is sent (fp64 statistics cost double)."""
    world, longest = len(counts), max(counts)
    statistics = max(4, itemsize)
    sums = 2 * (world - 1) * statistics * (2 * views * slices * (knots - 1)) // world
    block = (world - 1) * views * longest * width  # values, padded to the longest rank
    costs: dict[Mode, float] = {
        "sums": sums,
        "embeddings": block * itemsize + _BYTES_PER_PROJECTION * (world - 1) * views * longest * slices,
        "distinct": block * (itemsize + statistics) if slices >= world else float("inf"),
    }
    return Traffic(sums, block * itemsize, block * (itemsize + statistics), min(costs, key=lambda mode: costs[mode]))
