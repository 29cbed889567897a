"""The process group of all ranks: joining and leaving it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from lejepa_scale.parallel import launch

Group = dist.ProcessGroup | None

_timeout = timedelta(minutes=10)
_before_leaving: list[Callable[[], None]] = []


def join(timeout: timedelta) -> torch.device:
    """Join the process group (NCCL on CUDA, gloo on CPU) and return this rank's device.

    Reads the environment that torchrun and the deepspeed launcher both set; under plain `python` it makes a group of one.
    """
    global _timeout
    _timeout = timeout
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    if launch.launched():
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        os.environ.setdefault("LOCAL_RANK", "0")
    return device


def leave() -> None:
    """Leave the group, after what holds on to it has let go. Does nothing where there is none."""
    while _before_leaving:
        _before_leaving.pop()()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined(timeout: timedelta) -> Iterator[torch.device]:
    """Inside, the group of all ranks; it is left whatever ends the work. Gives this rank's device."""
    device = join(timeout)
    try:
        yield device
    finally:
        leave()


def before_leaving(release: Callable[[], None]) -> None:
    """Call `release` when the group is left: whoever keeps something of the group gives it back then."""
    _before_leaving.append(release)


def timeout() -> timedelta:
    """How long a rank waits for another."""
    return _timeout


def world_size(group: Group = None) -> int:
    """Ranks of a group, of all by default; 1 outside a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    """This process in a group, in that of all by default; 0 outside a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0
