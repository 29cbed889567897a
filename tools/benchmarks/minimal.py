"""The minimal LeJEPA recipe (arXiv 2511.08544, Algorithms 1 and 2), written as the paper describes it: torchvision's
transforms on Pillow images in a DataLoader, one forward pass per view, the textbook SIGReg, AdamW."""

from __future__ import annotations

import tarfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from statistics import median

import timm
import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from benchmarks.input import PillowViews
from lejepa_scale.config import Config
from lejepa_scale.model.lejepa import build_encoder

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
    """Encoder and MLP projector with plain batch normalization: a list of views [B, 3, S, S] -> [V, B, D]."""

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


# --- Its steps


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
        a = directions(self.count, dim, objective.sigreg.num_slices)
        num_global = self.config.data.views.global_.count
        numbers = num_global, objective.lambda_, a, objective.sigreg.t_max, objective.sigreg.knots
        loss = lejepa(z.float(), *numbers, self.arrangement.ranks)
        self.watch.lap("forward")
        self.optimizer.zero_grad()
        loss.backward()
        self.watch.lap("backward")
        self.optimizer.step()
        self.count += 1
        self.watch.lap("update")
