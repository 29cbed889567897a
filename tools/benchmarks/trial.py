"""One form of the training step, held ready: an engine, and the trainer's step on it, its phases named and timed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from benchmarks.features import Form
from lejepa_scale.checkpoint import CanonicalState
from lejepa_scale.config import Config, check_world, dump, load_config, parsed, validate
from lejepa_scale.errors import UserError
from lejepa_scale.model import build
from lejepa_scale.parallel import launch, process_group
from lejepa_scale.training.start import initial_state, start_engine
from lejepa_scale.training.step import MakeViews, StepResult, train_step

CHECKED = 3  # first steps, whose losses and gradients say whether two forms are one computation
Sums = tuple[float, float]  # a step's loss and gradient norm


@dataclass(frozen=True)
class Recipe:
    """A configuration file and overrides of its keys."""

    path: Path
    overrides: tuple[str, ...] = ()

    def config(self, *more: str) -> Config:
        return load_config(self.path, [*self.overrides, *more])

    def of(self, images: int, ranks: int = 1) -> Recipe:
        """One micro-batch of `images` a rank and step, in place of the file's batch."""
        return Recipe(
            self.path, (*self.overrides, f"train.micro_batch={images}", f"train.global_batch={images * ranks}")
        )


class Phases:
    """Names the phases of steps in a profile, and times them: on CUDA between events on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Waiting for data is time of this process, even where the device works on."""
        host = name == "data wait"
        begun = self._now(host)
        with record_function(name):
            yield
        self.spans.append((name, begun, self._now(host)))

    def _now(self, host: bool) -> Any:
        if host or self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Milliseconds of each phase since the last reading; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spent: dict[str, float] = {}
        for name, begun, ended in self.spans:
            ms = 1e3 * (ended - begun) if isinstance(begun, float) else begun.elapsed_time(ended)
            spent[name] = spent.get(name, 0.0) + ms
        self.spans = []
        return spent


@dataclass
class Trial:
    """One form of the step: an engine, and the trainer's step on it."""

    config: Config
    device: torch.device
    form: Form = field(default_factory=lambda: Form("as configured"))
    shared: bool = False  # keep the first weights for the next trial: 4 bytes a parameter
    first: list[Sums] = field(default_factory=list)  # of the first steps
    held: int = 0  # bytes of device memory that are kept between steps

    def __post_init__(self) -> None:
        before = _allocated(self.device)
        self.plan = check_world(self.config, launch.ranks())
        state = _initial(self.config) if self.shared and process_group.rank() == 0 else None
        self.engine = start_engine(self.config, self.plan, self.device, state=state)
        if self.form.alter is not None:
            self.form.alter(self.engine)
        self.phases, self.number = Phases(self.device), 0
        self.views = synthetic_views(self.config, self.plan.micro_batch, self.device)
        results = [self.step(self.synthetic()) for _ in range(CHECKED)]
        self.first = [(float(result.loss), float(result.grad_norm)) for result in results]
        self.held = _allocated(self.device) - before

    def synthetic(self) -> Iterator[MakeViews]:
        """A step's micro-batches, of the same views each."""
        return iter([lambda: self.views] * self.plan.accumulation)

    def step(self, micro_batches: Iterable[MakeViews]) -> StepResult:
        """The trainer's step, at a small learning rate. Raises UserError where it changed nothing."""
        result = train_step(
            self.engine,
            self.plan,
            micro_batches,
            number=self.number,
            seed=self.config.run.seed,
            lr=self.config.optim.lr / 10,
            weight_decay=self.config.optim.weight_decay,
            exact=self.config.objective.accumulation == "exact",
            phase=self.phases,
        )
        self.number += 1
        if not result.finite:  # the trainer looks at it too
            raise UserError(
                f"{self.form.name}: the gradient of step {self.number} is not finite; nothing was measured."
            )
        return result


def synthetic_views(config: Config, images: int, device: torch.device) -> list[Tensor]:
    """Noise [V, B, C, S, S] for each view size, another on every rank."""
    generator = torch.Generator(device).manual_seed(process_group.rank())
    groups = [g for g in (config.data.views.global_, config.data.views.local) if g.count]
    channels = config.data.channels
    return [torch.randn(g.count, images, channels, g.size, g.size, generator=generator, device=device) for g in groups]


def _initial(config: Config) -> CanonicalState:
    """First weights, which engines and switches share; drawn once, since that takes long for large models."""
    plain: dict[str, Any] = {"drop_path": 0.0, "drop_path_uniform": False, "attention": "auto"}
    plain["patch_drop"] = type(config.model.patch_drop)()
    model = config.model.model_copy(update=plain)
    train = config.train.model_copy(update={"micro_batch": 1, "global_batch": 1})
    same = {"engine": type(config.engine)(), "model": model, "train": train}
    return _drawn(dump(config.model_copy(update=same)))


@lru_cache(maxsize=1)
def _drawn(text: str) -> CanonicalState:
    config = validate(parsed(text, "the recipe"))
    return initial_state(config.run.seed, lambda: build(config))


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
