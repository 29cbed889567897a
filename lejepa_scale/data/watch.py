"""Which sample each worker of a loader is on, and whether it lives: written by the workers, read by the trainer, which waits
for no batch without a limit. Knows neither shards nor torch's part in it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from ctypes import c_int64
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, Generic, TypeVar

from lejepa_scale.parallel.threads import Pool

T = TypeVar("T")

BEAT_SECONDS = 1.0
GRACE_SECONDS = 5.0  # beyond the limit that the user sets: a busy machine may hold up a thread for so long
_NOWHERE = -1
_END_SECONDS = 1.0
_DEATH_SECONDS = 2.0  # from its last connection to its exit status
_ADVICE = {
    signal.SIGKILL: "The kernel kills so when memory is short (dmesg says so): fewer data.workers, or a smaller "
    "data.prefetch, need less.",
    signal.SIGBUS: "So ends who writes to shared memory that is full: make /dev/shm larger (docker: --shm-size), or lower "
    "data.workers and data.prefetch.",
}


class Board:
    """Two numbers of each worker: the position of the sample that it is on, and a count that grows while it lives."""

    def __init__(self, workers: int) -> None:
        self._cells = RawArray(c_int64, [_NOWHERE, 0] * workers)

    def begin(self, worker: int) -> None:
        """In the worker: from now on it shows that it lives, and `at` is about it."""
        global _here
        _here = self._cells, 2 * worker
        threading.Thread(target=_beat, args=(self._cells, 2 * worker + 1), daemon=True).start()

    def position(self, worker: int) -> int | None:
        """Of the sample that it is on; None between two batches."""
        position = self._cells[2 * worker]
        return None if position == _NOWHERE else position

    def beats(self, worker: int) -> int:
        return self._cells[2 * worker + 1]


_here: tuple[Any, int] | None = None  # of this process, where it is a worker


def at(position: int | None) -> None:
    """In a worker: the sample that it turns to; None: it is done with its batch. Elsewhere this does nothing."""
    if _here is not None:
        cells, place = _here
        cells[place] = _NOWHERE if position is None else position


def _beat(cells: Any, place: int) -> None:
    while True:
        cells[place] += 1
        time.sleep(BEAT_SECONDS)


@dataclass
class Lost(Exception):
    """No batch can be expected any more. `worker` is why, and `what` says what happened to it."""

    worker: int
    what: str
    advice: str = ""


class Watch(Generic[T]):
    """Takes batches from `take`, in the background, and looks after `workers` meanwhile. silence: seconds without a sign of
    life after which one is given up; patience: seconds for a batch of workers that live."""

    def __init__(
        self, take: Callable[[], T], workers: Sequence[BaseProcess], board: Board, *, silence: float, patience: float
    ) -> None:
        self._take, self._workers, self._board = take, workers, board
        self._silence, self._patience = silence, patience
        # In the background, since it asks the worker for its shared memory, and one that is stopped never answers.
        self._thread = Pool(1)

    def next(self, owner: int) -> T:
        """The next batch, which is worker `owner`'s. Raises Lost; whatever a worker raised."""
        future = self._thread.submit(self._take)
        numbers = range(len(self._workers))
        waited, silent, beats = 0.0, [0.0 for _ in numbers], [self._board.beats(i) for i in numbers]
        while True:
            began = time.monotonic()
            if wait([future], BEAT_SECONDS).done:
                return self._taken(future)
            self._expect_alive()
            passed = min(time.monotonic() - began, 2 * BEAT_SECONDS)  # where we were stopped, all may have been
            waited += passed
            for i in numbers:
                before, beats[i] = beats[i], self._board.beats(i)
                silent[i] = 0.0 if beats[i] != before else silent[i] + passed
                if silent[i] > self._silence:
                    raise Lost(i, f"has shown no sign of life for {silent[i]:.0f} s{_state(self._workers[i].pid)}")
            if waited > self._patience:
                raise Lost(owner, f"has not finished its batch in {self._patience:g} s")

    def _taken(self, future: Future[T]) -> T:
        try:
            return future.result()
        except (OSError, EOFError, RuntimeError):  # what a batch of a worker that is dying gives
            until = time.monotonic() + _DEATH_SECONDS
            while time.monotonic() < until:
                self._expect_alive()
                time.sleep(0.02)
            raise

    def _expect_alive(self) -> None:
        for i, worker in enumerate(self._workers):
            if not worker.is_alive():
                raise _ended(i, worker.exitcode) from None

    def close(self) -> None:
        """The thread ends when the batch has come that it waits for, which is not waited for long."""
        self._thread.close(_END_SECONDS)


def _ended(worker: int, code: int | None) -> Lost:
    if code is None or code >= 0:
        return Lost(worker, f"ended with status {code}")
    number = -code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return Lost(worker, f"was killed ({name})", _ADVICE.get(number, ""))  # type: ignore[call-overload]


def _state(pid: int | None) -> str:
    """What Linux says that a silent process does."""
    with suppress(OSError, IndexError):
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if letter in "tT":
            return f": it is stopped (`kill -CONT {pid}` lets it go on)"
        if letter == "D":
            return ": it waits for a disk or a network file system"
    return ""
