"""The store by which the ranks of one start meet. torchrun keeps one for all its attempts (torch 2.13), and what a dead
attempt wrote there would be read by the next: addresses that nobody answers at. Its count of restarts does not help, since
the hosts' agents count apart. So rank 0 names each start, and tells those that ask: a dead rank 0 tells nobody. And
torchrun's store dies with torchrun: ranks that outlive it, to save, need one of their own, which rank 0 keeps."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from lejepa_scale.errors import Exit, UserError

_ROOT = "starts"
_LOOK_SECONDS = 0.02


def store_of_this_start(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store, this rank, and the number of ranks, as the launcher's environment has them. Every rank calls. Raises
    UserError where ranks have not come within `timeout`."""
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    if world > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = kept_by_rank_zero(store, named(store, rank, world, timeout), rank, world, timeout)
    return store, rank, world


def kept_by_rank_zero(store: dist.Store, name: str, rank: int, world: int, timeout: timedelta) -> dist.TCPStore:
    """A store that lives in rank 0, whose address the others read in `store`."""
    key = f"{name}/store"
    if rank == 0:
        # rank 0 asks it by an address that stays when a network goes
        own = dist.TCPStore("127.0.0.1", 0, world, is_master=True, timeout=timeout, wait_for_workers=False)
        store.set(key, f"{_host_of_this_rank()} {own.port}")
        return own
    host, port = store.get(key).decode().split()
    return dist.TCPStore(host, int(port), world, is_master=False, timeout=timeout)


def _host_of_this_rank() -> str:
    """By what other hosts reach this one: MASTER_ADDR where that is here, else the address that this one reaches it from."""
    master = os.environ["MASTER_ADDR"]
    with socket.create_connection((master, int(os.environ["MASTER_PORT"])), timeout=10) as connection:
        own, of_master = connection.getsockname()[0], connection.getpeername()[0]
    return master if own == of_master or ipaddress.ip_address(own.partition("%")[0]).is_loopback else own


def named(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """The prefix of this start in a store that others have used and left."""
    limit = timeout.total_seconds()
    if rank:
        mine = secrets.token_hex(8)
        store.set(f"{_ROOT}/asked/{store.add(f'{_ROOT}/asked', 1)}", mine)
        try:
            store.wait([f"{_ROOT}/told/{mine}"], timeout)
        except dist.DistError as error:
            raise _late(f"rank 0 has told rank {rank} nothing", limit) from error
        name = store.get(f"{_ROOT}/told/{mine}").decode()
        store.add(f"{name}/here", 1)
        return name
    name, told, began = f"{_ROOT}/{secrets.token_hex(8)}", 0, time.monotonic()
    while (here := store.add(f"{name}/here", 0)) < world - 1:
        # what dead ranks have asked is answered too, which nobody reads
        while told < store.add(f"{_ROOT}/asked", 0) and store.check([f"{_ROOT}/asked/{told + 1}"]):
            told += 1
            store.set(f"{_ROOT}/told/{store.get(f'{_ROOT}/asked/{told}').decode()}", name)
        if time.monotonic() - began > limit:
            raise _late(f"{world - 1 - here} of {world} ranks have not come", limit)
        time.sleep(_LOOK_SECONDS)
    return name


def _late(what: str, limit: float) -> UserError:
    return UserError(
        f"{what} in {limit:.0f} s (engine.timeout_minutes): look whether all hosts have started, and reach the first one at "
        "MASTER_ADDR and MASTER_PORT.",
        Exit.FAULT,
    )
