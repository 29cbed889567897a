"""Every wait has a bound, and says what was waited for."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_views
from processes import eventually
from shardserver import Server, serve

from lejepa_scale.config import BatchPlan, Data
from lejepa_scale.data import Loader, open_mixture
from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.data.io.cache import Cache
from lejepa_scale.data.io.reader import Reader
from lejepa_scale.data.io.transport import Transport
from lejepa_scale.data.samples import read_ahead, read_image
from lejepa_scale.data.watch import Board, Lost, Watch
from lejepa_scale.errors import UserError
from lejepa_scale.parallel.parent import end_with_parent
from lejepa_scale.parallel.threads import Pool, within


def for_ever(*_: Any, **__: Any) -> bytes:
    time.sleep(1e6)
    return b""


def test_a_batch_that_does_not_come_names_its_step_and_shards(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data(shards=str(scenes), workers=1, views=small_views(), shuffle_block=1)
    mixture = open_mixture(data)
    first = next(iter(Loader(mixture, data, BatchPlan(micro_batch=4, accumulation=2), seed=0, first_step=7)))
    monkeypatch.setattr(Reader, "read", for_ever)
    with (
        Loader(mixture, data, BatchPlan(micro_batch=4, accumulation=2), seed=0, first_step=7, timeout=1.0) as loader,
        pytest.raises(
            UserError,
            match=r"no batch came for step 7: worker 0 of rank 0 has not finished its batch in 1 s\. It was on ",
        ) as caught,
    ):
        next(iter(loader))
    assert f"on sample {first.keys[0]} of shard {scenes}/shard-{first.records[0].shard:06d}.tar." in str(caught.value)
    assert not multiprocessing.active_children()


KILLED = r"was killed \(SIGKILL\)\. It was {}\. The kernel kills so when memory is short .* fewer data\.workers"
STOPPED = (
    r"has shown no sign of life for [12] s: it is stopped \(`kill -CONT \d+` lets it go on\)\. It was {}\. The same"
)
READING = r"on sample \w+ of shard \S+/shard-00000\d\.tar"
BETWEEN = r"between two batches; the one that is missing is read from \S+/shard-00000\d\.tar.*"


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the state of a process")
@pytest.mark.parametrize(
    ("number", "reading", "says"),
    [
        (signal.SIGKILL, True, KILLED.format(READING)),
        (signal.SIGKILL, False, KILLED.format(BETWEEN)),
        (signal.SIGSTOP, True, STOPPED.format(READING)),
        (signal.SIGSTOP, False, STOPPED.format(BETWEEN)),  # its batch is there, and its memory for the batch is not
        (signal.SIGBUS, False, r"was killed \(SIGBUS\).* make /dev/shm larger \(docker: --shm-size\)"),
    ],
)
def test_a_worker_that_is_killed_or_stopped_ends_the_wait(
    scenes: Path, monkeypatch: pytest.MonkeyPatch, number: int, reading: bool, says: str
) -> None:
    monkeypatch.setattr("lejepa_scale.data.watch.BEAT_SECONDS", 0.2)
    monkeypatch.setattr("lejepa_scale.data.watch.GRACE_SECONDS", 0.7)
    data = Data(shards=str(scenes), workers=2, views=small_views(), read_timeout=0.5)
    mixture = open_mixture(data)
    reads, read = multiprocessing.Value("i", 0), Reader.read

    def counted(*where: Any, **options: Any) -> bytes:
        with reads:
            reads.value += 1
        return for_ever() if reading else read(*where, **options)

    monkeypatch.setattr(Reader, "read", counted)
    with Loader(mixture, data, BatchPlan(micro_batch=4), seed=0) as loader:
        batches = iter(loader)
        if reading:
            threading.Thread(target=_signal_all, args=(number, lambda: reads.value == 2), daemon=True).start()
        else:
            next(batches)
            _signal_all(number, lambda: reads.value == 5 * 4)  # both have prepared theirs
        began = time.monotonic()
        with pytest.raises(UserError, match=rf"no batch came for step \d: worker [01] of rank 0 {says}"):
            for _ in batches:
                pass
        assert time.monotonic() - began < 30
    assert eventually(lambda: not multiprocessing.active_children(), 10)


def _signal_all(number: int, when: Callable[[], bool]) -> None:
    assert eventually(when, 30)
    time.sleep(0.5)
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, number)


def test_a_worker_that_is_slow_is_waited_for(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that takes longer than data.read_timeout is the reader's to judge: its worker lives."""
    monkeypatch.setattr("lejepa_scale.data.watch.BEAT_SECONDS", 0.1)
    monkeypatch.setattr("lejepa_scale.data.watch.GRACE_SECONDS", 0.4)
    data = Data(shards=str(scenes), workers=1, views=small_views(), read_timeout=0.1)
    mixture = open_mixture(data)
    read = Reader.read
    monkeypatch.setattr(Reader, "read", lambda *where, **options: (time.sleep(0.7), read(*where, **options))[1])
    with Loader(mixture, data, BatchPlan(micro_batch=3), seed=0) as loader:
        assert len(next(iter(loader)).keys) == 3


def test_a_worker_that_is_dying_is_waited_for() -> None:
    """Its connections go before its exit status comes."""

    def take() -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.5,))
    process.start()
    watch: Watch[None] = Watch(take, [process], Board(1), silence=30, patience=30)
    with pytest.raises(Lost, match="ended with status 0"):
        watch.next(0)
    watch.close()


def test_a_trainer_that_was_stopped_itself_does_not_blame_its_workers(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-Z and fg, which stop and wake the whole family."""
    clock = time.monotonic
    slept = iter([0.0, 1000.0, *[1000.0] * 100])
    board = Board(1)  # of a worker that shows nothing
    monkeypatch.setattr("lejepa_scale.data.watch.time.monotonic", lambda: clock() + next(slept))
    watch = Watch(lambda: time.sleep(1.5), [multiprocessing.current_process()], board, silence=3.0, patience=3.5)
    watch.next(0)
    watch.close()


def test_closing_does_not_wait_for_a_worker_that_cannot_be_killed(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a call that a signal does not end: it is left to itself, and nobody joins it at the exit."""
    data = Data(shards=str(scenes), workers=1, views=small_views())
    monkeypatch.setattr("lejepa_scale.data.workers._REAP_SECONDS", 0.2)
    loader = Loader(open_mixture(data), data, BatchPlan(micro_batch=4), seed=0)
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    monkeypatch.setattr(type(worker), "kill", lambda _: None)
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 3
    assert worker.is_alive()
    assert worker not in multiprocessing.active_children()
    assert next(batches, None) is None
    os.kill(worker.pid, signal.SIGKILL)
    assert eventually(lambda: not worker.is_alive(), 10)


# -- processes


def _mourns(by_kernel: bool, pids: Any) -> None:
    child = multiprocessing.get_context("fork").Process(target=_waits, args=(by_kernel, pids), daemon=True)
    child.start()
    signal.pause()


def _waits(by_kernel: bool, pids: Any) -> None:
    end_with_parent(by_kernel=by_kernel)
    pids.put(os.getpid())
    if by_kernel:
        os.kill(os.getpid(), signal.SIGSTOP)  # the kernel's way needs nothing of the process
    for_ever()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_process_ends_with_its_parent(by_kernel: bool) -> None:
    context = multiprocessing.get_context("fork")
    pids = context.SimpleQueue()
    parent = context.Process(target=_mourns, args=(by_kernel, pids))
    parent.start()
    child = Path("/proc", str(pids.get()))
    assert child.exists()
    parent.kill()
    parent.join(10)
    assert eventually(lambda: not child.exists(), 10)


def test_who_has_no_parent_cannot_end_with_it() -> None:
    with pytest.raises(RuntimeError, match="multiprocessing did not start this process"):
        end_with_parent()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("command", ["sleep 98765", "echo x; sleep 98765 | cat", "sleep 98765 & sleep 98765"])
def test_a_command_ends_with_whoever_reads_it(command: str) -> None:
    """SIGKILL leaves no time to end it; its own children end with it."""
    mine = str(10**6 + os.getpid())  # other tests may run beside this one
    chunks = Reader(read_timeout=60).stream("pipe:" + command.replace("98765", mine))
    process = multiprocessing.get_context("fork").Process(target=list, args=(chunks,))
    process.start()
    assert eventually(lambda: len(commands(mine)) == command.count("sleep"), 20)
    process.kill()
    process.join(10)
    assert eventually(lambda: not commands(mine), 10)


def commands(argument: str) -> list[str]:
    """Running programs that were given it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if line[0] == b"sleep" and argument.encode() in line:
            found.append(path.parent.name)
    return found


def test_a_command_keeps_its_status_input_and_output() -> None:
    by = Reader(read_timeout=5, retries=0)
    assert b"".join(by.stream("pipe:cat; echo \"$0 a 'b'\"; exec printf %s $((1 + 1))")) == b"/bin/sh a 'b'\n2"
    with pytest.raises(UserError, match="status 7 after 2 bytes"):
        list(by.stream("pipe:echo x; wait; exit 7"))


# -- threads


def test_calls_in_the_background_have_deadlines() -> None:
    assert within(5, lambda: 3) == 3
    with pytest.raises(TimeoutError, match=r"nothing in 0\.1 s"):
        within(0.1, for_ever)
    with pytest.raises(TimeoutError, match="its own"):
        within(5, _raises)
    pool = Pool(2)
    assert [f.result(5) for f in [pool.submit(lambda i=i: i * i) for i in range(20)]] == [i * i for i in range(20)]
    before = threading.active_count()
    pool.close()
    assert eventually(lambda: threading.active_count() == before - 2, 5)


def test_a_thread_keeps_nothing_of_what_it_gave() -> None:
    """Tensors that a thread frees while the interpreter ends abort the process."""
    pool = Pool(1)
    given = pool.submit(lambda: np.zeros(3)).result(5)
    alive = weakref.ref(given)
    del given
    assert eventually(lambda: alive() is None, 5)
    pool.close(5)
    assert not pool._running[0].is_alive()


def _raises() -> None:
    raise TimeoutError("its own")


def test_a_read_ahead_that_says_nothing_is_named(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as server:
        _serve_scenes(server, scenes)
        by = Reader()
        (shard,) = index_shards([server.url("set/one.tar")], reader=by)
        monkeypatch.setattr(Transport, "patience", lambda self, nbytes=0: 0.2)
        monkeypatch.setattr(by, "read", for_ever)
        with pytest.raises(UserError, match=r"set/one\.tar: \d+ bytes did not come in 0\.2 s, and no error either"):
            read_image(by, shard, 0, read_ahead(by, shard, 0))


def _serve_scenes(server: Server, scenes: Path) -> None:
    server.files["set/one.tar"] = min(scenes.glob("*.tar")).read_bytes()


def test_patience_covers_every_attempt_and_pause() -> None:
    """What config refuses beyond engine.timeout_minutes; and so much for every 4 MiB."""
    assert Transport(30.0, 5, 0.5).patience() == 2 * 6 * 30 + 5 * 30
    assert Transport(1.0, 0, 0.5).patience(10 << 20) == 3 * 2.0


# -- the cache: another process may have been stopped while it holds a lock


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    (tmp_path / "cache").mkdir()
    return Cache(tmp_path / "cache", None, patience=0.5)


def test_a_lock_that_is_never_released_is_named(cache: Cache) -> None:
    with (cache.folder / "lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"waited 0\.5 s for the lock \S*/cache/lock, and nothing moved.*fuser -v"):
            cache.open("http://a", 3, "", iter([b"abc"]), wait=False)
    assert cache.open("http://a", 3, "", iter([b"abc"]), wait=False).read() == b"abc"


def test_a_copy_that_another_process_never_ends_is_named(cache: Cache) -> None:
    partial = cache._target("pipe:a", "").with_suffix(".partial")
    with partial.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.truncate(3)
        began = time.monotonic()
        thread = threading.Timer(0.4, lambda: os.utime(partial))  # a sign of life: waited for anew
        thread.start()
        with pytest.raises(UserError, match=r"for other copies in \S*/cache to be written, for shard pipe:a"):
            cache.open("pipe:a", 3, "", iter([b"abc"]), wait=True)
        assert 0.9 <= time.monotonic() - began < 10
        assert cache.open("pipe:a", 3, "", iter([b"abc"]), wait=False) is None
    assert cache.open("pipe:a", 3, "", iter([b"abc"]), wait=True).read() == b"abc"


def test_room_that_is_never_made_is_named(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 5, patience=0.5)
    with cache._target("pipe:other", "").with_suffix(".partial").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.truncate(3)
        with pytest.raises(UserError, match=r"for other copies in .* for shard pipe:a"):
            cache.open("pipe:a", 3, "", iter([b"abc"]), wait=True)
    assert cache.open("pipe:a", 3, "", iter([b"abc"]), wait=True).read() == b"abc"
