"""Whole training steps, from shards to updated weights, against the minimal LeJEPA recipe (arXiv 2511.08544, Algorithms 1
and 2), written as the paper describes it: torchvision's transforms on Pillow images in a DataLoader, one forward pass per
view, the textbook SIGReg, AdamW. Ours is what train.py runs. They take turns in one run, on all cores of this machine."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, repeat
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from benchmarks.input import PillowViews
from benchmarks.measure import Row
from lejepa_scale import distributed
from lejepa_scale.allocator import keep_memory
from lejepa_scale.config import Config, check_world, load
from lejepa_scale.data import Batch, Loader, ahead, open_sources, sources
from lejepa_scale.data.stream import expand, is_remote
from lejepa_scale.data.writer import write_shards
from lejepa_scale.engine import build_engine
from lejepa_scale.errors import UserError
from lejepa_scale.model import build
from lejepa_scale.model.lejepa import build_encoder
from lejepa_scale.probe import OnlineProbe

TARGET = 2.0  # times the minimal recipe's images/s, in the quickstart
_WARM = 3  # steps of a turn that are not timed: workers start and fill their queues
_SCENES, _SCENE_PX = 8000, 48  # as `make quickstart` writes them
_IMAGES = (".jpg", ".jpeg", ".png", ".webp")

# --- The recipe


class ShardImages(Dataset[list[Tensor]]):
    """Every image of local tar shards as its views, [3, S, S] each."""

    def __init__(self, shards: Sequence[str], transform: Callable[[bytes], list[Tensor]]) -> None:
        self.transform, self.members = transform, []
        for shard in shards:
            with tarfile.open(shard) as tar:
                self.members += [(shard, m.offset_data, m.size) for m in tar if m.name.lower().endswith(_IMAGES)]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> list[Tensor]:
        shard, offset, size = self.members[index]
        with open(shard, "rb") as file:
            file.seek(offset)
            return self.transform(file.read(size))


class Network(nn.Module):
    """Encoder and MLP projector with plain batch normalisation: a list of views [B, 3, S, S] -> [V, B, D]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        encoder, head = build_encoder(config), config.model.projector
        self.backbone = timm.create_model(**encoder.timm_arguments)
        width, layers = encoder.embed_dim, list[nn.Module]()
        for _ in range(head.layers - 1):
            layers += [nn.Linear(width, head.hidden, bias=False), nn.BatchNorm1d(head.hidden), nn.GELU()]
            width = head.hidden
        self.projector = nn.Sequential(*layers, nn.Linear(width, head.dim))

    def forward(self, views: list[Tensor]) -> Tensor:
        return torch.stack([self.projector(self.backbone(view)) for view in views])


def directions(step: int, width: int, count: int) -> Tensor:
    """Unit columns [D, M], the same on every rank."""
    a = torch.randn(width, count, generator=torch.Generator().manual_seed(step))
    return a / a.norm(dim=0)


def sigreg(z: Tensor, a: Tensor, t_max: float, knots: int, ranks: int = 1) -> Tensor:
    """Algorithm 1: the Epps-Pulley statistic of z [N, D] along the columns of a, averaged; N over `ranks` ranks."""
    t = torch.linspace(0, t_max, knots, dtype=z.dtype)
    gaussian = torch.exp(-0.5 * t**2)
    x_t = (z @ a).unsqueeze(2) * t  # [N, M, K]
    characteristic = torch.stack([x_t.cos().mean(0), x_t.sin().mean(0)])
    if ranks > 1:
        characteristic = all_reduce(characteristic) / ranks
    cos, sin = characteristic
    error = ((cos - gaussian) ** 2 + sin**2) * gaussian
    return (2 * torch.trapezoid(error, t, dim=1) * z.shape[0] * ranks).mean()  # both halves of the line


def lejepa(z: Tensor, num_global: int, lambda_: float, a: Tensor, t_max: float, knots: int, ranks: int = 1) -> Tensor:
    """Algorithm 2 for z [V, N, D], the global views first."""
    centre = z[:num_global].mean(0)
    prediction = (centre - z).square().mean()
    regularizer = torch.stack([sigreg(view, a, t_max, knots, ranks) for view in z]).mean()
    return (1 - lambda_) * prediction + lambda_ * regularizer


# --- Both sides as steps


@dataclass
class Stopwatch:
    """Milliseconds of a step's parts."""

    laps: dict[str, list[float]] = field(default_factory=dict)
    last: float = 0.0

    def start(self) -> None:
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.laps.setdefault(part, []).append(1e3 * (now - self.last))
        self.last = now

    def medians(self) -> dict[str, float]:
        return {f"{part} ms": round(median(found), 1) for part, found in self.laps.items()}


@dataclass(frozen=True)
class Arrangement:
    """How the recipe uses the cores: one process of many threads, or DDP on every rank; and its DataLoader's workers."""

    ranks: int
    threads: int
    workers: int

    def __str__(self) -> str:
        place = f"DDP on {self.ranks} ranks" if self.ranks > 1 else "one process"
        return f"{place}, {self.threads} thread{'s' * (self.threads > 1)}, {self.workers} DataLoader workers per rank"


class Minimal:
    """The recipe under one arrangement, on one of its ranks."""

    def __init__(self, config: Config, shards: Sequence[str], arrangement: Arrangement, rank: int) -> None:
        self.config, self.arrangement = config, arrangement
        self.watch, self.count = Stopwatch(), 0
        torch.manual_seed(config.run.seed)
        network = Network(config).train()
        self.network = DistributedDataParallel(network) if arrangement.ranks > 1 else network
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        dataset = ShardImages(shards, PillowViews(config.data.views, config.data.augment))
        self.loader = DataLoader(
            torch.utils.data.Subset(dataset, range(rank, len(dataset), arrangement.ranks)),
            batch_size=config.train.global_batch // arrangement.ranks,
            shuffle=True,
            drop_last=True,
            num_workers=arrangement.workers,
        )

    def steps(self) -> Generator[None, None, None]:
        """One step for each `next`."""
        batches = chain.from_iterable(repeat(self.loader))
        while True:
            self.watch.start()
            views = next(batches)
            self.watch.lap("waiting for images" if self.arrangement.workers else "reading, decoding, transforms")
            self.step(views)
            yield

    def step(self, views: list[Tensor]) -> None:
        objective, dim = self.config.objective, self.config.model.projector.dim
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.engine.precision == "bf16"):
            z = self.network(views)
        a = directions(self.count, dim, objective.num_slices)
        num_global = self.config.data.views.global_.count
        numbers = num_global, objective.lambda_, a, objective.t_max, objective.knots
        loss = lejepa(z.float(), *numbers, self.arrangement.ranks)
        self.watch.lap("forward")
        self.optimizer.zero_grad()
        loss.backward()
        self.watch.lap("backward")
        self.optimizer.step()
        self.count += 1
        self.watch.lap("update")


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
        port = distributed.on_rank_zero(_free_port)
        self.used = distributed.rank() < arrangement.ranks
        if self.used:
            self._ask(config, shards, arrangement, distributed.rank(), port)

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
                distributed.stop()
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


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Ours:
    """The trainer's step on every rank: the same calls in the same order as train.py's loop, the online probe included."""

    def __init__(self, config: Config) -> None:
        self.config, self.plan = config, check_world(config, distributed.world_size())
        self.device, self.watch, self.count = torch.device("cpu"), Stopwatch(), 0
        if self.plan.accumulation > 1:
            raise UserError("the step against the minimal recipe is measured without gradient accumulation.")
        distributed.on_rank_zero(lambda: open_sources(config.data).num_samples)
        self.sources = open_sources(config.data, build=False)
        self.engine = build_engine(config, self.plan, lambda: build(config), self.device, None)
        self.probe = None
        if config.probe.enabled and (classes := self.sources.num_classes) > 1:
            width = self.engine.module.encoder.embed_dim
            self.probe = OnlineProbe(width, classes, config.probe.lr, config.run.seed, self.device)

    def steps(self) -> Generator[None, None, None]:
        loader = Loader(
            self.sources, self.config, self.plan, rank=distributed.rank(), first_step=self.count, pin_memory=False
        )
        batches = ahead(iter(loader), self.device)
        while True:
            self.watch.start()
            self.step(next(batches))
            yield

    def step(self, batch: Batch) -> None:
        distributed.all_reduce_sum(torch.tensor([len(batch.skipped), 0]))
        self.watch.lap("waiting for images" if self.config.data.workers else "reading, decoding, crops")
        views = batch.augmented(self.device)
        self.watch.lap("colours")
        out = self.engine.forward(views, self.count)
        self.watch.lap("forward")
        self.engine.backward(out["loss"], True)
        self.watch.lap("backward")
        if self.probe is not None:
            self.probe.step(out["features"], batch.labels)
        self.watch.lap("probe")
        self.engine.step(self.config.optim.lr, self.config.optim.weight_decay)
        distributed.any_rank(False, self.device)
        self.count += 1
        self.watch.lap("update")


# --- The race


def against(
    path: Path, overrides: Sequence[str] = (), rounds: int = 9, *, steps: int = 6, target: float | None = TARGET
) -> Iterator[Row]:
    """Rows of images/s: the recipe under each arrangement that this machine offers, then ours in turns of `steps` steps with
    the recipe at its best in one process, as it was published, and at its best on as many ranks as ours has, which its
    authors left to others. Every rank iterates to the end; rank 0's rows are those to print.

    Where the configuration's shards are absent, scenes like the quickstart's are written to a temporary folder. The target
    is for the recipe as published; without one there is no verdict.
    """
    config = load(path, list(overrides))
    check_world(config, distributed.launched_ranks())
    with ExitStack() as stack:
        published = stack.enter_context(closing(Elsewhere()))
        on_ranks = stack.enter_context(closing(Elsewhere())) if distributed.launched_ranks() > 1 else None
        keep_memory()  # as launchers/train.py does
        joined = not dist.is_initialized()
        if joined:
            distributed.start(timedelta(minutes=config.engine.timeout_minutes))
        ranks = distributed.world_size()
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
        ours = Ours(config)
        rates: dict[str, list[float]] = {"ours": [], **{name: [] for name in rivals}}
        for _ in range(rounds):
            rates["ours"].append(_rate(_timed(ours.steps(), steps), steps, config))
            for name, rival in rivals.items():
                rates[name].append(_rate(rival.turn(steps), steps, config))
        yield {"case": "ours, parts of a step", **ours.watch.medians()}
        for name, rival in rivals.items():
            yield {"case": f"{name}, parts of a step", **rival.medians()}
        for name, rival in rivals.items():
            yield _verdict(config, rival.arrangement, rates["ours"], rates[name], target if name == "minimal" else None)
        distributed.barrier()
    if joined:
        distributed.stop()


def cores() -> int:
    """Of this machine, that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    distributed.barrier()
    started = time.perf_counter()
    for _ in range(count):
        next(steps)
    distributed.barrier()
    seconds = time.perf_counter() - started
    steps.close()
    return seconds


def _rate(seconds: float, count: int, config: Config) -> float:
    """Images/s by rank 0's clock, on every rank."""
    return count * config.train.global_batch / distributed.on_rank_zero(lambda: seconds)


def _verdict(config: Config, theirs: Arrangement, ours: list[float], minimal: list[float], target: float | None) -> Row:
    ratios = sorted(a / b for a, b in zip(ours, minimal, strict=True))
    engine, views = config.engine, config.data.views
    row: Row = {
        "case": f"{config.model.encoder}, {views.global_.count} x {views.global_.size} + {views.local.count} x "
        f"{views.local.size} px, batch {config.train.global_batch}, {engine.precision}: {engine.name} on "
        f"{distributed.world_size()} ranks against {theirs}",
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

    return load(path, [*overrides, f"data.shards={distributed.on_rank_zero(write)}"])


def _local_shards(config: Config) -> list[str]:
    shards = [shard for source in config.data.shards for shard in expand(source.shards)]
    if any(is_remote(shard) for shard in shards):
        raise UserError("the minimal recipe reads tar files of this machine; give such data.shards.")
    return shards
