"""Leaving the process group: everything has let go of it, nothing is waited for without a bound, on errors too."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from benchmarks.ports import free_port
from conftest import ROOT, mostly_slow
from processes import Forks, eventually, forks, session

from lejepa_scale.errors import UserError
from lejepa_scale.parallel import process_group

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for threads and processes in /proc")
SECONDS = 120.0  # on a machine that does much else; a rank that hangs does so for ten minutes


@pytest.fixture(scope="module")
def server() -> Iterator[Forks]:
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "tools", ROOT / "tests", ROOT / "tests/parallel"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with forks("import leaving; from pathlib import Path", environment) as running:
        yield running


def statuses(server: Forks, call: str, world: int, folder: Path) -> list[int | None]:
    """How each rank ended; None where it is stopped."""
    file = folder / "statuses"
    leader = server.start(f"leaving.run(lambda: leaving.{call}, {world}, {free_port()}, Path({str(file)!r}))")
    try:
        assert eventually(file.exists, SECONDS), f"{len(session(leader)) - 1} of {world} ranks never ended"
    finally:
        for pid in session(leader):
            with suppress(ProcessLookupError):  # it has ended by itself meanwhile
                os.kill(pid, signal.SIGKILL)
        server.status(SECONDS)
    return eval(file.read_text())


@linux
@pytest.mark.parametrize(("engine", "world"), mostly_slow([("ddp", 2), ("fsdp", 2), ("zero1", 2)], ("ddp", 2)))
def test_a_closed_engine_lets_the_group_go(server: Forks, tmp_path: Path, engine: str, world: int) -> None:
    assert statuses(server, f"trains({engine!r})", world, tmp_path) == [0] * world


@linux
@pytest.mark.slow
def test_ddp_on_four_ranks_ends_every_time(server: Forks, tmp_path: Path) -> None:
    for turn in range(40):
        (folder := tmp_path / str(turn)).mkdir()
        assert statuses(server, "trains('ddp')", 4, folder) == [0] * 4


@linux
def test_leaving_with_work_under_way(server: Forks, tmp_path: Path) -> None:
    assert statuses(server, "leaves_with_work_under_way()", 2, tmp_path) == [0, 0]


@linux
@pytest.mark.parametrize("case", ["raises_while_another_waits", "raises_while_another_leaves"])
def test_an_error_on_one_rank_ends_all(server: Forks, tmp_path: Path, case: str) -> None:
    assert statuses(server, f"{case}()", 2, tmp_path) == [1, 1]


@linux
def test_an_error_does_not_wait_for_a_rank_that_stands_still(server: Forks, tmp_path: Path) -> None:
    assert statuses(server, "raises_while_another_stands_still()", 2, tmp_path) == [1, None]


def test_one_process_leaves_on_errors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """And can join again."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for failure in (ValueError, KeyboardInterrupt, None):
        let_go: list[str] = []
        expected = pytest.raises(failure) if failure else nullcontext()
        with expected, process_group.joined(timedelta(seconds=5)) as device:
            assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
            assert process_group.timeout() == timedelta(seconds=5)
            process_group.before_leaving(lambda into=let_go: into.append("first"))
            process_group.before_leaving(lambda into=let_go: into.append(str(dist.is_initialized())))
            if failure:
                raise failure
        assert let_go == ["True", "first"]  # the last to come lets go first, and the group is still there
        assert not dist.is_initialized()
    process_group.leave()  # of no group: nothing


@pytest.mark.parametrize(("local_rank", "visible", "index"), [(0, 1, 0), (3, 1, 0), (0, 8, 0), (7, 8, 7)])
def test_a_rank_has_the_gpu_of_its_number_or_the_one_it_is_shown(local_rank: int, visible: int, index: int) -> None:
    """A launcher that shows every task a GPU of its own still counts tasks."""
    assert process_group._own_gpu(local_rank, visible) == torch.device("cuda", index)


def test_a_rank_without_a_gpu_is_told() -> None:
    with pytest.raises(UserError, match=r"rank 4 of this host \(LOCAL_RANK\) has no GPU: 4 are visible"):
        process_group._own_gpu(4, 4)


def test_nccl_is_told_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(process_group, "_timeout", process_group._timeout)  # which it sets
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: given.update(current=device))
    monkeypatch.setattr(dist, "init_process_group", lambda **options: given.update(options))
    monkeypatch.setattr(process_group, "store_of_this_start", lambda timeout: ("a store", 2, 4))
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert process_group.join(timedelta(seconds=60)) == torch.device("cuda", 2)
    assert given["device_id"] == given["current"] == torch.device("cuda", 2)
    assert given["backend"] == "cpu:gloo,cuda:nccl"
    assert (given["store"], given["rank"], given["world_size"]) == ("a store", 2, 4)
