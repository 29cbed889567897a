"""The order of a simulated billion of samples: what it costs to start, to find a position, to hold; how well it mixes."""

from __future__ import annotations

import pickle
import time
import tracemalloc
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np

from benchmarks.measure import Row
from lejepa_scale.data.order import Order, SourceOrder

BLOCK = 16384


def scale(samples: int, shards: int) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    counts = np.full(shards, samples // shards, np.int64)
    counts[:-1] += rng.integers(-(samples // shards // 2), samples // shards // 2, shards - 1)
    counts[-1] += samples - counts.sum()
    case = f"{samples:,} samples in {shards:,} shards"

    def start() -> Order:
        return Order([counts], [1.0], seed=0, block=BLOCK)

    yield {"case": f"start: {case}", "ms": 1e3 * _seconds(start), "promised ms": 5000}
    order = start()
    for epoch in (0, 1):
        yield {
            "case": f"first position of epoch {epoch}",
            "ms": 1e3 * _seconds(order.locate, [epoch * samples]),
        }
    times = [_seconds(order.locate, [where]) for where in rng.integers(0, 2 * samples, 2000).tolist()]
    yield {
        "case": "any position, one by one",
        "ms": 1e3 * median(times),
        "worst ms": 1e3 * max(times),
        "promised ms": 1,
        "ok": median(times) < 1e-3,
    }
    for batch in (64, 4096):
        start_at = int(rng.integers(0, samples - batch))
        spent = median(_seconds(order.locate, range(start_at, start_at + batch)) for _ in range(20))
        yield {"case": f"a batch of {batch}", "ms": 1e3 * spent, "us per sample": 1e6 * spent / batch}
    tracemalloc.start()
    held = Order([counts.copy()], [1.0], seed=0, block=BLOCK)
    for epoch in range(6):
        held.locate(range(epoch * samples, epoch * samples + 4096))
    now, peak = (x / 2**20 for x in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    yield {"case": "memory over 6 epochs", "MiB": now, "peak MiB": peak, "ok": peak < 200}
    yield {"case": "state: the number of the step", "bytes": len(pickle.dumps(10**12)), "promised": 1024}


def mixing(shards: int) -> Iterator[Row]:
    """Mean displacement over the samples, in three epochs; a true permutation gives 1/3."""
    counts = np.random.default_rng(0).integers(500, 1500, shards)
    total = int(counts.sum())
    for name, block in {"": BLOCK, ", one block": total}.items():
        order = SourceOrder(counts, seed=0, block=block)
        for epoch in range(3):
            _, shard, member = order.locate(np.arange(epoch * total, (epoch + 1) * total))
            stored = (np.cumsum(counts) - counts)[shard] + member
            moved = np.abs(stored - np.arange(total)).mean() / total
            yield {"case": f"{shards} shards{name}, epoch {epoch}", "displacement / n": float(moved)}


def _seconds(work: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started
