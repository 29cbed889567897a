"""What looking after a run costs: the names of a step's parts, a record of many ranks, the watchdog's threads; beside the
seconds of a recipe's step on this machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import Row
from benchmarks.trial import Recipe, Trial
from lejepa_scale.parallel import process_group
from lejepa_scale.training import monitor
from lejepa_scale.training.monitor import PARTS, Monitor, Phases
from lejepa_scale.training.watchdog import Watchdog

_TIMES, _ROUNDS = 2000, 5
_IDLE_SECONDS = 5.0
_RANKS = (1, 64, 512, 4096)


def costs(path: Path) -> Iterator[Row]:
    """Each part, and all of it as a share of a step of the recipe at `path`, at its own log.every."""
    recipe = Recipe(path, ("engine.name=single",))
    device = process_group.join(timedelta(minutes=5))
    trial = Trial(recipe.config(), device)
    step = median(_seconds(lambda: trial.step(trial.synthetic()), 1) for _ in range(2 * _ROUNDS))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        with Watchdog(run, timedelta(minutes=10)) as watchdog:
            phases = Phases(watchdog.doing)
            parts = median(_seconds(lambda: _parts(watchdog, phases), _TIMES) for _ in range(_ROUNDS))
            began = time.process_time()
            time.sleep(_IDLE_SECONDS)
            threads = (time.process_time() - began) / _IDLE_SECONDS
        every = trial.config.log.every
        assert isinstance(every, int)
        yield {"case": "parts of a step", "us a step": 1e6 * parts, "share of a step": parts / step}
        yield {"case": "the watchdog's threads", "share of a core": threads}
        watch = Monitor(run, phases, device)
        for ranks in _RANKS:
            record = median(_seconds(lambda ranks=ranks: _record(watch, ranks), 3) for _ in range(_ROUNDS))  # type: ignore[misc]
            yield {
                "case": f"a record of {ranks:,} ranks, on rank 0", "ms": 1e3 * record,
                "share of a step": record / every / step,
            }  # fmt: skip
        alone = median(_seconds(lambda: _record(watch, 1), 3) for _ in range(_ROUNDS))
        yield {
            "case": f"all of it, {path.stem}, a step of {1e3 * step:.1f} ms, log.every={every}",
            "share of a step": (parts + alone / every) / step + threads,
        }
    process_group.leave()


def _seconds(work: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


def _parts(watchdog: Watchdog, phases: Phases) -> None:
    watchdog.step(0)
    for name in PARTS:
        with phases(name):
            pass


def _record(watch: Monitor, ranks: int) -> None:
    """As of so many ranks, eight to a host, the file written each time."""
    watch.begin(1, 1, 1.0)
    assert watch._under_way is not None
    rows = watch._under_way().repeat(ranks, 1) + 1e-3 * torch.rand(ranks, len(monitor._MEASURED), dtype=torch.float64)
    watch._under_way, watch._written = (lambda: rows), 0.0
    watch._hosts = [f"host{rank // 8}" for rank in range(ranks)]
    watch.read()
