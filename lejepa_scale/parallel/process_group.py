"""The process group of all ranks: joining and leaving it. Leaving is bounded, and no thread of the group is waited for while
the interpreter is held."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group: its functions keep the group of their import for ever
from torch.distributed import distributed_c10d

from lejepa_scale.errors import UserError
from lejepa_scale.parallel import launch
from lejepa_scale.parallel.meeting import store_of_this_start

Group = dist.ProcessGroup | None

_SETTLE_SECONDS = 0.05  # for the group's threads to release what the last collectives held
_timeout = timedelta(minutes=10)
_before_leaving: list[Callable[[], None]] = []


def join(timeout: timedelta) -> torch.device:
    """Join the process group (NCCL on CUDA, gloo on CPU) and return this rank's device.

    Reads the environment that torchrun and the deepspeed launcher both set; under plain `python` it makes a group of one.
    Raises UserError where there is no GPU for this rank, though there are others, and where ranks do not come in time.
    """
    global _timeout
    _timeout = timeout
    device, options = torch.device("cpu"), dict[str, Any](backend="gloo", timeout=timeout)
    if torch.cuda.is_available():
        device = _own_gpu(launch.local_rank(), torch.cuda.device_count())
        torch.cuda.set_device(device)
        options |= {"backend": "cpu:gloo,cuda:nccl", "device_id": device}  # told, NCCL need not guess, and connects now
    if launch.launched():
        store, rank, world = store_of_this_start(timeout)
        dist.init_process_group(**options, store=store, rank=rank, world_size=world)
    else:
        _join_alone(options)
        os.environ.setdefault("LOCAL_RANK", "0")
    return device


def join_alone() -> None:
    """A group of one, where there is none: for what torch does inside a group alone. `leave` leaves it. Raises UserError
    where a launcher started several ranks."""
    if not dist.is_initialized():
        if launch.ranks() > 1:
            raise UserError(
                f"this is rank {launch.rank()} of {launch.ranks()} (RANK, WORLD_SIZE), and no process group was joined: "
                "call lejepa_scale.parallel.process_group.join first."
            )
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        _join_alone({"backend": backend, "timeout": _timeout})


def _join_alone(options: dict[str, Any]) -> None:
    dist.init_process_group(**options, store=dist.HashStore(), rank=0, world_size=1)


def _own_gpu(local_rank: int, visible: int) -> torch.device:
    """That of a rank: the one of its number, or the only one that it is shown, as Slurm does with a GPU for each task."""
    if visible > 1 and local_rank >= visible:
        raise UserError(
            f"rank {local_rank} of this host (LOCAL_RANK) has no GPU: {visible} are visible (CUDA_VISIBLE_DEVICES). Start "
            "one rank for each of them."
        )
    return torch.device("cuda", local_rank if visible > 1 else 0)


def leave(*, failed: bool = False) -> None:
    """Leave the group, after what holds on to it has let go and all ranks have come here. Does nothing where there is none.

    On errors, `failed`, no other rank is waited for: it may be gone, or wait itself for what will never come."""
    while _before_leaving:
        _before_leaving.pop()()
    gc.collect()  # what is left of it in circles of references
    if not dist.is_initialized():
        return
    if failed and dist.get_world_size() > 1:
        _keep_for_ever()
        return
    if dist.get_world_size() > 1:
        try:
            dist.barrier()  # no rank has work under way; at most `timeout`
        except Exception:
            _keep_for_ever()
            raise
        time.sleep(_SETTLE_SECONDS)
    # The destructor joins the group's threads, and one of them may be about to release a tensor, for which it needs the
    # interpreter. The last reference must therefore be Python's, which gives the interpreter away meanwhile. DDP's reducer,
    # as the last, does not: engines are closed before.
    dist.destroy_process_group()


def _keep_for_ever() -> None:
    """Nobody's reference to a group is the last one from now on, so that its end, which waits for the work under way, never
    comes: not even at the exit, where the system takes it all."""
    for group in distributed_c10d._world.pg_map:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


@contextmanager
def joined(timeout: timedelta) -> Iterator[torch.device]:
    """Inside, the group of all ranks; it is left whatever ends the work. Gives this rank's device."""
    device = join(timeout)
    try:
        yield device
    except BaseException:
        leave(failed=True)
        raise
    leave()


def before_leaving(release: Callable[[], None]) -> None:
    """Call `release` when the group is left: whoever keeps something of the group gives it back then."""
    _before_leaving.append(release)


def store() -> dist.Store:
    """What the ranks have met by: small values by name, seen by all. Only inside a group."""
    return distributed_c10d._get_default_store()


def timeout() -> timedelta:
    """How long a rank waits for another."""
    return _timeout


def world_size(group: Group = None) -> int:
    """Ranks of a group, of all by default; 1 outside a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    """This process in a group, in that of all by default; 0 outside a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0
