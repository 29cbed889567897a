"""The start and the end of a loader's processes. They hold no state, so they are killed: a worker may sit in a read that
never returns, be stopped, or write to a full queue, and torch and multiprocessing would wait for it without a limit."""

from __future__ import annotations

import multiprocessing.process
import signal
from multiprocessing.util import Finalize
from typing import Any

import cv2
from torch.utils.data._utils import signal_handling

from lejepa_scale.data.watch import Board
from lejepa_scale.parallel.parent import end_with_parent

_REAP_SECONDS = 5.0  # for a killed process to go; one that waits for a dead disk may not
_PIN_SECONDS = 2.0


def started(board: Board, from_main_thread: bool, number: int) -> None:
    """The first thing that worker `number` does."""
    # The trainer decides when to stop: a signal to the process group must not take the workers away before it has saved.
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(signal.Signals[name], signal.SIG_IGN)
    end_with_parent(by_kernel=from_main_thread)
    cv2.setNumThreads(1)
    board.begin(number)


def leave_to_us(batches: Any) -> None:
    """Else torch raises at the death of a worker, in the main thread, whatever that is in the middle of."""
    if getattr(batches, "_workers", []):
        signal_handling._remove_worker_pids(id(batches))
        batches._worker_pids_set = False


def ending(batches: Any) -> Finalize:
    """Call the result to end the workers of a DataLoader's iterator, and let no more batches come. It is called at the
    process's exit too, before multiprocessing joins what is left. Does nothing where there are no workers."""
    return Finalize(None, _end, (batches,), exitpriority=100)


def _end(batches: Any) -> None:
    workers = getattr(batches, "_workers", [])
    if not workers:
        return
    batches._shutdown = True  # torch's own way is over
    if (thread := getattr(batches, "_pin_memory_thread", None)) is not None:
        batches._pin_memory_thread_done_event.set()
        batches._worker_result_queue.put((None, None))  # wakes it up
        thread.join(_PIN_SECONDS)  # a daemon: where half a message holds it up, it stays
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(_REAP_SECONDS)
        if worker.is_alive():
            multiprocessing.process._children.discard(worker)  # type: ignore[attr-defined]  # joined at exit without limit
    for held in (batches._worker_result_queue, *batches._index_queues):
        held.cancel_join_thread()  # nobody reads what it still has to write
        held.close()
