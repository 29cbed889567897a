"""What ours is raced against, in the plain form of each paper: SimCLR, VICReg, DINO, and the minimal LeJEPA recipe. One
process, one forward pass a view; constants are the papers', but for sizes that were made for far larger models."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import minimal
from lejepa_scale.config import Augment, Config, Optim, ViewGroup, Views
from lejepa_scale.model.lejepa import build_encoder

_SIMCLR_COLOURS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "blur": 0.0, "solarize": 0.0}


class Method(nn.Module, ABC):
    """An encoder and what trains it. `encoder` is timm's model, which is scored.

    config: whose encoder and image size all contestants share; each has its own views, colours, batch and optimizer.
    """

    batch = 128
    warmup = 0.05  # of all steps
    clip: float | None = None
    head_dim: int | None = None  # of a linear layer after the pooling, whose output is the feature; unset: the recipe's

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        model = config.model.model_copy(update={"head_dim": self.head_dim or config.model.head_dim})
        made = build_encoder(config.model_copy(update={"model": model}))
        self.encoder: nn.Module = timm.create_model(**made.timm_arguments)
        self.width = made.embed_dim

    @abstractmethod
    def views(self) -> Views:
        """The crops of an image."""

    def augment(self) -> Augment:
        """What is done to their colours, at images too small for blur."""
        return Augment(**_SIMCLR_COLOURS)

    @abstractmethod
    def loss(self, views: list[Tensor], step: int, progress: float) -> Tensor:
        """Of a batch of views [B, 3, S, S], global ones first. progress: the share of the steps that is over."""

    def optim(self) -> Optim:
        """Of ours, but for the batch: AdamW with the same weight decay."""
        return self.config.optim.model_copy(update={"final_lr_ratio": 0.0})

    def after(self, progress: float) -> None:
        """What follows an update of the weights."""

    def _global(self, count: int, scale: tuple[float, float]) -> ViewGroup:
        return ViewGroup(count=count, size=self.config.data.views.global_.size, scale=scale)


def mlp(widths: Sequence[int], *, last_bias: bool = True) -> nn.Sequential:
    """Linear layers with batch normalization and ReLU between them."""
    layers = list[nn.Module]()
    for here, there in pairwise(widths[:-1]):
        layers += [nn.Linear(here, there, bias=False), nn.BatchNorm1d(there), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=last_bias))


def _two(size: ViewGroup) -> Views:
    return Views(**{"global": size, "local": ViewGroup(count=0, size=size.size, scale=size.scale)})


class SimCLR(Method):
    """arXiv 2002.05709: NT-Xent (equation 1) at temperature 0.5, a perceptron of two layers to 128; section B.9 on CIFAR-10
    (crops of 0.08 to 1, no blur)."""

    temperature = 0.5

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.head = mlp([self.width, self.width, 128])

    def views(self) -> Views:
        return _two(self._global(2, (0.08, 1.0)))

    def loss(self, views: list[Tensor], step: int, progress: float) -> Tensor:
        return nt_xent(self.head(self.encoder(views[0])), self.head(self.encoder(views[1])), self.temperature)


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """The mean cross-entropy of finding each embedding's partner among all others of both views [B, D]."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    similar = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(similar, partner)


class VICReg(Method):
    """arXiv 2105.04906, equation 6 as its authors' code scales the terms (algorithm 1): invariance 25, variance 25,
    covariance 1; an expander of three layers, 1,024 wide instead of 8,192."""

    expander = 1024

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.head = mlp([self.width, self.expander, self.expander, self.expander])

    def views(self) -> Views:
        return _two(self._global(2, (0.08, 1.0)))

    def augment(self) -> Augment:
        """Table 5 there: saturation and hue are less, solarize is more."""
        return Augment(**{**_SIMCLR_COLOURS, "saturation": 0.2, "solarize": 0.1})

    def loss(self, views: list[Tensor], step: int, progress: float) -> Tensor:
        return vicreg(self.head(self.encoder(views[0])), self.head(self.encoder(views[1])))


def vicreg(a: Tensor, b: Tensor) -> Tensor:
    """25 invariance + 25 variance + covariance of embeddings [B, D]."""
    loss = 25 * F.mse_loss(a, b)
    for z in (a, b):
        z = z - z.mean(0)
        loss = loss + 25 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
        covariance = z.T @ z / (len(z) - 1)
        loss = loss + (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]
    return loss


class DINO(Method):
    """arXiv 2104.14294, algorithm 1 with multi-crop: a student at temperature 0.1 predicts what a centred teacher at 0.04
    says of the global views; the teacher is the student's moving average. 4,096 prototypes and narrower layers in place of
    65,536 and 2,048; a momentum of 0.99 for runs that are a hundred times shorter than the paper's."""

    centre: Tensor
    prototypes, student_temperature, teacher_temperature, momentum, clip = 4096, 0.1, 0.04, 0.99, 3.0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.head = nn.Sequential(mlp([self.width, 512, 512, 128]), _Prototypes(128, self.prototypes))
        self.teacher = copy.deepcopy(nn.Sequential(self.encoder, self.head)).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(self.prototypes))

    def views(self) -> Views:
        local = self.config.data.views.local
        small = ViewGroup(count=local.count, size=local.size, scale=(0.05, 0.4))
        return Views(**{"global": self._global(2, (0.4, 1.0)), "local": small})

    def loss(self, views: list[Tensor], step: int, progress: float) -> Tensor:
        with torch.no_grad():
            told = [self.teacher(view) for view in views[:2]]
            targets = [((t - self.centre) / self.teacher_temperature).softmax(1) for t in told]
            self.centre = 0.9 * self.centre + 0.1 * torch.cat(told).mean(0)
        said = [F.log_softmax(self.head(self.encoder(view)) / self.student_temperature, 1) for view in views]
        pairs = [-(t * s).sum(1).mean() for i, t in enumerate(targets) for j, s in enumerate(said) if i != j]
        return torch.stack(pairs).mean()

    def after(self, progress: float) -> None:
        momentum = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
        student = nn.Sequential(self.encoder, self.head)
        with torch.no_grad():
            for mine, other in zip(self.teacher.parameters(), student.parameters(), strict=True):
                mine.lerp_(other, 1 - momentum)
            for here, there in zip(self.teacher.buffers(), student.buffers(), strict=True):
                here.copy_(there)


class _Prototypes(nn.Module):
    """Cosines of the input [B, D] with unit rows."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) @ F.normalize(self.weight, dim=1).T


class MinimalLeJEPA(Method):
    """The minimal recipe as published (github.com/rbalestr-lab/lejepa, its minimal example of 2025-11-20), to the letter but
    for the encoder, the image size, and autocast, which is for its GPU: four views of 0.08 to 1, batch 256, AdamW at 2e-3 on
    every parameter, one epoch of warm-up, a cosine to half, a projector 2,048 wide to 16, lambda 0.02, 256 directions."""

    batch, head_dim, lambda_, directions = 256, 512, 0.02, 256

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.head = mlp([self.width, 2048, 2048, 16])

    def views(self) -> Views:
        return _two(self._global(4, (0.08, 1.0)))

    def augment(self) -> Augment:
        strong = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
        return Augment(**strong, grayscale=0.2, blur=0.5, solarize=0.1)  # its RandomSolarize acts on half of its 0.2

    def loss(self, views: list[Tensor], step: int, progress: float) -> Tensor:
        z = torch.stack([self.head(self.encoder(view)) for view in views])
        a = minimal.directions(step, z.shape[2], self.directions)
        return minimal.lejepa(z, len(views), self.lambda_, a, 3.0, 17)

    def optim(self) -> Optim:
        return Optim(lr=2e-3, final_lr_ratio=0.5, weight_decay=0.05, decay="all", betas=(0.9, 0.999))


METHODS: dict[str, type[Method]] = {
    "minimal": MinimalLeJEPA,
    "minimal, our input": MinimalLeJEPA,
    "simclr": SimCLR,
    "vicreg": VICReg,
    "dino": DINO,
}
PILLOW = {"minimal"}  # whose images come through Pillow, as published
OUR_OPTIMIZER = {f"{name}, our optimizer": METHODS[name] for name in ("simclr", "vicreg", "dino")}
METHODS |= OUR_OPTIMIZER  # and schedule: all that the recipe says of them
