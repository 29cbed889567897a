"""Work of unknown length is waited for as long as the ranks at work show signs of life, and a silent rank is named."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch.distributed as dist
from conftest import mostly_slow
from ranks import run_ranks
from torch.distributed import distributed_c10d

from lejepa_scale.errors import Exit, UserError
from lejepa_scale.parallel import collectives, process_group, waiting

LIMIT = 3.0  # seconds after which a collective gives up, and a silent rank counts as lost


@contextmanager
def impatient() -> Iterator[None]:
    before = process_group.timeout()
    collectives.barrier()  # all have started
    process_group._timeout = timedelta(seconds=LIMIT)
    distributed_c10d._set_pg_timeout(process_group.timeout(), dist.group.WORLD)
    try:
        yield
    finally:
        process_group._timeout = before
        distributed_c10d._set_pg_timeout(before, dist.group.WORLD)


def _slow_first_and_last() -> tuple[str, int]:
    rank, last = process_group.rank(), process_group.world_size() - 1

    def index() -> str:
        time.sleep(2 * LIMIT)
        return "indexed"

    def read() -> int:
        if rank == last:
            time.sleep(2 * LIMIT)
        return rank

    with impatient():
        index_of_all = collectives.on_rank_zero(index, "indexing the shards")
        return index_of_all, collectives.everywhere(read, "reading the checkpoint")


@pytest.mark.parametrize("world", mostly_slow([2, 4], 2))
def test_ranks_at_work_are_waited_for_beyond_the_timeout(world: int) -> None:
    assert run_ranks(_slow_first_and_last, world) == [("indexed", rank) for rank in range(world)]


def _silent(stopped: int) -> str:
    pids = collectives.gather_objects(os.getpid())
    raised = ""
    try:
        with impatient(), waiting.awaited("reading the index"):
            if process_group.rank() == stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
    except UserError as error:
        raised = str(error)
    store = process_group.store()
    store.add("over", 1)
    if process_group.rank() == (stopped + 1) % 3:
        while store.add("over", 0) < 2:
            time.sleep(0.05)
        os.kill(pids[stopped], signal.SIGCONT)
    return raised


def test_a_silent_rank_is_named_with_the_work() -> None:
    found = run_ranks(_silent, 3, 1)
    assert found[1] == ""
    for message in (found[0], found[2]):
        assert message.startswith("rank 1 gave no sign of life for 3 s (engine.timeout_minutes)")
        assert "(reading the index)" in message


def _failing() -> tuple[str, Exit]:
    def work() -> None:
        time.sleep(1.5 * LIMIT)
        raise UserError("there are no shards.", Exit.FAULT)

    with impatient(), pytest.raises(UserError) as caught:
        collectives.on_rank_zero(work, "indexing the shards")
    return str(caught.value), caught.value.status


def test_what_fails_after_a_long_time_is_told_everywhere() -> None:
    assert run_ranks(_failing, 2) == [("there are no shards.", Exit.FAULT)] * 2


def _failing_apart(errors: list[Exception | None]) -> tuple[str, Exit | None]:
    def work() -> None:
        if (error := errors[process_group.rank()]) is not None:
            raise error

    try:
        collectives.everywhere(work, "reading")
    except UserError as error:
        return str(error), error.status
    except Exception as error:
        return repr(error), None
    return "", None


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        ([None, UserError("no answer.", Exit.FAULT)], [("no answer.", Exit.FAULT)] * 2),
        (
            [UserError("no rate.", Exit.MISTAKE), UserError("no answer.", Exit.FAULT)],
            [("no rate. no answer.", Exit.MISTAKE)] * 2,
        ),
        ([None, OSError(5, "EIO")], [("rank 1 failed: OSError(5, 'EIO')", Exit.FAULT), ("OSError(5, 'EIO')", None)]),
    ],
)
def test_the_status_is_every_ranks(errors: list[Exception | None], told: list[tuple[str, Exit | None]]) -> None:
    """A mistake on one of them is one: the next time will not go better."""
    assert run_ranks(_failing_apart, 2, errors) == told


def test_a_long_wait_is_told_of_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    told = waiting.Told("indexing the shards")
    with caplog.at_level(logging.INFO, "lejepa_scale"):
        for second in range(900):
            now[0] = float(second)
            told.look()
    assert caplog.messages == [
        f"indexing the shards: {waited} so far." for waited in ("30 s", "60 s", "2 min", "4 min", "8 min")
    ]


def test_alone_nobody_is_waited_for() -> None:
    assert collectives.on_rank_zero(lambda: 3, "counting") == 3
    with waiting.awaited("counting"):
        pass


class Deaf:
    """A store whose host does not answer: its link is cut."""

    def __init__(self, after: int = 0) -> None:
        self.left = after

    def _asked(self, *_: object) -> int:
        if self.left <= 0:
            time.sleep(60)
        self.left -= 1
        return 1

    add = check = get = set = _asked

    def clone(self) -> Deaf:
        return self


@pytest.mark.unchecked
def test_no_answer_is_waited_for_no_longer_than_said() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer in 0 s"):
        waiting.within(0.2, Deaf().add)
    assert time.monotonic() - began < 5
    assert waiting.within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        waiting.within(5, lambda: 1 // 0)


@pytest.mark.unchecked
@pytest.mark.parametrize("after", [0, 2, 3, 6])
def test_a_store_that_does_not_answer_ends_the_wait(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the link is cut: before this rank has told that it is done, or while it waits for the others."""
    monkeypatch.setattr(process_group, "world_size", lambda: 4)
    monkeypatch.setattr(process_group, "store", lambda: Deaf(after))
    monkeypatch.setattr(process_group, "timeout", lambda: timedelta(seconds=0.4))
    began = time.monotonic()
    with pytest.raises(UserError, match=r"\(saving\)"), waiting.awaited("saving"):
        pass
    assert time.monotonic() - began < 10
