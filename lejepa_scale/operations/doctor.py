"""Whether a machine can train, before it tries: what is installed, what the system allows, where things lie. Changes nothing
but a file that it removes again. What ranks have to tell one another is in doctor_ranks.py."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lejepa_scale.addresses import is_remote
from lejepa_scale.checkpoint.places import place
from lejepa_scale.config import Config, check_world
from lejepa_scale.cost.flops import meta_model
from lejepa_scale.data.io.reader import expand
from lejepa_scale.engine import extensions
from lejepa_scale.errors import UserError
from lejepa_scale.operations import versions
from lejepa_scale.parallel import launch, threads
from lejepa_scale.training import lock

Level = Literal["ok", "warning", "wrong"]
_FILES = 4096  # that a process may have open: shards, sockets, workers
CLOCK_SECONDS = 2.0  # between clocks, whose times are compared
_SHARED_MEMORY = 2**30  # bytes of /dev/shm, through which workers send batches
_SLOW_BYTES = 100e6  # a second, below which a disk is told of
_SAMPLE = 32 * 2**20  # bytes written to see how fast
SHOWN = 4  # ranks or hosts that a line lists


@dataclass(frozen=True)
class Finding:
    """One thing looked at. mend: what to do, where something is not as it should be."""

    level: Level
    what: str
    said: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.level:<9}{self.what:<16}{self.said}" + (f"\n{'':25}mend: {self.mend}" if self.mend else "")


def of_this_host(config: Config | None = None) -> Iterator[Finding]:
    """What can be seen without other ranks; with a configuration, what it needs of the host."""
    yield installed(config)
    yield gpus(torch.cuda.device_count() if torch.cuda.is_available() else 0, _ranks_here())
    yield cores(threads.cores(), _ranks_here(), config.data.workers if config else 0)
    yield open_files(_limit())
    yield shared_memory(Path("/dev/shm"))
    yield compiler()
    yield bytecode(Path(torch.__file__))
    yield environment(dict(os.environ), _ranks_here())
    yield build_locks(extensions.stale_locks())
    if config is not None:
        yield run_directory(config)
        yield disk(config)
        yield shards(config)
        yield ranks_of(config)


def installed(config: Config | None) -> Finding:
    found = {name: versions.installed(name) for name in ("torch", "timm", "deepspeed", "xformers")}
    said = ", ".join(f"{name} {text}" for name, text in found.items() if text)
    if config is not None and config.engine.name.startswith("zero") and not found["deepspeed"]:
        return Finding(
            "wrong", "versions", f"{said}; no deepspeed", "pip install 'lejepa_scale[zero]', or engine.name=fsdp"
        )
    series = ".".join((found["torch"] or "").split(".")[:2])
    if series not in versions.TORCH_TRIED:
        tried = " and ".join(versions.TORCH_TRIED)
        return Finding(
            "warning", "versions", f"{said}; tried with torch {tried}", "run the tests: pytest -m 'not slow'"
        )
    return Finding("ok", "versions", said)


def gpus(visible: int, ranks: int) -> Finding:
    if not visible:
        return Finding("ok", "GPUs", "none: this trains on the CPU")
    names = {torch.cuda.get_device_name(i) for i in range(visible)}
    said = f"{visible} x {', '.join(sorted(names))}"
    if ranks > visible > 1:
        return Finding("wrong", "GPUs", f"{said} for {ranks} ranks", "start one rank for each GPU")
    taken = []
    for i in range(visible):
        free, total = torch.cuda.mem_get_info(i)
        if free < 0.95 * total:
            taken.append(f"GPU {i}: {(total - free) / 2**30:.1f} of {total / 2**30:.0f} GiB are taken")
    if taken:
        return Finding("warning", "GPUs", f"{said}; {'; '.join(taken)}", "nvidia-smi shows by whom")
    if len(names) > 1:
        return Finding("warning", "GPUs", f"{said}: not all are the same", "the slowest sets the pace")
    return Finding("ok", "GPUs", said)


def cores(count: int, ranks: int, workers: int) -> Finding:
    """workers: data.workers, of each rank."""
    wanted = ranks * (1 + workers)
    said = f"{count} for {ranks} rank{'s' * (ranks > 1)} and {ranks * workers} loader workers"
    if wanted > 2 * count:
        return Finding("warning", "cores", said, f"data.workers={max(1, count // ranks - 1)}")
    return Finding("ok", "cores", said)


def open_files(limit: int) -> Finding:
    if limit < _FILES:
        mend = f"ulimit -n {16 * _FILES} (Slurm: PropagateResourceLimits; Docker: --ulimit nofile={16 * _FILES})"
        return Finding("warning", "open files", f"{limit:,} at most for a process", mend)
    return Finding("ok", "open files", f"{limit:,} at most for a process")


def shared_memory(path: Path) -> Finding:
    if not path.exists():
        return Finding("ok", "shared memory", "this system has no /dev/shm")
    free = shutil.disk_usage(path).free
    if free < _SHARED_MEMORY:
        mend = "docker run --shm-size=16g, or in Kubernetes an emptyDir with medium: Memory at /dev/shm"
        return Finding("warning", "shared memory", f"{free / 2**20:,.0f} MiB are free in {path}", mend)
    return Finding("ok", "shared memory", f"{free / 2**30:.1f} GiB are free in {path}")


def compiler() -> Finding:
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if found is None:
        return Finding(
            "warning",
            "compiler",
            "no C++ compiler: CPU steps are slower",
            "apt install g++, or conda install cxx-compiler",
        )
    return Finding("ok", "compiler", f"{found} at {shutil.which(found)}")


def bytecode(source: Path) -> Finding:
    """source: a module of torch that this process has loaded. A start loads thousands such."""
    kept = Path(importlib.util.cache_from_source(str(source)))
    if kept.exists():
        return Finding("ok", "bytecode", f"kept in {kept.parent}")
    mend = f"once, for all: {shlex.join([sys.executable, '-m', 'compileall', '-qq', str(source.parents[1])])}"
    if sys.dont_write_bytecode:
        mend = f"unset PYTHONDONTWRITEBYTECODE, or {mend}"
    return Finding("warning", "bytecode", f"none of {source}: each start compiles torch and the rest anew", mend)


def environment(given: dict[str, str], ranks: int) -> Finding:
    """Variables that change what a run does."""
    shown = {
        name: value for name, value in given.items() if name.startswith(("NCCL_", "TORCH_NCCL", "CUDA_VISIBLE", "OMP_"))
    }
    said = ", ".join(f"{name}={value}" for name, value in sorted(shown.items())) or "nothing unusual is set"
    if given.get("NCCL_P2P_DISABLE") == "1" or given.get("NCCL_IB_DISABLE") == "1":
        return Finding(
            "warning",
            "environment",
            said,
            "NCCL_P2P_DISABLE and NCCL_IB_DISABLE make ranks talk over slow paths: unset them",
        )
    if ranks > 1 and "OMP_NUM_THREADS" not in given and not torch.cuda.is_available():
        return Finding("warning", "environment", said, "OMP_NUM_THREADS=1: each rank would take every core")
    return Finding("ok", "environment", said)


def build_locks(found: Sequence[Path]) -> Finding:
    if found:
        said = f"{len(found)} left by builds that were killed: {found[0]}"
        return Finding(
            "warning",
            "build locks",
            said,
            f"rm {' '.join(map(str, found[:SHOWN]))} (engine.name=zero* does so itself)",
        )
    return Finding("ok", "build locks", "none is stale")


def run_directory(config: Config) -> Finding:
    run = config.run.dir
    try:
        held = lock.seen(run)
    except UserError as error:
        return Finding("wrong", "run.dir", str(error), "see who may read it, or give another run.dir")
    if held is not None:
        who, alive = held
        if alive:
            return Finding(
                "wrong", "run.dir", f"{run} is trained in by {who}", f"touch {run / 'stop'}, or another run.dir"
            )
        return Finding(
            "warning",
            "run.dir",
            f"{run} has a lock of {who}, who gives no sign of life",
            "the next start takes it over",
        )
    return Finding("ok", "run.dir", f"{run} is free")


def disk(config: Config) -> Finding:
    """Room for the checkpoints that will be kept, how fast they are written, and whether files have this clock's time."""
    kept = config.checkpoint
    root = config.run.dir if kept.dir is None else place(kept.dir)
    if not isinstance(root, Path):
        return Finding("ok", "checkpoints", f"in {kept.dir}")
    there = next(path for path in (root, *root.resolve().parents) if path.exists())
    size = 12.0 * sum(p.numel() for p in meta_model(config).parameters())
    needed, free = size * (kept.keep + 1), shutil.disk_usage(there).free
    try:
        rate, skew = _written(there)
    except OSError as error:
        return Finding(
            "wrong", "checkpoints", f"{there} cannot be written: {error.strerror}", "another run.dir or checkpoint.dir"
        )
    said = f"{size / 1e9:.2f} GB each, {free / 1e9:,.0f} GB are free, {rate / 1e6:,.0f} MB/s to {there}"
    if free < needed:
        return Finding(
            "wrong",
            "checkpoints",
            said,
            f"checkpoint.keep={kept.keep} of them need {needed / 1e9:,.1f} GB: free some, or keep fewer",
        )
    if abs(skew) > CLOCK_SECONDS:
        return Finding(
            "warning",
            "checkpoints",
            f"{said}; the file server's clock is {skew:+.0f} s from this one",
            "chrony or ntp on both",
        )
    if rate < _SLOW_BYTES:
        return Finding(
            "warning",
            "checkpoints",
            said,
            "checkpoint.mode=async, so that steps go on meanwhile, or a faster place (checkpoint.dir)",
        )
    return Finding("ok", "checkpoints", said)


def _written(folder: Path) -> tuple[float, float]:
    """Bytes a second, and by how much a file's time is ahead of this clock."""
    data = os.urandom(_SAMPLE)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".lejepa-doctor-") as file:
        began = time.monotonic()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.monotonic() - began
        return len(data) / max(seconds, 1e-9), os.stat(file.name).st_mtime - time.time()


def shards(config: Config) -> Finding:
    try:
        found = [url for source in config.data.shards for url in expand(source.shards)]
    except UserError as error:
        return Finding("wrong", "data.shards", str(error), "data.shards must name shards that this host sees")
    files = [Path(str(url)) for url in found if not is_remote(url)]
    if missing := [path for path in files if not path.exists()]:
        said = f"{len(missing):,} of {len(found):,} shards are not there: {missing[0]}"
        return Finding("wrong", "data.shards", said, "data.shards must name shards that this host sees")
    with suppress(OSError):
        if files:
            began = time.monotonic()
            with files[0].open("rb") as file:
                read = len(file.read(_SAMPLE))
            rate = read / max(time.monotonic() - began, 1e-9)
            return Finding(
                "ok",
                "data.shards",
                f"{len(found):,} shards; {rate / 1e6:,.0f} MB/s from the first (perhaps out of the cache)",
            )
    return Finding("ok", "data.shards", f"{len(found):,} shards, in a store")


def ranks_of(config: Config) -> Finding:
    try:
        plan = check_world(config, launch.ranks())
    except UserError as error:
        return Finding("wrong", "batch", str(error), "another number of ranks, or the keys that it names")
    return Finding(
        "ok", "batch", f"{plan.global_batch:,} = {plan.micro_batch} x {plan.ranks} ranks x {plan.accumulation}"
    )


def _ranks_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _limit() -> int:
    try:
        import resource
    except ImportError:  # Windows has none
        return _FILES
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
