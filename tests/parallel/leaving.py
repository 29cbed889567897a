"""What ranks do in the tests of leaving the process group: each function is a rank's program."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import small_config
from steps import of_this_rank, start, take_step
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lejepa_scale.config import validate
from lejepa_scale.parallel import launch, process_group

LONG = timedelta(minutes=10)


def run(function: Callable[[], None], world: int, port: int, statuses: Path) -> None:
    """In `world` forks of this process; how each of them ended goes to a file."""
    ranks = []
    for rank in range(world):
        if pid := os.fork():
            ranks.append(pid)
            continue
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        launch.declare(rank, world, rank)
        torch.set_num_threads(1)
        function()
        return
    ended = [os.waitpid(pid, os.WUNTRACED)[1] for pid in ranks]
    codes = [None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status) for status in ended]
    unfinished = statuses.with_suffix(".partial")
    unfinished.write_text(repr(codes))
    unfinished.replace(statuses)  # whoever waits for the file finds it whole
    os._exit(0)


def threads_of_group() -> list[str]:
    names = [(path / "comm").read_text().strip() for path in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


def trains(engine_name: str) -> None:
    """Two steps on an engine that is closed, and still held, when the group is left."""
    with process_group.joined(LONG):
        assert threads_of_group()
        tree = small_config("run", "shards", engine={"name": engine_name}, train={"global_batch": 8})
        engine, plan = start(validate(tree))
        views = [torch.randn(2, 8, 3, 32, 32), torch.randn(2, 8, 3, 16, 16)]
        for number in range(2):
            take_step(engine, plan, of_this_rank(views, plan), number)
        engine.close()
    if engine_name == "ddp":  # torch's own caches of FSDP hold the group, by references that may be the last
        assert not threads_of_group(), "somebody still holds the group"


def leaves_with_work_under_way() -> None:
    """The interpreter is not given away unasked, and a thread of the group still has to release a tensor: whoever joins
    that thread must give it away. A reducer in the place of the last reference does not, and never returns."""
    process_group.join(LONG)
    held = [DistributedDataParallel(nn.Linear(4, 4))]
    held[0](torch.ones(2, 4)).sum().backward()
    process_group.before_leaving(held.clear)
    sys.setswitchinterval(5)
    for _ in range(3):
        dist.broadcast(torch.zeros(1 << 22), 0, async_op=True)
    process_group.leave()
    assert not threads_of_group()


def raises_while_another_waits() -> None:
    with process_group.joined(LONG):
        model = DistributedDataParallel(nn.Linear(4, 4))
        model(torch.ones(2, 4)).sum().backward()
        if process_group.rank() == 1:
            raise ValueError("of rank 1")
        dist.all_reduce(torch.ones(1 << 20))


def raises_while_another_leaves() -> None:
    with process_group.joined(LONG):
        if process_group.rank() == 1:
            time.sleep(0.5)
            raise ValueError("of rank 1")


def raises_while_another_stands_still() -> None:
    """Rank 1 is stopped, with work of rank 0 under way that waits for it."""
    with process_group.joined(LONG):
        model = DistributedDataParallel(nn.Linear(4, 4))
        model(torch.ones(2, 4)).sum().backward()
        dist.barrier()
        if process_group.rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        works = [dist.all_reduce(torch.ones(1 << 20), async_op=True) for _ in range(3)]
        time.sleep(0.2)
        raise ValueError(f"with {len(works)} under way")
