"""Waiting for work of which nobody knows how long it takes: a first index, a slow disk. A collective would count a rank that
is late as lost. Here ranks that are at work give signs of life through the group's store, and only silence is a loss."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

import torch.distributed as dist

from lejepa_scale.errors import UserError
from lejepa_scale.parallel import process_group

logger = logging.getLogger(__name__)
T = TypeVar("T")

_BEAT_SECONDS = 10.0  # between two signs of life, or a fifth of the timeout where that is less
_LOOK_SECONDS = 0.002, 1.0  # between two looks at the others: at first, at last
_number = itertools.count()  # of a piece of work, the same on every rank


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` gives. A store that lives on a host whose link is cut answers nothing, for ever: raises TimeoutError after
    `seconds`, and leaves the thread that asks behind."""
    found: list[T] = []
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return found[0]


class Told:
    """Tells of a wait on rank 0's log: after 30 s, and then at twice the time."""

    def __init__(self, doing: str) -> None:
        self.doing, self._began, self._next = doing, time.monotonic(), 30.0

    def look(self) -> None:
        if (waited := time.monotonic() - self._began) >= self._next:
            self._next = 2 * waited
            logger.info("%s: %s so far.", self.doing, _spoken(waited))


@contextmanager
def awaited(doing: str) -> Iterator[None]:
    """Every rank calls. Inside, a rank may take as long as it likes; at the end the ranks wait for one another. No
    collective may be inside. doing: what the work is called in messages, "indexing the shards".

    Raises UserError where ranks that are waited for give no sign of life for the group's timeout, with their numbers. Waits
    for nobody where the work itself raises: agree on what went wrong inside.
    """
    if process_group.world_size() == 1:
        yield
        return
    store, key, limit = process_group.store(), f"awaited/{next(_number)}", process_group.timeout().total_seconds()
    told, over = Told(doing), threading.Event()
    beating = threading.Thread(target=_beat, args=(store, key, over, min(_BEAT_SECONDS, limit / 5), told), daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
    try:
        within(limit, partial(store.add, f"{key}/done", 1))
        within(limit, partial(store.add, f"{key}/done/{process_group.rank()}", 1))
        _wait(store, key, limit, told)
    except (dist.DistError, TimeoutError) as error:
        raise UserError(f"rank 0 was lost while the ranks waited ({told.doing}): {error}") from error


def _beat(store: dist.Store, key: str, over: threading.Event, every: float, told: Told) -> None:
    with suppress(dist.DistError):  # the store is gone, which the others see for themselves
        while not over.wait(every):
            store.add(f"{key}/beats", 1)
            told.look()


def _wait(store: dist.Store, key: str, limit: float, told: Told) -> None:
    began = heard = time.monotonic()
    beats = -1
    while within(limit, partial(store.add, f"{key}/done", 0)) < process_group.world_size():
        if (now := within(limit, partial(store.add, f"{key}/beats", 0))) != beats:
            beats, heard = now, time.monotonic()
        elif time.monotonic() - heard > limit:
            raise _lost(within(limit, partial(_unfinished, store, key)), limit, told.doing)
        told.look()
        time.sleep(min(_LOOK_SECONDS[1], max(_LOOK_SECONDS[0], 0.05 * (time.monotonic() - began))))


def _unfinished(store: dist.Store, key: str) -> list[int]:
    return [rank for rank in range(process_group.world_size()) if not store.check([f"{key}/done/{rank}"])]


def _lost(ranks: list[int], limit: float, doing: str) -> UserError:
    who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"
    return UserError(
        f"{who} gave no sign of life for {_spoken(limit)} (engine.timeout_minutes), while the others waited ({doing}): look "
        "at the processes and machines of these. The same command goes on from the newest checkpoint."
    )


def _spoken(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
