"""Whole training steps, from shards to updated weights: what the trainer runs against the minimal recipe, in turns in
one run, on all cores of this machine."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.fed import Fed
from benchmarks.measure import Row
from benchmarks.minimal import Arrangement, Minimal
from benchmarks.ports import free_port
from lejepa_scale.addresses import is_remote
from lejepa_scale.config import Config, check_world, load_config
from lejepa_scale.cpu.allocator import keep_memory
from lejepa_scale.data.io.reader import expand
from lejepa_scale.data.make import sources
from lejepa_scale.data.make.writer import write_shards
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import collectives, launch, process_group
from lejepa_scale.parallel.threads import cores

TARGET = 2.0  # times the minimal recipe's images/s, in the quickstart
_WARM = 3  # steps of a turn that are not timed: workers start and fill their queues
_SCENES, _SCENE_PX = 8000, 48  # as `make quickstart` writes them


class Elsewhere:
    """The recipe in processes of its own, one beside each rank of ours: neither side's allocator, threads or process group
    is the other's. A rank that an arrangement does not use waits."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()

    def begin(self, config: Config, shards: list[str], arrangement: Arrangement) -> None:
        """Another arrangement, at its first weights."""
        self.arrangement = arrangement
        port = collectives.on_rank_zero(free_port)
        self.used = process_group.rank() < arrangement.ranks
        if self.used:
            self._ask(config, shards, arrangement, process_group.rank(), port)

    def turn(self, steps: int) -> float:
        """Seconds of some steps, on rank 0 (0 elsewhere)."""
        return float(self._ask(steps)) if self.used else 0.0

    def medians(self) -> dict[str, float]:
        """Of the steps since `begin`, on rank 0."""
        return self._ask("medians") if self.used else {}

    def close(self) -> None:
        self.pipe.close()
        self.process.join(60)

    def _ask(self, *request: Any) -> Any:
        self.pipe.send(request)
        answer = self.pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(pipe: Connection) -> None:
    """Answer the requests of an `Elsewhere` until it is gone."""
    minimal: Minimal | None = None
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            if len(request) > 1:
                config, shards, arrangement, rank, port = request
                process_group.leave()
                if arrangement.ranks > 1:
                    store = dist.TCPStore("127.0.0.1", port, arrangement.ranks, is_master=rank == 0)
                    dist.init_process_group("gloo", store=store, rank=rank, world_size=arrangement.ranks)
                torch.set_num_threads(arrangement.threads)
                minimal = Minimal(config, shards, arrangement, rank)
                pipe.send(None)
                continue
            assert minimal is not None
            pipe.send(minimal.watch.medians() if request == ("medians",) else _timed(minimal.steps(), *request))
        except Exception as error:
            pipe.send(error)


def against(
    path: Path, overrides: Sequence[str] = (), rounds: int = 9, *, steps: int = 6, target: float | None = TARGET
) -> Iterator[Row]:
    """Rows of images/s: the recipe under each arrangement that this machine offers, then ours in turns of `steps` steps with
    the recipe at its best in one process, as it was published, and at its best on as many ranks as ours has, which its
    authors left to others. Every rank iterates to the end; rank 0's rows are those to print.

    Where the configuration's shards are absent, scenes like the quickstart's are written to a temporary folder. The target
    is for the recipe as published; without one there is no verdict.
    """
    config = load_config(path, list(overrides))
    check_world(config, launch.ranks())
    with ExitStack() as stack:
        published = stack.enter_context(closing(Elsewhere()))
        on_ranks = stack.enter_context(closing(Elsewhere())) if launch.ranks() > 1 else None
        keep_memory()  # as launchers/train.py does
        joined = not dist.is_initialized()
        if joined:
            process_group.join(timedelta(minutes=config.engine.timeout_minutes))
        ranks = process_group.world_size()
        config = _with_shards(config, Path(stack.enter_context(tempfile.TemporaryDirectory())), list(overrides), path)
        shards = _local_shards(config)
        tried: dict[Arrangement, float] = {}
        for arrangement in arrangements(cores(), ranks):
            published.begin(config, shards, arrangement)
            tried[arrangement] = _rate(published.turn(steps), steps, config)
            yield {"case": f"minimal recipe: {arrangement}", "images/s": tried[arrangement]}
        rivals = {"minimal": published} | ({"minimal on ranks": on_ranks} if on_ranks else {})
        for name, rival in rivals.items():
            fitting = [a for a in tried if (a.ranks == 1) == (name == "minimal")]
            rival.begin(config, shards, max(fitting, key=tried.__getitem__))
        torch.set_num_threads(max(1, cores() // ranks))
        ours, parts = Fed(config, torch.device("cpu")), list[dict[str, float]]()
        rates: dict[str, list[float]] = {"ours": [], **{name: [] for name in rivals}}
        for _ in range(rounds):
            rates["ours"].append(_rate(_timed(_steps(ours, parts), steps), steps, config))
            for name, rival in rivals.items():
                rates[name].append(_rate(rival.turn(steps), steps, config))
        yield {"case": "ours, parts of a step", **_medians(parts)}
        for name, rival in rivals.items():
            yield {"case": f"{name}, parts of a step", **rival.medians()}
        for name, rival in rivals.items():
            yield _verdict(config, rival.arrangement, rates["ours"], rates[name], target if name == "minimal" else None)
        collectives.barrier()
    if joined:
        process_group.leave()


def _steps(ours: Fed, parts: list[dict[str, float]]) -> Generator[None, None, None]:
    """One step for each `next`, on a loader of its own; the milliseconds of its parts."""
    feed = ours.feed()
    while True:
        ours.step(feed)
        parts.append(ours.trial.phases.read())
        yield


def _medians(parts: list[dict[str, float]]) -> Row:
    """Of the parts of the steps of all turns, but for the first, which waited for nothing."""
    return {f"{name} ms": round(median(step[name] for step in parts[1:]), 1) for name in parts[-1]}


def arrangements(threads: int, ranks: int) -> list[Arrangement]:
    """One process on all cores, with none, half as many or as many workers; DDP on all ranks, with none or one."""
    single = [Arrangement(1, threads, workers) for workers in sorted({0, threads // 2, threads})]
    each = max(1, threads // ranks)
    return single + [Arrangement(ranks, each, workers) for workers in range(2) if ranks > 1]


def _timed(steps: Generator[None, None, None], count: int) -> float:
    """Seconds of a turn, which ends when every rank of the process group has. What loads the steps is started and
    stopped with the turn."""
    for _ in range(_WARM):
        next(steps)
    collectives.barrier()
    started = time.perf_counter()
    for _ in range(count):
        next(steps)
    collectives.barrier()
    seconds = time.perf_counter() - started
    steps.close()
    return seconds


def _rate(seconds: float, count: int, config: Config) -> float:
    """Images/s by rank 0's clock, on every rank."""
    return count * config.train.global_batch / collectives.on_rank_zero(lambda: seconds)


def _verdict(config: Config, theirs: Arrangement, ours: list[float], minimal: list[float], target: float | None) -> Row:
    ratios = sorted(a / b for a, b in zip(ours, minimal, strict=True))
    engine, views = config.engine, config.data.views
    row: Row = {
        "case": f"{config.model.encoder}, {views.global_.count} x {views.global_.size} + {views.local.count} x "
        f"{views.local.size} px, batch {config.train.global_batch}, {engine.precision}: {engine.name} on "
        f"{process_group.world_size()} ranks against {theirs}",
        "rounds": len(ratios),
        "ours images/s": median(ours),
        "minimal images/s": median(minimal),
        "ours / minimal": median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
    }
    if target is not None:
        row |= {"target": target, "ok": median(ratios) >= target}
    return row


def _with_shards(config: Config, folder: Path, overrides: list[str], path: Path) -> Config:
    """The configuration, on scenes of its own where its shards are absent."""
    patterns = [pattern for source in config.data.shards for pattern in source.shards]
    if any(is_remote(p) or Path(p).exists() or any(c in p for c in "*?[{") for p in patterns):
        return config

    def write() -> str:
        written = sources.scenes(_SCENES, _SCENE_PX, 0, "jpg", 92)
        write_shards(written.samples, folder, per_shard=1000, total=_SCENES, classes=written.classes, description={})
        return str(folder)

    return load_config(path, [*overrides, f"data.shards={collectives.on_rank_zero(write)}"])


def _local_shards(config: Config) -> list[str]:
    shards: list[str] = [shard for source in config.data.shards for shard in expand(source.shards)]
    if any(is_remote(shard) for shard in shards):
        raise UserError("the minimal recipe reads tar files of this machine; give such data.shards.")
    return shards
