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
