"""Ranks of one start meet, whatever earlier starts have left in the store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from benchmarks.ports import free_port
from conftest import ROOT, Command, small_config

from lejepa_scale.errors import Exit, UserError
from lejepa_scale.parallel import meeting

SECOND = timedelta(seconds=1)


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", free_port(), is_master=True, timeout=timedelta(seconds=20))


def client(server: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))


def start(server: dist.TCPStore, ranks: list[int], world: int, timeout: timedelta) -> list[str | UserError]:
    """What each rank of a start is told."""

    def one(rank: int) -> str | UserError:
        try:
            return meeting.named(client(server), rank, world, timeout)
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(one, ranks))


def test_each_start_has_one_name_that_no_other_has(server: dist.TCPStore) -> None:
    names = [start(server, [2, 0, 1, 3], 4, 20 * SECOND) for _ in range(3)]
    assert [len(set(each)) for each in names] == [1, 1, 1]
    assert len({each[0] for each in names}) == 3


def test_what_dead_ranks_asked_and_were_told_misleads_nobody(server: dist.TCPStore) -> None:
    """A start of which rank 0 alone came, one of which it did not come, and one of fewer ranks after them."""
    (alone,) = start(server, [0], 3, SECOND)
    assert isinstance(alone, UserError)
    assert "2 of 3 ranks have not come in 1 s" in str(alone)
    orphans = start(server, [1, 2], 3, SECOND)
    assert [isinstance(each, UserError) and "rank 0 has told rank" in str(each) for each in orphans] == [True, True]
    assert {each.status for each in [alone, *orphans] if isinstance(each, UserError)} == {Exit.FAULT}
    names = start(server, [1, 0], 2, 20 * SECOND)
    assert len(set(names)) == 1
    assert isinstance(names[0], str)


@pytest.mark.slow
def test_torchrun_starts_again_by_itself_after_a_rank_was_killed(
    command: Command, tmp_path: Path, scenes: Path
) -> None:
    """With torch's own way the second attempt connects to the addresses of the first, and ends at once."""
    run = tmp_path / "run"
    tree = small_config(
        run, scenes, train={"steps": 60}, engine={"name": "ddp", "timeout_minutes": 0.5}, checkpoint={"every": 5}
    )
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", f"--master-port={free_port()}"]
    process = subprocess.Popen(
        [sys.executable, *words, "launchers/train.py", "--config", str(command.config(tree))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (run / "checkpoints/step_00000005").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[1]
    ranks = [one for one in psutil.Process(process.pid).children() if one.environ().get("RANK") == "1"]
    ranks[0].send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))
    assert "resuming from" in said


def test_ranks_keep_a_store_that_outlives_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's store is gone with torchrun; what ranks put into theirs is still there."""
    launchers = [dist.TCPStore("127.0.0.1", free_port(), is_master=True, timeout=20 * SECOND)]
    port = launchers[0].port
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    seconds = 20 * SECOND

    def one(rank: int) -> dist.TCPStore:
        own = client(launchers[0])
        name = meeting.named(own, rank, 3, seconds)
        return meeting.kept_by_rank_zero(own, name, rank, 3, seconds)

    with ThreadPoolExecutor(3) as threads:
        stores = list(threads.map(one, range(3)))
    assert {store.port for store in stores} == {stores[0].port} != {port}
    launchers.clear()
    with pytest.raises(dist.DistError):
        dist.TCPStore("127.0.0.1", port, is_master=False, timeout=SECOND)
    stores[1].set("saved", "by rank 1")
    assert stores[2].get("saved") == b"by rank 1"
    assert stores[0].add("count", 1) == 1


@pytest.mark.parametrize(
    ("own", "of_master", "told"),
    [
        ("10.0.0.7", "10.0.0.7", "head"),  # the launcher's store is on this host, which others know by that name
        ("127.0.0.1", "127.0.1.1", "head"),  # likewise, where the host's own name is an address of its own
        ("10.0.0.7", "10.0.0.1", "10.0.0.7"),  # rank 0 has moved to another host since
        ("fe80::7%eth0", "fe80::1", "fe80::7%eth0"),
    ],
)
def test_the_address_that_others_reach(own: str, of_master: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Connection:
        def __enter__(self) -> Connection:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def getsockname(self) -> tuple[str, int]:
            return own, 1

        def getpeername(self) -> tuple[str, int]:
            return of_master, 2

    monkeypatch.setenv("MASTER_ADDR", "head")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(meeting.socket, "create_connection", lambda *_, **__: Connection())
    assert meeting._host_of_this_rank() == told
