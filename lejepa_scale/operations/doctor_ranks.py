"""Whether ranks that have been started together can train together: they meet, agree, see the same files, have the same
time, and sum right."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from lejepa_scale.config import Config, dump
from lejepa_scale.data.io.reader import expand
from lejepa_scale.errors import UserError
from lejepa_scale.operations.doctor import CLOCK_SECONDS, SHOWN, Finding
from lejepa_scale.operations.versions import installed
from lejepa_scale.parallel import collectives, process_group

_REDUCED = 16 * 2**20  # bytes summed over ranks to see how fast


def of_all_ranks(config: Config | None = None) -> Iterator[Finding]:
    """What ranks have to tell one another; every rank calls, inside a group, and rank 0's findings are those of all."""
    hosts = collectives.gather_objects(socket.gethostname())
    yield Finding("ok", "ranks", f"{len(hosts)} on {len(set(hosts))} host{'s' * (len(set(hosts)) > 1)} have met")
    here: dict[str, object] = {
        name: installed(name) for name in ("torch", "deepspeed", "lejepa_scale", "timm", "numpy")
    }
    if config is not None:
        here["configuration"] = hashlib.blake2b(dump(config).encode(), digest_size=6).hexdigest()
    yield the_same(collectives.gather_objects(here), hosts)
    collectives.barrier()
    yield clocks(collectives.gather_objects(time.time()), hosts)
    yield sums()
    if config is not None:
        yield shared_folder(config.run.dir, hosts)
        seen = collectives.gather_objects(_sizes(config))
        yield the_same([{"data.shards": one} for one in seen], hosts, "shards", "look at the mounts of these hosts")


def the_same(
    found: Sequence[dict[str, object]], hosts: Sequence[str], what: str = "agreement", mend: str = ""
) -> Finding:
    """Whether every rank has what most have."""
    for name in found[0]:
        values = [one[name] for one in found]
        usual = max(set(map(str, values)), key=lambda text: list(map(str, values)).count(text))
        other = [(rank, value) for rank, value in enumerate(values) if str(value) != usual]
        if other:
            who = ", ".join(f"rank {rank} on {hosts[rank]}: {value}" for rank, value in other[:SHOWN])
            return Finding(
                "wrong",
                what,
                f"{name} is {usual}, but not on {who}",
                mend or "the same environment and files on every host",
            )
    return Finding("ok", what, f"{', '.join(found[0])}: the same on all ranks")


def clocks(times: Sequence[float], hosts: Sequence[str]) -> Finding:
    apart = max(times) - min(times)
    if apart > CLOCK_SECONDS:
        late, early = hosts[times.index(min(times))], hosts[times.index(max(times))]
        return Finding("warning", "clocks", f"{late} is {apart:.0f} s behind {early}", "chrony or ntp on every host")
    return Finding("ok", "clocks", f"{1e3 * apart:.0f} ms apart")


def sums() -> Finding:
    """A sum over ranks, checked, and how fast it goes; the second one, since the first connects."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    ranks, seconds = process_group.world_size(), 0.0
    for _ in range(2):
        x = torch.full((_REDUCED // 4,), float(process_group.rank()), device=device)
        collectives.barrier()
        began = time.monotonic()
        if ranks > 1:
            dist.all_reduce(x)
        value = float(x[-1])  # waits for the device
        seconds = time.monotonic() - began
    right = value == ranks * (ranks - 1) / 2
    rate = 2 * (ranks - 1) / ranks * _REDUCED / max(seconds, 1e-9)
    said = (
        f"{_REDUCED / 2**20:.0f} MiB over {ranks} ranks in {1e3 * seconds:.1f} ms ({rate / 1e9:.2f} GB/s sent by each)"
    )
    if not right:
        return Finding(
            "wrong", "all-reduce", f"{said}: the sum is {value}", "a broken link, GPU or library: try pairs of hosts"
        )
    return Finding("ok", "all-reduce", said)


def shared_folder(folder: Path, hosts: Sequence[str]) -> Finding:
    """Whether what rank 0 writes is seen by all."""
    there = (
        next(path for path in (folder, *folder.resolve().parents) if path.exists())
        if process_group.rank() == 0
        else None
    )
    name = f".lejepa-doctor-{os.getpid()}" if there is not None else ""
    path = collectives.gather_objects(str(there / name) if there is not None else "")[0]
    if there is not None:
        with suppress(OSError):
            Path(path).touch()
    collectives.barrier()
    time.sleep(0.5)  # a network's file system may be a moment late
    seen = collectives.gather_objects(Path(path).exists())
    if there is not None:
        Path(path).unlink(missing_ok=True)
    blind = sorted({host for host, found in zip(hosts, seen, strict=True) if not found})
    if blind:
        said = f"what rank 0 writes in {Path(path).parent} is not seen on {', '.join(blind[:SHOWN])}"
        return Finding(
            "wrong", "run.dir", said, "a file system that all hosts share (run.dir), or checkpoint.dir in a store"
        )
    return Finding("ok", "run.dir", f"{Path(path).parent} is seen by all ranks")


def _sizes(config: Config) -> str:
    """How many shards this rank sees, and how large the first ones are."""
    with suppress(UserError, OSError):
        found = [url for source in config.data.shards for url in expand(source.shards)]
        sizes = [Path(str(url)).stat().st_size for url in found[:100] if Path(str(url)).exists()]
        return f"{len(found)} shards, {sum(sizes)} bytes in the first {len(sizes)}"
    return "not seen"
