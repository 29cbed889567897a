"""Looks after a run from a thread of each rank: what the rank does, and since when, is told to the others through the
group's store. A step that takes far longer than usual leaves every rank's stacks on disk and says who is behind; one that
takes longer than ranks wait for one another ends the process, whatever its main thread waits in."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from lejepa_scale.errors import Exit, UserError
from lejepa_scale.parallel import living, process_group, waiting
from lejepa_scale.parallel.shared_memory import RankLost

logger = logging.getLogger(__name__)

FOLDER = "hang"  # in run.dir: stacks of each rank
USUAL = 10.0  # times the median of the last steps: what is longer is no chance
AT_LEAST_SECONDS = 60.0
_BEAT_SECONDS = 10.0  # between two signs of life, or a tenth of the timeout where that is less
_STEPS, _FEW_STEPS = 50, 3  # whose median is usual; fewer are none
_BETWEEN, _WAITS = "between steps", "other ranks"  # the latter is what the feed calls waiting for them


@dataclass(frozen=True)
class Sign:
    """What a rank told last. number: of the sign, which goes on for as long as the rank lives."""

    number: int
    step: int
    doing: str
    seconds: float  # that it had done so by then
    process: living.Process


class Watchdog:
    """Inside, the thread looks and tells. `step(n)` begins a step, `doing(name)` wraps a part of one, or of what comes
    before the first; with `unlimited`, one that may take as long as it likes: a save, an evaluation, in which ranks look
    after one another themselves. end: called with the paragraph in place of leaving the process, once the timeout is over.
    step: that was taken last. Every rank makes one, inside a group."""

    def __init__(
        self, run_dir: Path, timeout: timedelta, end: Callable[[str], None] | None = None, *, step: int = 0
    ) -> None:
        self._folder, self._timeout, self._end = run_dir / FOLDER, timeout.total_seconds(), end or _leave
        self._rank, self._ranks = process_group.rank(), process_group.world_size()
        self._number, self._doing, self._unlimited, self._signed = step, _BETWEEN, False, 0
        self._since = self._stepped = time.monotonic()
        self._durations: deque[float] = deque(maxlen=_STEPS)
        self._told_of, self._over = -1, threading.Event()
        # one to tell by and one to ask by: who waits for an answer keeps others waiting on the same connection
        self._store: dist.Store | None = None
        self._answers: dist.Store | None = None
        self._asking, self._deaf = threading.Lock(), False
        self._process = living.myself()
        self._every = min(_BEAT_SECONDS, self._timeout / 10)

    def __enter__(self) -> Watchdog:
        if self._ranks > 1:
            self._store, self._answers = (process_group.store().clone() for _ in range(2))  # type: ignore[attr-defined]
        self.step(self._number)
        self._durations.clear()
        # signs come from a thread of their own: who looks after the others, and waits for theirs, still gives his
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._sign, self._look)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(self._every)

    def step(self, number: int) -> None:
        now = time.monotonic()
        self._durations.append(now - self._stepped)
        self._number, self._stepped = number, now
        self._at(_BETWEEN, False)

    @contextmanager
    def doing(self, name: str, *, unlimited: bool = False) -> Iterator[None]:
        before = self._doing, self._unlimited
        self._at(name, unlimited)
        try:
            yield
        finally:
            self._at(*before)

    def silent(self) -> list[int]:
        """Ranks whose processes are gone, as far as they can be seen from here, else those that give no sign of life, by two
        looks that are further apart than signs are; rank 0 where the store that the ranks meet by does not answer."""
        if self._answers is None:
            return []
        try:
            before = self._asked()
            if gone := [rank for rank, sign in before.items() if sign.process.gone()]:
                return gone
            time.sleep(1.5 * self._every)
            now = self._asked()
        except (dist.DistError, TimeoutError):
            return [] if self._rank == 0 else [0]
        return [rank for rank in range(self._ranks) if rank not in now or before.get(rank) == now[rank]]

    def usual(self) -> float:
        """Seconds after which a step is worth a look; the first ones compile, and may take longer."""
        if len(self._durations) < _FEW_STEPS:
            return self._timeout / 2
        return min(self._timeout / 2, max(AT_LEAST_SECONDS, USUAL * statistics.median(self._durations)))

    def _at(self, name: str, unlimited: bool) -> None:
        self._doing, self._unlimited, self._since = name, unlimited, time.monotonic()

    def _sign(self) -> None:
        with suppress(dist.DistError):  # the store is gone: the main thread will know
            while self._store is not None:
                self._signed += 1
                self._store.set(f"watchdog/{self._rank}", json.dumps(self._mine()))
                if self._over.wait(self._every / 2):
                    return

    def _look(self) -> None:
        began = time.monotonic()
        while not self._over.wait(self._every / 2):
            waited = time.monotonic() - began
            if waited > 2 * self._every:  # this thread was held up too: the process was stopped, and woken (Ctrl-Z, fg)
                self._since += waited
            quiet = time.monotonic() - self._since
            if quiet > self._timeout and not self._unlimited:
                self._end(self._paragraph(quiet))
                return
            if quiet > self.usual() and self._told_of != self._number:
                self._told_of = self._number
                self._dump()
                if self._rank == 0:
                    logger.warning("%s Stacks: %s.", self._situation(quiet), self._folder)
            began = time.monotonic()

    def _mine(self) -> list[object]:
        return [self._signed, self._number, self._doing, round(time.monotonic() - self._since, 1), self._process]

    def _signs(self) -> dict[int, Sign]:
        """Of the ranks that have told anything."""
        store = self._answers
        if store is None:
            return {self._rank: Sign(*self._mine())}  # type: ignore[arg-type]
        found = {}
        for rank in range(self._ranks):
            if store.check([key := f"watchdog/{rank}"]):
                number, step, doing, seconds, process = json.loads(store.get(key))
                found[rank] = Sign(number, step, doing, seconds, living.Process(*process))
        return found

    def _asked(self) -> dict[int, Sign]:
        """`_signs`, within a time. Raises TimeoutError where the store does not answer, from then on at once."""
        if self._deaf:
            raise TimeoutError("no answer before")
        try:
            with self._asking:  # two threads may want to know
                return waiting.within(2 * self._every, self._signs)
        except TimeoutError:
            self._deaf = True
            raise

    def _situation(self, quiet: float) -> str:
        usual = f", where steps took {statistics.median(self._durations):.3g} s" if self._durations else ""
        silent = self.silent()
        try:
            who = described(self._asked(), silent)
        except (dist.DistError, TimeoutError):
            who = "rank 0, whose store the ranks meet by, does not answer"
        return f"step {self._number + 1} has not moved for {quiet:.0f} s{usual}: {who}."

    def _paragraph(self, quiet: float) -> str:
        self._dump()
        return (
            f"{self._situation(quiet)} That is longer than engine.timeout_minutes = {self._timeout / 60:g}. Stacks: "
            f"{self._folder}. The same command goes on from the newest checkpoint."
        )

    def _dump(self) -> None:
        """Stacks of all threads, and what NCCL last did, where it does."""
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            with (self._folder / f"rank_{self._rank}.txt").open("w") as file:
                file.write(f"step {self._number + 1}, {self._doing} for {time.monotonic() - self._since:.0f} s\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            if torch.cuda.is_available():
                with suppress(Exception):  # its recorder may be off (TORCH_FR_BUFFER_SIZE)
                    trace = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
                    (self._folder / f"rank_{self._rank}.nccl").write_bytes(trace)


def described(signs: Mapping[int, Sign], silent: Sequence[int] = ()) -> str:
    """Who does what, those first that are behind or do something else than most."""
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    for rank, sign in signs.items():
        if rank not in silent:
            groups[sign.step, sign.doing].append(rank)
    parts = []
    if silent:
        parts.append(f"{_ranks(silent)}: no sign of life")
    newest = max((step for step, _ in groups), default=0)
    for (step, doing), ranks in sorted(groups.items(), key=lambda one: (one[0][0], one[0][1] == _WAITS, len(one[1]))):
        seconds = max(signs[rank].seconds for rank in ranks)
        behind = f" of step {step + 1}" if step < newest else ""
        parts.append(f"{_ranks(ranks)}: {doing}{behind} for {seconds:.0f} s")
    return "; ".join(parts)


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _leave(paragraph: str) -> NoReturn:
    logger.error("error on rank %d: %s", process_group.rank(), paragraph)
    sys.stderr.flush()
    os._exit(Exit.FAULT)


@contextmanager
def in_words(watchdog: Watchdog) -> Iterator[None]:
    """What a collective raises where a rank is gone is a page of addresses: UserError, with who it is, in its place."""
    try:
        yield
    except RuntimeError as error:
        if process_group.world_size() == 1 or not _of_a_collective(error):
            raise
        silent = [] if isinstance(error, RankLost) else watchdog.silent()
        said = f"{_ranks(silent)} gave no sign of life" if silent else str(error).splitlines()[0][:200]
        raise UserError(
            f"the ranks have lost one another in step {watchdog._number + 1}: {said}. Look at the processes and machines of "
            "these. The same command goes on from the newest checkpoint.",
            Exit.FAULT,
        ) from error


def _of_a_collective(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError | RankLost) or any(
        word in text for word in ("gloo", "NCCL", "onnection closed by peer", "pair closure", "Timed out waiting")
    )
