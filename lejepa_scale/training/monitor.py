"""What a step's time goes to and what memory it takes, on every rank: measured on the host, told to all ranks while the
next step runs, and left in a file for whoever looks. A slow GPU is seen by no host's clock: ranks wait for one another on
the device."""

from __future__ import annotations

import json
import logging
import mmap
import socket
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lejepa_scale.parallel import collectives, process_group

logger = logging.getLogger(__name__)

FILE = "ranks.json"  # in run.dir
PARTS = ("data wait", "other ranks", "colours", "forward", "backward", "optimizer")
_WAIT, _OTHERS = PARTS[0], PARTS[1]
_MEASURED = (*(f"seconds_{part.replace(' ', '_')}" for part in PARTS), "step_seconds", "memory_gib", "host_memory_gib")
_WRITE_SECONDS = 5.0  # between two writings of the file
_TOLD_AT_ONCE = 3  # hosts, the worst
_SLOW = 0.1  # share of a step that others wait for a host
_IN_A_ROW, _AGAIN_SECONDS = 3, 1800.0  # records before a word; between two words


class Phases:
    """Names the parts of a step for the watchdog, `inner`, and adds up the host's seconds of each."""

    def __init__(self, inner: Callable[..., AbstractContextManager[None]]) -> None:
        self._inner, self._seconds = inner, defaultdict[str, float](float)

    @contextmanager
    def __call__(self, name: str, *, unlimited: bool = False) -> Iterator[None]:
        began = time.perf_counter()
        with self._inner(name, unlimited=unlimited):
            yield
        self._seconds[name] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """Since they were last taken."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken


@dataclass(frozen=True)
class RankTimes:
    """Of one rank: seconds of a step, by part and in all, and GiB of memory, of the device at most, of this process."""

    rank: int
    host: str
    parts: dict[str, float]
    step: float
    memory: float
    host_memory: float


@dataclass(frozen=True)
class Straggler:
    """A host for which the others wait. seconds: in a step, beyond what is usual. data: of them, waiting for its images."""

    host: str
    ranks: list[int]
    seconds: float
    data: float
    step: float

    def __str__(self) -> str:
        return (
            f"the other ranks wait {self.seconds:.3g} s of a step of {self.step:.3g} s for {self.host} (rank"
            f"{'s' * (len(self.ranks) > 1)} {', '.join(map(str, self.ranks[:8]))}{', ...' * (len(self.ranks) > 8)})"
            + (f", which waits {self.data:.3g} s for images" if self.data > self.seconds / 2 else "")
        )


class Monitor:
    """`begin` at a record, on every rank; `read` gives its numbers a step later: the median over ranks under each name and,
    where there are several, the largest under `name_max`."""

    def __init__(self, run_dir: Path, phases: Phases, device: torch.device) -> None:
        self.phases, self._device, self._file = phases, device, run_dir / FILE
        self._hosts = collectives.gather_objects(socket.gethostname())
        self._under_way: Callable[[], Tensor] | None = None
        self._step, self._written, self._slow, self._told = 0, 0.0, Counter[str](), dict[str, float]()

    def begin(self, step: int, steps: int, seconds: float) -> None:
        """seconds: that the last `steps` steps took on this rank, without saving and evaluating."""
        taken = self.phases.take()
        own = [*(taken.get(part, 0.0) / steps for part in PARTS), seconds / steps, self._memory(), _host_memory()]
        self._under_way, self._step = collectives.begin_gather(torch.tensor(own, dtype=torch.float64)), step

    def read(self) -> dict[str, float]:
        assert self._under_way is not None
        of_ranks, self._under_way = self._under_way(), None
        if process_group.rank() == 0:
            self._tell(of_ranks)
        return summarized(of_ranks, self._device.type == "cuda")

    def _tell(self, of_ranks: Tensor) -> None:
        """Some 60 ms for 4,096 ranks, where nobody is slow (docs/benchmarks.md)."""
        now = time.perf_counter()
        if now - self._written >= _WRITE_SECONDS:
            self._written = now
            told = {"step": self._step, "time": time.time(), "hosts": self._hosts, "of_ranks": of_ranks.tolist()}
            with suppress(OSError):  # a full disk ends a save, not a look
                unfinished = self._file.with_suffix(".partial")
                unfinished.write_text(json.dumps(told) + "\n")
                unfinished.replace(self._file)
        slow = stragglers(_as_times(of_ranks, self._hosts)) if bool(_late(of_ranks).any()) else []
        self._slow = Counter({one.host: self._slow[one.host] + 1 for one in slow})
        for one in slow[:_TOLD_AT_ONCE]:
            told_at = self._told.get(one.host, -_AGAIN_SECONDS)
            if self._slow[one.host] >= _IN_A_ROW and now - told_at >= _AGAIN_SECONDS:
                self._told[one.host] = now
                logger.warning("step %d: %s.", self._step, one)

    def _memory(self) -> float:
        if self._device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_allocated(self._device) / 2**30
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


def summarized(of_ranks: Tensor, cuda: bool) -> dict[str, float]:
    """Numbers of a record from a row per rank."""
    names = [name for name in _MEASURED if cuda or name != "memory_gib"]
    columns = {name: of_ranks[:, _MEASURED.index(name)].tolist() for name in names}
    found = {name: statistics.median(column) for name, column in columns.items()}
    if len(of_ranks) > 1:
        found |= {f"{name}_max": max(column) for name, column in columns.items()}
    waits = [wait / max(step, 1e-9) for wait, step in zip(columns[_MEASURED[0]], columns["step_seconds"], strict=True)]
    found["data_wait_fraction"] = statistics.median(waits)
    if len(of_ranks) > 1:
        found["data_wait_fraction_max"] = max(waits)
    return found


def stragglers(times: Sequence[RankTimes]) -> list[Straggler]:
    """Hosts whose ranks wait for the others far less than is usual, since the others wait for them; the worst first."""
    if len(times) < 2:
        return []
    waits = [one.parts[_OTHERS] for one in times]
    usual, of_host = max(statistics.median(waits), sum(waits) / len(waits)), defaultdict(list)
    for one in times:
        of_host[one.host].append(one)
    found = []
    for host, here in of_host.items():
        late = [one for one in here if usual - one.parts[_OTHERS] > _SLOW * one.step]
        if late:
            worst = max(late, key=lambda one: usual - one.parts[_OTHERS])
            seconds = usual - worst.parts[_OTHERS]
            found.append(Straggler(host, [one.rank for one in late], seconds, worst.parts[_WAIT], worst.step))
    return sorted(found, key=lambda one: -one.seconds)


def read_ranks(run_dir: Path) -> tuple[int, float, list[RankTimes]] | None:
    """The step, the time of writing (seconds since 1970), and what each rank told last; None where there is nothing."""
    try:
        told = json.loads((run_dir / FILE).read_text())
        return int(told["step"]), float(told["time"]), _as_times(torch.tensor(told["of_ranks"]), told["hosts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _late(of_ranks: Tensor) -> Tensor:
    """Whose others wait for them: as `stragglers`, for all ranks at once."""
    waits, steps = of_ranks[:, PARTS.index(_OTHERS)], of_ranks[:, len(PARTS)]
    return torch.maximum(waits.quantile(0.5), waits.mean()) - waits > _SLOW * steps


def _as_times(of_ranks: Tensor, hosts: Sequence[str]) -> list[RankTimes]:
    return [
        RankTimes(rank, host, dict(zip(PARTS, row, strict=False)), *row[len(PARTS) :])
        for rank, (host, row) in enumerate(zip(hosts, of_ranks.tolist(), strict=True))
    ]


def _host_memory() -> float:
    """GiB of this process; at its largest where no more is known, and 0 where nothing is."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 2**30
    with suppress(ImportError):  # Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return 0.0
