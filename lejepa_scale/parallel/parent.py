"""A process that must not outlive the one that started it: it ends by itself when its parent is gone, however that went.
For processes that hold no state, since the end is SIGKILL. Knows nothing of what they do."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import wait

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_SECONDS = 1.0


def end_with_parent(*, by_kernel: bool = True) -> None:
    """Called in a process of multiprocessing, as early as it can. A thread looks after the parent every second; on Linux the
    kernel does so too, and kills this process even where it is stopped or sits in a call that does not return.

    The kernel goes by the thread that started this process: give `by_kernel=False` where that may end before its process.
    Raises RuntimeError in a process that multiprocessing did not start."""
    parent, started_by = multiprocessing.parent_process(), os.getppid()
    if parent is None:
        raise RuntimeError("multiprocessing did not start this process: it has no parent to end with.")
    if by_kernel and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    threading.Thread(target=_watch, args=(parent.sentinel, started_by), daemon=True).start()


def _watch(sentinel: int, started_by: int) -> None:
    # A parent that was gone before we began shows at the sentinel alone; where siblings hold that open, the number changes.
    while os.getppid() == started_by and not wait([sentinel], _POLL_SECONDS):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
