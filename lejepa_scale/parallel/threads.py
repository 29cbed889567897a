"""Calls in the background, on daemon threads: one that never returns keeps neither its caller waiting beyond a deadline nor
the process from ending; and how many of them can run at once. Refuses to know what the calls do."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

T = TypeVar("T")


class Pool:
    """`threads` threads that take calls in the order in which they came."""

    def __init__(self, threads: int) -> None:
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._running = [threading.Thread(target=_serve, args=(self._tasks,), daemon=True) for _ in range(threads)]
        for thread in self._running:
            thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._tasks.put((future, call))
        return future

    def close(self, wait: float = 0.0) -> None:
        """Threads end after the calls that were submitted; so many seconds are waited for each."""
        for _ in self._running:
            self._tasks.put(None)
        for thread in self._running:
            thread.join(wait)


def started(call: Callable[[], T]) -> Future[T]:
    """What comes of `call`, in a thread of its own."""
    future: Future[T] = Future()
    threading.Thread(target=_settle, args=(future, call), daemon=True).start()
    return future


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`; raises TimeoutError after `seconds`, and leaves the call to itself."""
    return result(started(call), seconds)


def result(future: Future[T], seconds: float) -> T:
    """Raises TimeoutError: the built-in one, which concurrent.futures has of its own before Python 3.11."""
    try:
        return future.result(seconds)
    except FutureTimeout:
        if future.done():
            raise
        raise TimeoutError(f"nothing in {seconds:g} s") from None


def _serve(tasks: queue.SimpleQueue[Any]) -> None:
    while (task := tasks.get()) is not None:
        _settle(*task)
        # What came of it belongs to who waits for it: tensors that a thread frees at the exit abort the process.
        del task


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)


def cores() -> int:
    """That this process may run on; all of the machine where the system (macOS, Windows) does not say."""
    ask = getattr(os, "sched_getaffinity", None)
    return len(ask(0)) if ask else os.cpu_count() or 1
